"""Plain values of a checkpoint (epoch, best_psnr, constructor arguments) as JSON values that are safe to print."""

import math
from collections.abc import Mapping
from typing import Any

from srdeploy.models.checkpoint.filebytes import shown
from srdeploy.models.checkpoint.inert import Global

_MAX_TEXT = 4096
_MAX_ITEMS = 64
_MAX_ENTRIES = 256


def is_plain(value: Any, depth: int = 2) -> bool:
    """Return True if a value is a number, text, None, class name, or a short list or dict of these, `depth` deep."""
    if value is None or isinstance(value, (bool, int, float, Global)):
        return True
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    if isinstance(value, (list, tuple, dict)):
        members = value.values() if isinstance(value, dict) else value
        return depth > 0 and len(value) <= _MAX_ITEMS and all(is_plain(item, depth - 1) for item in members)
    return False


def plain(value: Any) -> Any:
    """Return a plain value as JSON values: printable text, finite numbers (others as text), lists, dicts."""
    if isinstance(value, (str, Global)):
        return shown(value, 200)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return plain_dict(value)
    return value


def plain_dict(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the plain entries of a dict as JSON values; of a huge one, the first few hundred."""
    return {
        shown(key): plain(value)
        for key, value in list(values.items())[:_MAX_ENTRIES]
        if isinstance(key, (str, int)) and is_plain(value)
    }
