"""The queue of requests that a worker cannot take yet: no user's requests wait for all those of another."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from llloop.shared.messages import Request


class ParkedRequest(NamedTuple):
    """A parked request.

    Attributes:
        message: the message to the worker, whose slot is invalid.
        taken: when the request was received (monotonic clock, nanoseconds).
        caller: the id of the calling thread, 0 if it is outside of the server's PID namespace.
        payload: the payload of a WRITE, unless it is in `spare`.
        spare: a spare pipe with the payload, or None.
    """

    message: Request
    taken: int
    caller: int
    payload: bytes = b""
    spare: tuple[int, int] | None = None


class FairQueue:
    """Parked requests, served by user in turn. Requests on one inode stay in order, also those of different users."""

    def __init__(self) -> None:
        self._of_user: dict[int, deque[ParkedRequest]] = {}  # the user whose turn it is comes first
        # With which user's the requests of an inode are, and how many there are.
        self._inodes: dict[int, tuple[int, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._of_user)

    def __iter__(self) -> Iterator[ParkedRequest]:
        return chain.from_iterable(self._of_user.values())

    def append(self, uid: int, parked: ParkedRequest) -> None:
        """Park a request of the user *uid*."""
        nodeid = parked.message.nodeid
        uid, count = self._inodes.get(nodeid, (uid, 0))
        self._inodes[nodeid] = uid, count + 1
        self._of_user.setdefault(uid, deque()).append(parked)

    @property
    def first(self) -> ParkedRequest:
        """The request whose turn it is."""
        return next(iter(self._of_user.values()))[0]

    @first.setter
    def first(self, parked: ParkedRequest) -> None:
        next(iter(self._of_user.values()))[0] = parked

    def remove_first(self) -> None:
        """Take out the request whose turn it is; another user has the next turn."""
        uid, queue = next(iter(self._of_user.items()))
        self._discount(queue.popleft())
        del self._of_user[uid]
        if queue:
            self._of_user[uid] = queue

    def remove(self, parked: ParkedRequest) -> None:
        """Take out any request; the turns of the users stay the same."""
        for uid, queue in self._of_user.items():
            if parked in queue:
                queue.remove(parked)
                self._discount(parked)
                if not queue:
                    del self._of_user[uid]
                return

    def _discount(self, parked: ParkedRequest) -> None:
        nodeid = parked.message.nodeid
        uid, count = self._inodes.pop(nodeid)
        if count > 1:
            self._inodes[nodeid] = uid, count - 1
