"""What a server's answers must look like. A server of another version, or another user's, may answer anything.

A shape is a type, a tuple of shapes of which one must fit, a set of the values allowed, a list of one shape for every
item, a `Map`, or a map of the names that must be there to their shapes.
"""

from __future__ import annotations

import errno
import math
from typing import Any, NamedTuple

from llloop.linux.fuse import Opcode
from llloop.shared.metrics import OTHER, UNKNOWN

# The longest text that is believed: some paths and mount options. The largest number: the counters have 64 bits.
_LONGEST = 16 * 1024
_LARGEST = 1 << 64
_MOST = 1024  # items of a list or a map


class Map(NamedTuple):
    """The shape of every key and of every value of a map."""

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
    "in_force": {"cache": str, "io": str, "metadata": str},
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
    "slots": {"used": int, "total": int},
    "cache": {"kept": int, "dropped": int, "bypassed": int, "passed_through": int},
}
SOURCE: dict[Any, Any] = {"waiting": (float, type(None)), "problem": (str, type(None))}
SHAPES = {"status": STATUS, "stats": STATS, "source": SOURCE}


class Unfit(Exception):
    """An answer has another shape; the text says where."""


def fitting(value: Any, shape: Any, place: str = "the answer") -> Any:
    """Return the part of *value* that *shape* names.

    Args:
        value: what was answered.
        shape: see above.
        place: what *value* is called in the message.

    Raises:
        Unfit: *value* is of another shape.
    """
    if isinstance(shape, Map):
        if isinstance(value, dict) and len(value) <= _MOST:
            keys, values = shape
            return {fitting(key, keys, place): fitting(one, values, place) for key, one in value.items()}
    elif isinstance(shape, tuple):
        for one in shape:
            try:
                return fitting(value, one, place)
            except Unfit:
                pass
    elif isinstance(shape, set):
        if isinstance(value, str) and value in shape:
            return value
    elif isinstance(shape, list):
        if isinstance(value, list) and len(value) <= _MOST:
            return [fitting(one, shape[0], place) for one in value]
    elif isinstance(shape, dict):
        if isinstance(value, dict):
            if missing := [str(key) for key in shape if key not in value]:
                raise Unfit(f"{place} lacks {', '.join(missing)}")
            return {key: fitting(value[key], one, key) for key, one in shape.items()}
    elif _is(value, shape):
        return value
    raise Unfit(f"{place} is not as expected")


def _is(value: Any, kind: type) -> bool:
    """Whether *value* is of a plain type; where a fraction may come a whole number may, too."""
    if kind is str:
        return isinstance(value, str) and len(value) <= _LONGEST
    if isinstance(value, bool) or kind not in (int, float):
        return type(value) is kind
    if kind is float and isinstance(value, float):
        return math.isfinite(value) and 0 <= value < _LARGEST
    return isinstance(value, int) and 0 <= value < _LARGEST
