"""What C libraries write to standard error, caught so that it can be said in a sentence of ours."""

from __future__ import annotations

import os
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
