"""Requests that wait until the kernel has dropped cached pages, see `llloop.supervisor.invalidator`."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass

from llloop.shared.messages import Operation, Request, encode

# After so many seconds without an answer, the worker asks the invalidator again, which may have been killed.
ANSWER_TIMEOUT = 1.0


@dataclass
class Held:
    """A waiting request, and the range that the kernel must drop.

    Attributes:
        request: the request.
        nodeid: the inode.
        offset: the start of the range in bytes.
        length: the length of the range in bytes, 0 for everything to the end.
        followers: requests that wait for this one.
        is_asked: whether the invalidator was asked. Of each inode, it is asked for one request at a time.
    """

    request: Request
    nodeid: int
    offset: int
    length: int
    followers: list[Request]
    is_asked: bool = False


class Invalidations:
    """The requests of a worker that wait for the invalidator.

    They keep their slots, so that the successor of the worker waits for them again. But slots must remain free: the
    kernel drops pages more slowly than it writes, and before it drops a page that is being read it waits for a READ,
    which needs a slot. So of each inode's answered writes, at most two wait: one for which the invalidator was asked,
    and one for the ranges of all later writes.

    Args:
        pipe: the non-blocking write end of the pipe to the invalidator.

    Attributes:
        held: the waiting requests by their `unique`.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self.held: dict[int, Held] = {}
        self._deadline = 0.0

    def hold(self, request: Request, nodeid: int, offset: int, length: int) -> Request | None:
        """Hold a request until the kernel has dropped pages.

        Args:
            request: the request.
            nodeid: the inode.
            offset: the start of the range in bytes.
            length: the length of the range in bytes, 0 for everything to the end.

        Returns:
            A WRITE that need not wait any longer, because this request now also waits for its range; or None.
        """
        if request.unique in self.held:  # a resumed request
            self._ask_next(nodeid)
            return None
        held = Held(request, nodeid, offset, length, [])
        last = self._last_of(nodeid)
        replaced = None
        if last is not None and not last.is_asked and last.request.operation == Operation.WRITE:
            replaced = last.request
            del self.held[replaced.unique]
            held.followers = last.followers
            held.offset, held.length = _union(last, held)
        self.held[request.unique] = held
        if last is None:
            self._ask(held)
        return replaced

    def follow(self, request: Request, nodeid: int) -> bool:
        """Hold a request as long as the last held one of an inode; return False if there is none."""
        last = self._last_of(nodeid)
        if last is None:
            return False
        if request not in last.followers:
            last.followers.append(request)
        return True

    def take(self, unique: int) -> Held | None:
        """Remove and return the held request with that `unique`, or None."""
        held = self.held.pop(unique, None)
        if held is not None:
            self._ask_next(held.nodeid)
        return held

    def timeout(self) -> float:
        """Return after how many seconds to ask the invalidator again."""
        return max(0.0, self._deadline - time.monotonic())

    def ask_again(self) -> None:
        """Repeat all unanswered orders to the invalidator."""
        self._deadline = time.monotonic() + ANSWER_TIMEOUT
        for held in self.held.values():
            if held.is_asked:
                self._ask(held)

    def _last_of(self, nodeid: int) -> Held | None:
        return next((held for held in reversed(self.held.values()) if held.nodeid == nodeid), None)

    def _ask_next(self, nodeid: int) -> None:
        for held in self.held.values():
            if held.nodeid == nodeid:
                self._ask(held)
                return

    def _ask(self, held: Held) -> None:
        held.is_asked = True
        self._deadline = time.monotonic() + ANSWER_TIMEOUT
        with suppress(BlockingIOError):  # the pipe is full; `ask_again` repeats it
            os.write(self._pipe, encode((held.request.unique, held.nodeid, held.offset, held.length)))


def _union(one: Held, other: Held) -> tuple[int, int]:
    """Return offset and length of the smallest range that contains both ranges."""
    if not one.length or not other.length:
        return 0, 0
    first = min(one.offset, other.offset)
    return first, max(one.offset + one.length, other.offset + other.length) - first
