"""INTERRUPT: a program that waits for a hanging source can be killed, as without llloop.

The kernel sends INTERRUPT once for each request, at the first signal to the waiting thread. A file system that is not
mounted through FUSE lets only fatal signals end a call on a file. So the request is answered with EINTR only if its
thread is being killed. The kernel sends nothing when a fatal signal follows another one, so an interrupted request is
looked at again from time to time.

The thread or the worker that has the request goes on with it, and the kernel refuses its answer later. Whoever sends an
answer must expect that: it may also be refused after the death of a front.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from llloop.front.context import Context
from llloop.front.handlers.base import Responder
from llloop.front.request import FuseRequest
from llloop.front.router import Unanswered
from llloop.linux import fuse
from llloop.linux.process_credentials import is_being_killed
from llloop.shared.messages import Operation

# The interval between two looks at interrupted requests, in milliseconds.
INTERVAL = 100
_NANOSECONDS = INTERVAL * 1_000_000


def _nothing(unique: int) -> None:
    """Withdraw nothing: no request waits for a PROBE."""


class InterruptRequests(Responder):
    """The handler, see `Responder`.

    Attributes:
        kept: descriptors that must stay open because workers still have requests that use them, although the kernel has
            got an answer and may close the file.
        withdraw: called with the `unique` of an answered request that only waits for a PROBE, so that it is not served.
    """

    def __init__(self, context: Context, device: int) -> None:
        super().__init__(context, device)
        self._router = context.router
        # The `unique` of each interrupted request, and the descriptors that it uses if it is answered.
        self._interrupted: dict[int, tuple[int, ...] | None] = {}
        self.kept: frozenset[int] = frozenset()
        self._next = 0
        self.withdraw: Callable[[int], None] = _nothing

    @property
    def waiting(self) -> bool:
        """Whether `look` must be called from time to time."""
        return bool(self._interrupted)

    def interrupt(self, request: FuseRequest) -> None:
        """FUSE_INTERRUPT: without reply. ENOSYS would tell the kernel not to send it."""
        (unique,) = fuse.INTERRUPT_REQUEST.unpack_from(self._memory, request.base)
        self._interrupted[unique] = None
        self._router.attentive = self._router.backlog = True
        self._look()

    def look(self) -> None:
        """Look at the interrupted requests again, unless this was done a moment ago."""
        if time.monotonic_ns() >= self._next:
            self._look()

    def _look(self) -> None:
        self._next = time.monotonic_ns() + _NANOSECONDS
        for unique, used in list(self._interrupted.items()):
            found = self._router.find(unique)
            if found is None:
                del self._interrupted[unique]
            elif used is None and _can_be_left(found) and is_being_killed(found.caller):
                self._interrupted[unique] = _descriptors(found)
                self._send(fuse.error_reply(unique, errno.EINTR))
                self.withdraw(unique)
        self.kept = frozenset(fd for used in self._interrupted.values() for fd in used or ())


def _can_be_left(request: Unanswered) -> bool:
    """Return whether nothing can go wrong if the kernel closes the file of a request while a worker has the request.

    If the front dies, a worker that has not begun the request gets the file from the next front. So it must be able to
    check that it is the same file.
    """
    message = request.message
    return message is None or message.operation == Operation.PROBE or message.file != 0


def _descriptors(request: Unanswered) -> tuple[int, ...]:
    """Return the front's descriptors that a worker needs for a request."""
    message = request.message
    if message is None or message.operation == Operation.PROBE:
        return ()
    others = message.extra[1:2] if message.operation == Operation.COPY_FILE_RANGE else ()
    return message.descriptor, *others
