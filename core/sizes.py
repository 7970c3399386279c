"""Sizes in bytes in text form. Every prefix is a power of 1024: 8G, 8GB and 8GiB are the same."""

import re

from srdeploy.core.errors import UsageError

_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(text: str, what: str) -> int:
    """Parse "1.5G", "800MB", "8 GiB" or "2000000" into bytes.

    Args:
        text: a number, with or without a prefix (k, M, G, T) and a unit (B, iB), in any case.
        what: the option that the text belongs to, for the message: "--memory".

    Raises:
        UsageError: the text is not a size of at least one byte.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(?:i?b)?", text.strip().lower(), re.ASCII)
    size = int(float(match[1]) * _FACTORS[match[2]]) if match else 0
    if size < 1:
        raise UsageError(f"{what} {text!r}", expected="a size such as 8GiB, 512M or a number of bytes")
    return size


def format_minimum(count: float) -> str:
    """Format the bytes that are needed as `format_bytes` does, rounded up: the size that is printed is enough."""
    return format_bytes(count * 1.006)


def format_bytes(count: float) -> str:
    """Format bytes with three digits: "640 B", "1.18 MiB", "24 GiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}"
