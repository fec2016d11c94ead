"""Requests that a worker holds until the kernel has dropped pages: see `llloop.supervisor.invalidator`."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass

from llloop.shared.messages import Operation, Request, encode

# When the invalidator has not answered for this long, in seconds, it is asked again: it may have been killed.
_PATIENCE = 1.0


@dataclass
class Held:
    """A request that waits, and what it asks the invalidator for.

    Attributes:
        request: the request.
        nodeid: the inode.
        offset: the first byte of the range.
        length: how many bytes it has, 0 for all to the end.
        followers: requests that wait with it.
        is_asked: whether the invalidator was told; of an inode it is told one at a time.
    """

    request: Request
    nodeid: int
    offset: int
    length: int
    followers: list[Request]
    is_asked: bool = False


class Invalidations:
    """The requests that are held.

    They stay in their slots meanwhile, so a successor of the worker holds them again. The kernel drops pages more
    slowly than it writes, and for a page that is being read it waits for a READ, which needs a slot. So of an inode's
    answered writes at most two are held: one for which the invalidator was told, and one that waits for the pages of
    all after it.

    Args:
        pipe: the write end of the pipe to the invalidator, not blocking.

    Attributes:
        held: the requests by their numbers.
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
            offset: the first byte of the range.
            length: how many bytes it has, 0 for all to the end.

        Returns:
            A WRITE that is held no longer, for this request waits for its pages, too.
        """
        if request.unique in self.held:  # it was resumed
            self._ask_next(nodeid)
            return None
        held = Held(request, nodeid, offset, length, [])
        last = self._last_of(nodeid)
        replaced = None
        if last is not None and not last.is_asked and last.request.operation == Operation.WRITE:
            replaced = last.request
            del self.held[replaced.unique]
            held.followers = last.followers
            held.offset, held.length = _joined(last, held)
        self.held[request.unique] = held
        if last is None:
            self._ask(held)
        return replaced

    def follow(self, request: Request, nodeid: int) -> bool:
        """Hold a request as long as the one that was held last for an inode; return False if there is none."""
        last = self._last_of(nodeid)
        if last is None:
            return False
        if request not in last.followers:
            last.followers.append(request)
        return True

    def take(self, unique: int) -> Held | None:
        """Return what was held under that number and is held no longer, if anything was."""
        held = self.held.pop(unique, None)
        if held is not None:
            self._ask_next(held.nodeid)
        return held

    def patience(self) -> float:
        """Return for how many seconds the invalidator may still be waited for before it is asked again."""
        return max(0.0, self._deadline - time.monotonic())

    def ask_again(self) -> None:
        """Ask again for all that was asked for."""
        self._deadline = time.monotonic() + _PATIENCE
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
        self._deadline = time.monotonic() + _PATIENCE
        with suppress(BlockingIOError):  # it has enough to do, and will be asked again
            os.write(self._pipe, encode((held.request.unique, held.nodeid, held.offset, held.length)))


def _joined(one: Held, other: Held) -> tuple[int, int]:
    """Return offset and length of a range that has those of both."""
    if not one.length or not other.length:
        return 0, 0
    first = min(one.offset, other.offset)
    return first, max(one.offset + one.length, other.offset + other.length) - first
