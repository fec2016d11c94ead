"""The supervisor's signal handling, as callbacks of its event loop."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from types import FrameType

from llloop.supervisor.event_loop import Callback, EventLoop

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """Catches `SIGNALS`. The signal handlers only note the signal; the event loop runs the callbacks.

    The caller must restore the handlers later (`ProcessState`).

    Attributes:
        stopped_by: the name of the last SIGTERM or SIGINT, None if there was none. It is set before the callback runs.

    Raises:
        OSError: there are no free descriptors.
    """

    def __init__(self, loop: EventLoop) -> None:
        self.stopped_by: str | None = None
        self._had_terminal = _has_terminal()
        self._pending: set[int] = set()
        self._callbacks: dict[frozenset[int], Callback] = {}
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the parent process may have blocked them
        loop.watch(self._reader, self._call)

    def on(self, numbers: Collection[int], callback: Callback) -> None:
        """Call *callback* when one of these signals arrives; only once for several that arrived meanwhile."""
        self._callbacks[frozenset(numbers)] = callback

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending.add(number)
        if number in (signal.SIGTERM, signal.SIGINT):
            self.stopped_by = signal.Signals(number).name

    def _call(self) -> None:
        os.read(self._reader, 4096)
        for numbers, callback in self._callbacks.items():
            if numbers & self._pending:
                self._pending -= numbers
                callback()

    def lost_terminal(self) -> bool:
        """Return whether the controlling terminal of this process was closed. The kernel then sends SIGHUP, too."""
        return self._had_terminal and not _has_terminal()

    def close(self) -> None:
        """Close the descriptors."""
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)


def ignore_signals() -> None:
    """Ignore signals in a forked child that may be sent to the process group, and that the supervisor handles."""
    signal.set_wakeup_fd(-1)
    # Not SIGUSR2: a front inherits faulthandler's handler from the keeper, and faulthandler installs it only once.
    for number in (*STOP_SIGNALS, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _has_terminal() -> bool:
    """Return whether this process has a controlling terminal (tty(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
