"""The supervisor's event loop: callbacks for ready descriptors, deadlines, and processes that end."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable

from llloop.linux.process import Process

Callback = Callable[[], None]


class Deadline:
    """A timer that calls back once each time it is set.

    Attributes:
        due: the time of the call (monotonic clock, seconds), None if it is not set.
    """

    def __init__(self, armed: set[Deadline], callback: Callback) -> None:
        self.due: float | None = None
        self._armed = armed
        self._callback = callback

    def set_in(self, seconds: float) -> None:
        """Set the call to *seconds* from now, instead of an earlier setting."""
        self.due = time.monotonic() + seconds
        self._armed.add(self)

    def cancel(self) -> None:
        """Cancel the call."""
        self.due = None
        self._armed.discard(self)

    def run_if_due(self) -> bool:
        """Make the call if it is due; return whether it was."""
        if self.due is None or self.due > time.monotonic():
            return False
        self.cancel()
        self._callback()
        return True


class EventLoop:
    """Calls back when a descriptor is ready, a deadline is due or a process has ended.

    A callback must not block. An exception in a callback ends the loop.
    """

    def __init__(self) -> None:
        # Not epoll(7): it still reports a closed descriptor if a forked child has a copy.
        self._selector = selectors.PollSelector()
        self._armed: set[Deadline] = set()
        self._stopped = False

    def watch(self, fd: int, callback: Callback, *, writing: bool = False) -> None:
        """Call *callback* whenever *fd* is readable, or writable if *writing*. Replaces an earlier watch of *fd*."""
        self.forget(fd)
        self._selector.register(fd, selectors.EVENT_WRITE if writing else selectors.EVENT_READ, callback)

    def forget(self, fd: int) -> None:
        """Stop watching *fd*. Call this before closing it."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def watch_process(self, process: Process, callback: Callable[[int], None]) -> None:
        """Reap a child process when it has ended, and call *callback* once with its exit code."""

        def ended() -> None:
            self.forget(process.pidfd)
            code = process.wait()
            assert code is not None
            callback(code)

        self.watch(process.pidfd, ended)

    def close(self, fd: int) -> None:
        """Stop watching *fd*, and close it."""
        self.forget(fd)
        os.close(fd)

    def deadline(self, callback: Callback) -> Deadline:
        """Return a deadline for *callback*, which is not set yet."""
        return Deadline(self._armed, callback)

    def due(self) -> float | None:
        """Return the time of the next deadline (monotonic clock, seconds), None if none is set."""
        return min((one.due for one in self._armed if one.due is not None), default=None)

    def stop(self) -> None:
        """Make `run` return, without further callbacks."""
        self._stopped = True

    def run(self) -> None:
        """Run callbacks until `stop` is called."""
        while not self._stopped:
            self.run_once()

    def run_once(self, timeout: float | None = None) -> bool:
        """Wait for events, and run their callbacks.

        Args:
            timeout: the maximum wait in seconds, None for no limit.

        Returns:
            Whether a callback was run.
        """
        due = self.due()
        if due is not None:
            left = max(0.0, due - time.monotonic())
            timeout = left if timeout is None else min(timeout, left)
        called = False
        for key, _ in self._selector.select(timeout):
            # An earlier callback may have closed the descriptor, and its number may be reused by now.
            if not self._stopped and self._selector.get_map().get(key.fd) is key:
                key.data()
                called = True
        for deadline in sorted(self._armed, key=lambda one: one.due or 0.0):
            if not self._stopped:
                called |= deadline.run_if_due()
        return called
