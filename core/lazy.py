"""Public names of a package whose modules are imported when a name is first used, because they import PyTorch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package's `__init__.py`.

    Args:
        package: the package's `__name__`.
        homes: module of the package to the public names that it defines.

    Raises:
        AttributeError: from the function returned, for any other name.
    """

    def get(name: str) -> Any:
        for module, names in homes.items():
            if name in names:
                return getattr(import_module(f"{package}.{module}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
