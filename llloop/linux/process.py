"""Child processes: forking, watching, signalling and reaping them.

Not `multiprocessing`: it cannot represent a process that another process has cloned, it waits at exit for children that
hang, and its sentinel shows that a process has closed a descriptor, maybe long before its end.

Three kinds of children are not a `Process`. `llloop serve --daemon` and mount.llloop fork themselves: the child
continues the program, and the parent only waits to exit as the child does. The server of `llloop.mount` is another
program, which `subprocess` starts and must reap itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from llloop.linux.stdio import flush_standard_streams, redirect_standard_descriptors
from llloop.linux.syscalls import is_readable

# The exit code of a process that another part of this program has reaped.
_UNKNOWN = 255


class Process:
    """A child of this process, identified by a pidfd (pidfd_open(2)).

    Args:
        pid: its process id.

    Attributes:
        pid: its process id.
        pidfd: is readable once it has ended; -1 after `wait` has reaped it, and after `end`.
        exit_code: its exit code, or the negative number of the signal that killed it; None until `wait` has reaped it.

    Raises:
        OSError: there are no free descriptors. The process is killed.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = -1
        self.exit_code: int | None = None
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            self._reap()
            raise

    def is_alive(self) -> bool:
        """Return whether it has not ended."""
        return self.pidfd >= 0 and not is_readable(self.pidfd)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self.pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end, and reap it.

        Args:
            timeout: the maximum wait in seconds, None for no limit.

        Returns:
            `exit_code`; None on timeout.
        """
        if self.pidfd >= 0 and (timeout is None or is_readable(self.pidfd, timeout)):
            self._reap()
            self._close()
        return self.exit_code

    def end(self, timeout: float) -> bool:
        """Kill it; return whether it has ended within *timeout* seconds.

        A process that hangs in a system call ends later. Nobody waits for it then.
        """
        self.signal(signal.SIGKILL)
        self.wait(timeout)
        self._close()
        return self.exit_code is not None

    def _reap(self) -> None:
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            self.exit_code = _UNKNOWN
        else:
            self.exit_code = os.waitstatus_to_exitcode(status)

    def _close(self) -> None:
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


def exit_in_words(code: int) -> str:
    """Return in words how a process with that exit code has ended; negative if a signal has killed it."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def fork(target: Callable[[], int | None], name: str) -> Process:
    """Start a child process that runs *target*.

    Args:
        target: returns the exit code, or None for 0. An exception gives 1, and its traceback is printed.
        name: the name of the process in log messages.

    Raises:
        OSError: there are no free processes or descriptors. No process remains.
    """
    flush_standard_streams()  # otherwise the child would write what is buffered, too
    pid = os.fork()
    if pid == 0:
        run_as_child(target, name)
    return Process(pid)


def run_as_child(target: Callable[[], int | None], name: str) -> NoReturn:
    """Run *target* in a process that has just been forked, and end it without Python's exit handlers; see `fork`."""
    code = 1
    try:
        multiprocessing.current_process().name = name  # `logging` takes it from there
        if sys.stdin is not None:
            with suppress(OSError):  # there is no /dev/null
                redirect_standard_descriptors(0)  # a child must not read what is typed into the terminal
        code = target() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            flush_standard_streams()
        finally:
            os._exit(code)
