"""The standard descriptors: what C libraries write to them is caught, and daemons let go of them."""

from __future__ import annotations

import fcntl
import os
import sys
from contextlib import suppress
from types import TracebackType


class CapturedStderr:
    """``with captured: ...`` sends descriptor 2 to a file, and `text` tells what came."""

    def __enter__(self) -> CapturedStderr:
        file = os.memfd_create("llloop-stderr", os.MFD_CLOEXEC)
        self._file = open(fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3), "w+b")
        os.close(file)
        try:
            self._saved: int | None = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError:  # a program may have closed it
            self._saved = None
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved is None:
            os.close(2)
            return
        try:
            os.dup2(self._saved, 2)
        finally:
            os.close(self._saved)

    def text(self) -> str:
        """Return what was written, its lines joined."""
        self._file.seek(0)
        lines = self._file.read().decode(errors="replace").splitlines()
        self._file.close()
        return "; ".join(line.strip() for line in lines if line.strip())


def let_go_of_standard_descriptors() -> None:
    """Connect standard input, output and error to /dev/null, so that nobody waits for this process to close them."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # nobody reads it, or a program has closed it
            stream.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


def open_missing_standard_descriptors() -> None:
    """Connect those of descriptors 0 to 2 that are closed to /dev/null, else the next file opened would become one."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(_null(), fd)  # the lowest free one most likely, which it is then already
        if getattr(sys, name) is None:  # as Python leaves it then
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115


def _null() -> int:
    return os.open(os.devnull, os.O_RDWR)
