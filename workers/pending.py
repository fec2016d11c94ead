"""The requests that are under way in threads other than the leader, and those that wait for them.

Requests on one inode are done one at a time and in their order, for how far an append came shows in the position of
the open file, O_DIRECT is a flag of the open file, and a worker's successor begins with the oldest. Those that change
neither the file nor its descriptor may go before others of their inode.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from llloop.shared.leadership import Leadership
from llloop.shared.messages import BUFFERED, ONCE, Operation, Request

# They read or write the position of an open file, change the file, or tell of changes that were made before.
_ORDERED = frozenset(
    {Operation.WRITE, Operation.FALLOCATE, Operation.LSEEK, Operation.COPY_FILE_RANGE, Operation.GETATTR}
)
# They wait for nothing that is frozen.
_QUICK = frozenset({Operation.READ, Operation.GETATTR})
# How many threads may have requests on one inode that need no order, so that one file does not take all threads.
_MOST_ON_ONE = 4


class Descriptors(Protocol):
    """Keeps descriptors open while they are used."""

    def hold(self, handle: int) -> None: ...
    def let_go(self, handle: int) -> None: ...


def _is_ordered(request: Request) -> bool:
    return request.operation in _ORDERED or bool(request.flags & (BUFFERED | ONCE))


def _handles_of(request: Request) -> tuple[int, ...]:
    if request.operation == Operation.COPY_FILE_RANGE:
        return request.handle, *request.extra[:1]
    return (request.handle,)


class Pending:
    """See `llloop.shared.leadership.InHand`.

    As long as a request waits, a thread has one under way, for which it waits. That thread takes the next one that can
    be done when it has finished its own, so nobody has to be woken.

    Args:
        descriptors: the open files.
        leadership: which thread serves.

    Attributes:
        request: what the thread that runs has in hand; None between requests.
        slots: those of the requests that are under way in other threads, or wait.
    """

    def __init__(self, descriptors: Descriptors, leadership: Leadership) -> None:
        self._descriptors = descriptors
        self._leadership = leadership
        self.request: Request | None = None
        self.slots: set[int] = set()
        self._waiting: list[Request] = []
        # By inode: how many threads have a request on it, and whether one of these is ordered.
        self._threads: Counter[int] = Counter()
        self._in_order: set[int] = set()

    def set_aside(self, thread: int) -> Request | None:
        """Return the request of the thread that is held up; the next one is not in hand yet."""
        request, self.request = self.request, None
        if request is not None:
            self._begin(request)
        return request

    def exchange(self, other: Request | None) -> Request | None:
        mine, self.request = self.request, other
        return mine

    def finished(self) -> None:
        request, self.request = self.request, None
        if request is None:
            return
        self.slots.discard(request.slot)
        self._threads[request.nodeid] -= 1
        if not self._threads[request.nodeid]:
            del self._threads[request.nodeid]
        if _is_ordered(request):
            self._in_order.discard(request.nodeid)
        for handle in _handles_of(request):
            self._descriptors.let_go(handle)

    def _begin(self, request: Request) -> None:
        self.slots.add(request.slot)
        self._threads[request.nodeid] += 1
        if _is_ordered(request):
            self._in_order.add(request.nodeid)
        for handle in _handles_of(request):
            self._descriptors.hold(handle)

    def must_wait(self, request: Request) -> bool:
        """While threads are stalled: keep a request for later that cannot be done now, and return whether it is one.

        It is dropped if it is under way or waits already.
        """
        if request.slot in self.slots:
            return True
        if self._can_begin(request) and not (_is_ordered(request) and self._waits_for(request.nodeid)):
            return False
        self.add(request)
        return True

    def add(self, request: Request) -> None:
        """Have a request wait for `take`."""
        self.slots.add(request.slot)
        self._waiting.append(request)

    def _waits_for(self, nodeid: int) -> bool:
        return any(request.nodeid == nodeid and _is_ordered(request) for request in self._waiting)

    def _can_begin(self, request: Request) -> bool:
        leadership = self._leadership
        if leadership.alone and leadership.leads and request.operation not in _QUICK:
            return False
        if _is_ordered(request):
            return request.nodeid not in self._in_order
        return request.operation == Operation.PROBE or self._threads[request.nodeid] < _MOST_ON_ONE

    def take(self) -> Request | None:
        """Put the first request in hand that waits and can be done, and return it; None if there is none."""
        passed_over: set[int] = set()
        for position, request in enumerate(self._waiting):
            ordered = _is_ordered(request)
            if not (ordered and request.nodeid in passed_over) and self._can_begin(request):
                del self._waiting[position]
                self.slots.discard(request.slot)
                self.request = request
                if not self._leadership.leads:
                    self._begin(request)
                return request
            if ordered:
                passed_over.add(request.nodeid)
        return None
