"""Records which lines of llloop are run, in every Python process that has this directory in its PYTHONPATH.

Python imports this module when it starts. The environment variable LINES_RUN names the directory that
`tests.coverage.report` has made: it holds llloop's modules compiled with a store before each statement, which sets that
line's byte in a file that all processes have mapped. Most processes of a server end by SIGKILL, so nothing can be left
to be written at their end; and a store costs a small part of what a trace function does. The mapping is inherited by
forked processes, and no descriptor of the file stays open, since tests count descriptors.
"""

from __future__ import annotations

import builtins
import ctypes
import marshal
import mmap
import os
import sys
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from types import CodeType


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


def _begin(directory: str) -> None:
    compiled = {}
    with open(os.path.join(directory, "index")) as index:
        size, python = next(index).split()
        for entry in index:
            start, _, path = entry.rstrip("\n").partition(" ")
            compiled[path] = os.path.join(directory, start)
    if python != sys.implementation.cache_tag:
        return  # another Python cannot load what this one has compiled
    vars(builtins)["lines_run"] = _mapped(os.path.join(directory, "run"), int(size))
    usual = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, fullname: str) -> CodeType | None:
        if loader.path not in compiled:
            return usual(loader, fullname)
        with open(compiled[loader.path], "rb") as file:
            code: CodeType = marshal.loads(file.read())  # load(file) calls read for each object
            return code

    SourceFileLoader.get_code = get_code  # type: ignore[assignment,method-assign]


if "LINES_RUN" in os.environ:
    with suppress(OSError):  # another user's process, to whom the file may be out of reach
        _begin(os.environ["LINES_RUN"])
