"""Requests that were received, but cannot be served yet. They are unanswered, so they outlive the front."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from llloop.linux import fuse


class Received(NamedTuple):
    """A received request.

    Attributes:
        data: the whole request.
        taken: when it was received (monotonic clock, nanoseconds).
    """

    data: bytes
    taken: int

    @property
    def unique(self) -> int:
        """The request's `unique`."""
        unique: int = fuse.UNIQUE.unpack_from(self.data)[0]
        return unique

    @property
    def caller(self) -> int:
        """The id of the calling thread, 0 if it is outside of the server's PID namespace."""
        pid: int = fuse.PID.unpack_from(self.data)[0]
        return pid


class SetAside:
    """The requests that the loop has set aside.

    Attributes:
        answered: requests whose PROBE is done.
        postponed: requests that could block the last thread.
        behind: requests that must not overtake a change that an interrupted request still makes.
    """

    def __init__(self) -> None:
        self.answered: deque[Received] = deque()
        self.postponed: deque[Received] = deque()
        self.behind: deque[Received] = deque()

    def find(self, unique: int) -> Received | None:
        """Return the request with that `unique`, or None."""
        for queue in (self.answered, self.postponed, self.behind):
            for waiting in queue:
                if waiting.unique == unique:
                    return waiting
        return None

    def withdraw(self, unique: int) -> None:
        """Forget the request with that `unique`, if there is one."""
        waiting = self.find(unique)
        for queue in (self.answered, self.postponed, self.behind):
            if waiting in queue:
                queue.remove(waiting)  # type: ignore[arg-type]
