"""Saving and restoring the state of a process that calls `llloop.serve()`: title, limits, signal handlers."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from setproctitle import getproctitle, setproctitle

from llloop.linux.limits import RAISED_LIMITS

_COMM = Path("/proc/self/comm")


class ProcessState:
    """``with ProcessState(numbers): ...`` restores the state of the process at the end of the block.

    The state is: title and name of the process, its limits, the handlers of the signals *numbers*, the set of blocked
    signals, and Python's wake-up descriptor for signals.

    Args:
        numbers: the signals whose handlers the block sets.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = tuple(numbers)

    def __enter__(self) -> ProcessState:
        self._pid = os.getpid()
        self._comm = _COMM.read_bytes()  # before the title, because the first call of getproctitle changes the name
        self._title = _title()
        self._name = multiprocessing.current_process().name
        self._limits = [(limit, resource.getrlimit(limit)) for limit in RAISED_LIMITS]
        self._handlers: dict[int, Any] = {number: signal.getsignal(number) for number in self._numbers}
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._pid:  # a forked child that leaves the block by an exception
            return
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number, handler in self._handlers.items():
            if handler is not None:  # None means a handler that was not set by Python
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        setproctitle(self._title)
        with suppress(OSError):
            _COMM.write_bytes(self._comm.rstrip(b"\n"))
        multiprocessing.current_process().name = self._name
        for limit, values in self._limits:
            resource.setrlimit(limit, values)


def keep_ended_children() -> None:
    """Make the kernel keep children that have ended until this process waits for them.

    If this process was started with SIGCHLD ignored, wait(2) cannot get the status of children.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _title() -> str:
    try:
        return getproctitle()
    except UnicodeDecodeError:  # arguments may contain any bytes, but setproctitle only accepts text
        return Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
