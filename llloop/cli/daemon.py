"""Running in the background (`--daemon`), and the pid file."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from llloop.errors import HostError
from llloop.linux import syscalls, trusted_files
from llloop.linux.stdio import redirect_standard_descriptors
from llloop.supervisor.signals import STOP_SIGNALS


class Daemon:
    """The background process of `llloop serve --daemon`, and the pid file of `llloop serve`.

    Args:
        pid_file: the path of the pid file, or None.

    Raises:
        HostError: the pid file cannot be written; the text says why.
    """

    def __init__(self, pid_file: Path | None) -> None:
        self._written: bytes | None = None
        try:
            self._pid_file = pid_file.absolute() if pid_file else None
            if self._pid_file is not None:
                trusted_files.check_replaceable(str(self._pid_file))
        except OSError as error:
            raise HostError(f"pid file {pid_file}: {error.strerror}") from None
        self._parent_pipe: int | None = None

    def start(self) -> None:
        """Fork, and return in the child. The parent exits when the child calls `detach`, or with its exit code."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        caller = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # lose no signal between parent and child
        child = os.fork()
        if child:
            os.close(writer)
            for number in STOP_SIGNALS:
                signal.signal(number, lambda *_: os.kill(child, signal.SIGTERM))
            signal.pthread_sigmask(signal.SIG_SETMASK, before - set(STOP_SIGNALS))
            _exit_with(child, reader)
        os.close(reader)
        os.setsid()
        self._parent_pipe = writer
        # If the parent is killed before the mount is ready, end too.
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if os.getppid() != caller:
            os._exit(1)

    def write_pid_file(self) -> None:
        """Write the pid file."""
        if self._pid_file is not None:
            text = f"{os.getpid()}\n".encode()
            try:
                trusted_files.replace_file(str(self._pid_file), text)
            except OSError as error:
                raise HostError(f"pid file {self._pid_file}: {error.strerror}") from None
            self._written = text

    def detach(self) -> None:
        """Detach from the terminal, and let the parent exit successfully."""
        redirect_standard_descriptors()
        os.chdir("/")
        if self._parent_pipe is not None:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 0)
            os.write(self._parent_pipe, b"!")
            os.close(self._parent_pipe)
            self._parent_pipe = None

    def remove_pid_file(self) -> None:
        """Remove the pid file, unless another server has taken it over."""
        if self._written is not None and self._pid_file is not None:
            trusted_files.remove_file(str(self._pid_file), self._written)


def _exit_with(child: int, reader: int) -> NoReturn:
    """Exit as soon as *child* detaches, or with its exit code.

    Args:
        child: the child's process id.
        reader: the read end of a pipe to which the child writes when it detaches.
    """
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
