"""Going into the background, and the pid file."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from llloop.errors import HostError
from llloop.linux import syscalls, trusted_files
from llloop.linux.stdio import redirect_standard_descriptors
from llloop.supervisor.child import STOP_SIGNALS


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
                trusted_files.check_replaceable(str(self._pid_file))
        except OSError as error:
            raise HostError(f"pid file {pid_file}: {error.strerror}") from None
        self._waiting: int | None = None

    def start(self) -> None:
        """Go on in a child; the calling process ends when that calls `let_go`, or with its exit code."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        caller = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # none is to be lost between the two
        child = os.fork()
        if child:
            os.close(writer)
            for number in STOP_SIGNALS:
                signal.signal(number, lambda *_: os.kill(child, signal.SIGTERM))
            signal.pthread_sigmask(signal.SIG_SETMASK, before - set(STOP_SIGNALS))
            _wait_for(child, reader)
        os.close(reader)
        os.setsid()
        self._waiting = writer
        # A caller that was killed has no use for the mount.
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if os.getppid() != caller:
            os._exit(1)

    def ready(self) -> None:
        """Write the pid file."""
        if self._pid_file is not None:
            text = f"{os.getpid()}\n".encode()
            try:
                trusted_files.replace_file(str(self._pid_file), text)
            except OSError as error:
                raise HostError(f"pid file {self._pid_file}: {error.strerror}") from None
            self._written = text

    def let_go(self) -> None:
        """Let the calling process end and leave its terminal."""
        redirect_standard_descriptors()
        os.chdir("/")
        if self._waiting is not None:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 0)
            os.write(self._waiting, b"!")
            os.close(self._waiting)
            self._waiting = None

    def end(self) -> None:
        """Remove the pid file, unless another server has taken it over."""
        if self._written is not None and self._pid_file is not None:
            trusted_files.remove_file(str(self._pid_file), self._written)


def _wait_for(child: int, reader: int) -> NoReturn:
    """End as soon as *child* lets go, or with its exit code."""
    if os.read(reader, 1):
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        with suppress(OSError):
            os.write(
                2,
                f"llloop: the server was killed by {signal.Signals(-code).name} before the mount was ready\n".encode(),
            )
    os._exit(code if code >= 0 else 1)
