"""Validation of servers' answers. A server of another version or of another user may answer anything.

A *shape* describes a valid value. It is one of these:

* a type
* a tuple of shapes, of which one must match
* a set of the allowed values
* a list with one shape, which each item must match
* a `Map`
* a dict of the required keys and the shapes of their values
"""

from __future__ import annotations

import errno
import math
from typing import Any, NamedTuple

from llloop.linux.fuse import Opcode
from llloop.shared.metrics import OTHER, UNKNOWN

# The maximum length of a string, which suffices for paths and mount options, and the limit of numbers (64 bits).
_MAX_STRING = 16 * 1024
_NUMBER_LIMIT = 1 << 64
_MAX_ITEMS = 1024  # items of a list or a map


class Map(NamedTuple):
    """The shape of a dict whose keys all match one shape, and whose values all match another."""

    keys: Any
    values: Any


_OPERATION = {
    **{"requests": int, "errors": int, "bytes": int, "nanoseconds": int, "histogram": [int]},
    "errnos": Map({*errno.errorcode.values(), OTHER}, int),
}
_PROCESS = {
    **{"pid": (int, type(None)), "state": str, "restarts": int, "descriptors": int, "cpu_seconds": float},
    **{"requests": int, "errors": int, "bytes": int},
}
_STATES = {"serving", "reloading", "stopping", "not answering"}

STATUS: dict[Any, Any] = {
    **{"source": str, "mountpoint": str, "version": str, "state": _STATES, "pid": int},
    **{"began": float, "uptime": float, "loop": str, "protocol": (str, type(None)), "capabilities": [str]},
    "options": Map(str, (str, bool, float, [str])),
    "in_force": {"cache": str, "io": str, "metadata": str, "watch": str},
    "processes": [
        {**{"role": str, "pid": (int, type(None)), "state": str, "restarts": int}, "busy": (float, type(None))}
    ],
}
STATS: dict[Any, Any] = {
    **{
        "source": str,
        "mountpoint": str,
        "state": _STATES,
        "time": float,
        "uptime": float,
        "inodes": int,
        "handles": int,
    },
    "operations": Map({UNKNOWN, *(opcode.name for opcode in Opcode)}, _OPERATION),
    "front": _PROCESS,
    "workers": [{"name": str, "queue": int, **_PROCESS}],
    "awake_seconds": float,
    "slots": {"used": int, "total": int},
    "cache": {"kept": int, "dropped": int, "bypassed": int, "passed_through": int},
    "watch": {
        **{"heard": int, "own": int, "ignored": int, "notified": int, "told": int, "dropped": int},
        **{"nanoseconds": int, "histogram": [int]},
    },
}
SOURCE: dict[Any, Any] = {"waiting": (float, type(None)), "problem": (str, type(None))}
TRACE: dict[Any, Any] = {"shards": int, "io_by_kernel": bool}
SHAPES = {"status": STATUS, "stats": STATS, "source": SOURCE, "trace": TRACE}


class ShapeMismatch(Exception):
    """An answer does not match its shape; the text says where."""


def validated(value: Any, shape: Any, place: str = "the answer") -> Any:
    """Return *value* without the keys that *shape* does not contain.

    Args:
        value: the answer or a part of it.
        shape: see the module's docstring.
        place: the name of *value* in the error message.

    Raises:
        ShapeMismatch: *value* does not match *shape*.
    """
    if isinstance(shape, Map):
        if isinstance(value, dict) and len(value) <= _MAX_ITEMS:
            keys, values = shape
            return {validated(key, keys, place): validated(one, values, place) for key, one in value.items()}
    elif isinstance(shape, tuple):
        for one in shape:
            try:
                return validated(value, one, place)
            except ShapeMismatch:
                pass
    elif isinstance(shape, set):
        if isinstance(value, str) and value in shape:
            return value
    elif isinstance(shape, list):
        if isinstance(value, list) and len(value) <= _MAX_ITEMS:
            return [validated(one, shape[0], place) for one in value]
    elif isinstance(shape, dict):
        if isinstance(value, dict):
            if missing := [str(key) for key in shape if key not in value]:
                raise ShapeMismatch(f"{place} lacks {', '.join(missing)}")
            return {key: validated(value[key], one, key) for key, one in shape.items()}
    elif _has_type(value, shape):
        return value
    raise ShapeMismatch(f"{place} is not as expected")


def _has_type(value: Any, kind: type) -> bool:
    """Return whether *value* has the type *kind* and is within the limits; an int also counts as a float."""
    if kind is str:
        return isinstance(value, str) and len(value) <= _MAX_STRING
    if isinstance(value, bool) or kind not in (int, float):
        return type(value) is kind
    if kind is float and isinstance(value, float):
        return math.isfinite(value) and 0 <= value < _NUMBER_LIMIT
    return isinstance(value, int) and 0 <= value < _NUMBER_LIMIT
