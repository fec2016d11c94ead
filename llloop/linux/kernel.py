"""The version of the running kernel."""

from __future__ import annotations

import platform
import re


def release() -> tuple[int, ...]:
    """Return the first two numbers of the kernel's version (uname(2))."""
    return tuple(int(part) for part in re.findall("[0-9]+", platform.release())[:2])
