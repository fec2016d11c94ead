"""Standard input, output and error: capturing what C libraries write there, and redirecting them to /dev/null."""

from __future__ import annotations

import fcntl
import os
import sys
from contextlib import suppress
from types import TracebackType


class CapturedStderr:
    """``with captured: ...`` redirects descriptor 2 into memory.

    Attributes:
        text: after the block, the lines that were written in it, joined by "; ".
    """

    def __init__(self) -> None:
        self.text = ""

    def __enter__(self) -> CapturedStderr:
        file = os.memfd_create("llloop-stderr", os.MFD_CLOEXEC)
        # Above the standard descriptors, of which a program may have closed some.
        self._memory = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(file)
        try:
            self._saved: int | None = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError:
            self._saved = None
        os.dup2(self._memory, 2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved is None:
            os.close(2)
        else:
            os.dup2(self._saved, 2)
            os.close(self._saved)
        written = os.pread(self._memory, os.fstat(self._memory).st_size, 0)
        os.close(self._memory)
        lines = (line.strip() for line in written.decode(errors="replace").splitlines())
        self.text = "; ".join(line for line in lines if line)


def flush_standard_streams() -> None:
    """Write out what Python has buffered for standard output and error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # its reader is gone, or the stream is closed
            stream.flush()


def redirect_standard_descriptors(*fds: int) -> None:
    """Connect standard input, output and error to /dev/null, so that a program that reads them sees their end.

    Args:
        fds: only these of them.
    """
    flush_standard_streams()
    fds = fds or (0, 1, 2)
    null = _null()
    for fd in fds:
        os.dup2(null, fd)
    if null not in fds:
        os.close(null)


def open_missing_standard_descriptors() -> None:
    """Connect each closed descriptor of 0 to 2 to /dev/null, so that no file that is opened later gets its number."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(_null(), fd)  # open(2) returns the lowest free number, so this is mostly fd itself
        if getattr(sys, name) is None:  # Python sets it to None if the descriptor was closed at its start
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115


def _null() -> int:
    return os.open(os.devnull, os.O_RDWR)
