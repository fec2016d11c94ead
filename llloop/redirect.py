"""The standard descriptors: what C libraries write to them is caught, and daemons let go of them."""

from __future__ import annotations

import os
import sys
import tempfile
from types import TracebackType


class CapturedStderr:
    """``with captured: ...`` sends descriptor 2 to a file, and `text` tells what came."""

    def __enter__(self) -> CapturedStderr:
        self._file = tempfile.TemporaryFile()
        self._saved = os.dup(2)
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)

    def text(self) -> str:
        """Return what was written, its lines joined."""
        self._file.seek(0)
        lines = self._file.read().decode(errors="replace").splitlines()
        return "; ".join(line.strip() for line in lines if line.strip())


def let_go_of_standard_descriptors() -> None:
    """Connect standard input, output and error to /dev/null, so that nobody waits for this process to close them."""
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
