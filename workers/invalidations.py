"""Requests that a worker holds until the kernel has dropped pages: see `llloop.invalidator`."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import NamedTuple

from llloop.protocol import Request, encode

# When the invalidator has not answered for this long, in seconds, it is asked again: it may have been killed.
_PATIENCE = 1.0


class Held(NamedTuple):
    """A request that waits, and what it asked the invalidator for.

    Attributes:
        request: the request.
        nodeid: the inode.
        message: what the invalidator was told.
        followers: requests that wait with it.
    """

    request: Request
    nodeid: int
    message: bytes
    followers: list[Request]


class Invalidations:
    """The requests that are held.

    They stay in their slots meanwhile, so a worker's successor holds them again.

    Args:
        pipe: the write end of the pipe to the invalidator, not blocking.

    Attributes:
        held: the requests by their numbers.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self.held: dict[int, Held] = {}
        self._deadline = 0.0

    def hold(self, request: Request, nodeid: int, offset: int, length: int) -> None:
        """Hold a request until the kernel has dropped pages.

        Args:
            request: the request.
            nodeid: the inode.
            offset: the first byte of the range.
            length: how many bytes it has, 0 for all to the end.
        """
        held = self.held.get(request.unique)  # it may have been resumed
        if held is None:
            held = Held(request, nodeid, encode((request.unique, nodeid, offset, length)), [])
            self.held[request.unique] = held
        self._ask(held)

    def follow(self, request: Request, nodeid: int) -> bool:
        """Hold a request as long as the one that was held last for an inode; return False if there is none."""
        for held in reversed(self.held.values()):
            if held.nodeid == nodeid:
                if request not in held.followers:
                    held.followers.append(request)
                return True
        return False

    def take(self, unique: int) -> Held | None:
        """Return what was held under that number and is held no longer, if anything was."""
        return self.held.pop(unique, None)

    def patience(self) -> float:
        """Return for how many seconds the invalidator may still be waited for before it is asked again."""
        return max(0.0, self._deadline - time.monotonic())

    def ask_again(self) -> None:
        """Ask again for all that is held."""
        for held in self.held.values():
            self._ask(held)

    def _ask(self, held: Held) -> None:
        self._deadline = time.monotonic() + _PATIENCE
        with suppress(BlockingIOError):  # it has enough to do, and will be asked again
            os.write(self._pipe, held.message)
