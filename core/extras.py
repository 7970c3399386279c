"""Optional packages: imported where they are used; a missing one is reported with the extra that installs it."""

import importlib
import importlib.util
from types import ModuleType

from srdeploy.core.errors import MissingExtraError


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: the import name, for example "openvino".
        extra: the extra of srdeploy that brings it, for example "cpu".

    Raises:
        MissingExtraError: the package is not installed. An installed package that fails to import is not hidden.
    """
    if not is_installed(module):
        raise MissingExtraError(module.split(".")[0], extra)
    return importlib.import_module(module)


def is_installed(module: str) -> bool:
    """Return True if the top-level package of a module is installed, without importing it."""
    return importlib.util.find_spec(module.split(".")[0]) is not None
