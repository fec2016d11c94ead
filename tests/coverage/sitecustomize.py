"""Records which lines of llloop are run, in every Python process that has this directory in its PYTHONPATH.

Python imports this module when it starts. Most processes of a server end by SIGKILL, so nothing can be left to be
written at their end: each line is one byte of a file that all processes have mapped, and a line that is run sets it.
The mapping and the tracing are inherited by forked processes. The environment variable LINES_RUN names the directory
that `tests.coverage.report` has made; no descriptor of it stays open, since tests count descriptors.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import CodeType, FrameType
from typing import Any

# When all lines of a function have been run, they are looked at no more. That is checked at its calls of these numbers.
_CHECKED = frozenset(2**exponent for exponent in range(1, 30))

Trace = Callable[[FrameType, str, Any], Any]


def _mapped(path: str, size: int) -> memoryview:
    """The file in memory, shared with all processes (mmap(2); Python's own would keep a descriptor open)."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        function = ctypes.CDLL(None, use_errno=True).mmap
        function.restype = ctypes.c_void_p
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        address = function(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def _tracer(run: memoryview, starts: dict[str, int]) -> Trace:
    """The function for `sys.settrace`.

    Args:
        run: a byte for each line.
        starts: where those of each file begin.
    """
    calls: dict[CodeType, int] = {}
    finished: set[CodeType] = set()
    lines: dict[str, Trace] = {}

    def local(start: int) -> Trace:
        def line(frame: FrameType, event: str, argument: Any) -> Trace:
            if event == "line":
                run[start + frame.f_lineno] = 1
            return line

        return line

    def call(frame: FrameType, event: str, argument: Any) -> Trace | None:
        code = frame.f_code
        trace = lines.get(code.co_filename)
        if trace is None or code in finished:
            return None
        count = calls[code] = calls.get(code, 0) + 1
        if count in _CHECKED:
            start = starts[code.co_filename]
            if all(run[start + line] for _, _, line in code.co_lines() if line and line > code.co_firstlineno):
                finished.add(code)
                return None
        return trace

    lines.update((path, local(start)) for path, start in starts.items())
    return call


def _begin(directory: str) -> None:
    starts = {}
    with open(os.path.join(directory, "index")) as index:
        size = int(next(index))
        for entry in index:
            start, _, path = entry.rstrip("\n").partition(" ")
            starts[path] = int(start)
    trace = _tracer(_mapped(os.path.join(directory, "run"), size), starts)
    threading.settrace(trace)
    sys.settrace(trace)


if "LINES_RUN" in os.environ:
    with suppress(OSError):  # another user's process, to whom the file may be out of reach
        _begin(os.environ["LINES_RUN"])
