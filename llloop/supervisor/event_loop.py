"""The supervisor's event loop: it waits for descriptors, deadlines and the ends of processes, and calls back."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

Callback = Callable[[], None]


class Deadline:
    """A call that the loop makes once at a time, which can be set again and cancelled.

    Attributes:
        due: when the call is made (monotonic clock), None if it is not set.
    """

    def __init__(self, armed: set[Deadline], callback: Callback) -> None:
        self.due: float | None = None
        self._armed = armed
        self._callback = callback

    def set_in(self, seconds: float) -> None:
        """Make the call in *seconds* from now, and not at the time that was set before."""
        self.due = time.monotonic() + seconds
        self._armed.add(self)

    def cancel(self) -> None:
        """Make no call."""
        self.due = None
        self._armed.discard(self)

    def run_if_due(self) -> bool:
        """Make the call if it is time; return whether it was."""
        if self.due is None or self.due > time.monotonic():
            return False
        self.cancel()
        self._callback()
        return True


class EventLoop:
    """Calls back when a descriptor is ready, a deadline is due or a process has ended.

    A callback must not wait. What a callback raises ends the loop.
    """

    def __init__(self) -> None:
        # Not epoll(7): that goes on reporting a closed descriptor if a forked child has a copy of it.
        self._selector = selectors.PollSelector()
        self._armed: set[Deadline] = set()
        self._stopped = False

    def watch(self, fd: int, callback: Callback, *, writing: bool = False) -> None:
        """Call *callback* whenever *fd* can be read, or written; replaces what was watched for on *fd* before."""
        self.forget(fd)
        self._selector.register(fd, selectors.EVENT_WRITE if writing else selectors.EVENT_READ, callback)

    def forget(self, fd: int) -> None:
        """Watch *fd* no longer. This comes before it is closed."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def watch_process(self, process: BaseProcess, callback: Callback) -> int:
        """Call *callback* once when a child that was started has ended.

        Returns:
            A pidfd of it, which the loop closes before that call.

        Raises:
            OSError: there are no descriptors left.
        """

        def ended() -> None:
            self.close(pidfd)
            callback()

        assert process.pid is not None
        # Not the process's own sentinel: that tells that it has closed a descriptor, which it may do long before.
        pidfd = os.pidfd_open(process.pid)
        self.watch(pidfd, ended)
        return pidfd

    def close(self, fd: int) -> None:
        """Watch *fd* no longer, and close it."""
        self.forget(fd)
        os.close(fd)

    def deadline(self, callback: Callback) -> Deadline:
        """Return a deadline at which *callback* is called, yet to be set."""
        return Deadline(self._armed, callback)

    def due(self) -> float | None:
        """Return when the next deadline is due (monotonic clock), None if none is set."""
        return min((one.due for one in self._armed if one.due is not None), default=None)

    def stop(self) -> None:
        """Make no more calls."""
        self._stopped = True

    def run(self) -> None:
        """Call back until `stop`."""
        while not self._stopped:
            self.run_once()

    def run_once(self, patience: float | None = None) -> bool:
        """Wait for the next events, and make their calls.

        Args:
            patience: for how long to wait at most, in seconds; None: until there is an event.

        Returns:
            Whether a call was made.
        """
        due = self.due()
        if due is not None:
            left = max(0.0, due - time.monotonic())
            patience = left if patience is None else min(patience, left)
        called = False
        for key, _ in self._selector.select(patience):
            # A call before this one may have closed the descriptor, and another may have its number by now.
            if not self._stopped and self._selector.get_map().get(key.fd) is key:
                key.data()
                called = True
        for deadline in sorted(self._armed, key=lambda one: one.due or 0.0):
            if not self._stopped:
                called |= deadline.run_if_due()
        return called
