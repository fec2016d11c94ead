"""Going into the background, and the pid file."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from . import trusted
from .errors import HostError
from .redirect import let_go_of_standard_descriptors


class Daemon:
    """The background side of `llloop serve --daemon`, and the pid file of any `llloop serve`.

    Args:
        pid_file: where to write the process id, or None.

    Raises:
        HostError: the pid file could not be written there; the text says why.
    """

    def __init__(self, pid_file: Path | None) -> None:
        self._written: bytes | None = None
        try:
            self._pid_file = pid_file.absolute() if pid_file else None
            if self._pid_file is not None:
                trusted.check_replaceable(str(self._pid_file))
        except OSError as error:
            raise HostError(f"pid file {pid_file}: {error.strerror}") from None
        self._waiting: int | None = None

    def start(self) -> None:
        """Go on in a child; the calling process ends when that calls `let_go`, or with its exit code."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        child = os.fork()
        if child:
            os.close(writer)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child is in the group still and will end by it
            if os.read(reader, 1):
                os._exit(0)
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)
        os.close(reader)
        os.setsid()
        self._waiting = writer

    def ready(self) -> None:
        """Write the pid file."""
        if self._pid_file is not None:
            text = f"{os.getpid()}\n".encode()
            try:
                trusted.replace_file(str(self._pid_file), text)
            except OSError as error:
                raise HostError(f"pid file {self._pid_file}: {error.strerror}") from None
            self._written = text

    def let_go(self) -> None:
        """Let the calling process end and leave its terminal."""
        let_go_of_standard_descriptors()
        os.chdir("/")
        if self._waiting is not None:
            os.write(self._waiting, b"!")
            os.close(self._waiting)
            self._waiting = None

    def end(self) -> None:
        """Remove the pid file, unless another server has taken it over."""
        if self._written is not None and self._pid_file is not None:
            trusted.remove_file(str(self._pid_file), self._written)
