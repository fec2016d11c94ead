"""The requests in progress in threads other than the leader, and the requests that wait for them.

*Ordered* requests on one inode are done one at a time and in their order, for three reasons: the file position shows
how far an append has come, O_DIRECT is a flag of the open file, and the successor of a worker begins with the oldest
request. Requests that change neither the file nor its open file description may overtake others of their inode.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from llloop.shared.leadership import Leadership
from llloop.shared.messages import BUFFERED, SINGLE_CALL, Operation, Request

# They use the file position, change the file, or must be answered after earlier changes.
_ORDERED = frozenset(
    {Operation.WRITE, Operation.FALLOCATE, Operation.LSEEK, Operation.COPY_FILE_RANGE, Operation.GETATTR}
)
# A frozen file system does not block them.
_QUICK = frozenset({Operation.READ, Operation.GETATTR})
# How many threads may serve unordered requests on one inode, so that one file does not occupy all threads.
_MAX_UNORDERED = 4


class Descriptors(Protocol):
    """Keeps descriptors open while threads use them."""

    def hold(self, handle: int) -> None: ...
    def unhold(self, handle: int) -> None: ...


def _is_ordered(request: Request) -> bool:
    return request.operation in _ORDERED or bool(request.flags & (BUFFERED | SINGLE_CALL))


def _handles_of(request: Request) -> tuple[int, ...]:
    if request.operation == Operation.COPY_FILE_RANGE:
        return request.handle, *request.extra[:1]
    return (request.handle,)


class Pending:
    """The current, the stalled and the waiting requests of a worker.

    A request only waits for a request that another thread serves. When that thread has finished, it takes the next
    waiting request. So no thread has to be woken.

    Args:
        descriptors: the open files.
        leadership: decides which thread serves.

    Attributes:
        request: the current request of the leader; None between requests.
        slots: the slots of requests that other threads serve, and of waiting requests.
    """

    def __init__(self, descriptors: Descriptors, leadership: Leadership) -> None:
        self._descriptors = descriptors
        self._leadership = leadership
        self.request: Request | None = None
        self.slots: set[int] = set()
        self._waiting: list[Request] = []
        # By inode: the number of threads that serve a request on it. And the inodes of which one is ordered.
        self._threads: Counter[int] = Counter()
        self._in_order: set[int] = set()

    def set_aside(self) -> None:
        """Note that another thread leads now: the current request is stalled, and there is no current request then."""
        request, self.request = self.request, None
        if request is not None:
            self._begin(request)

    def finished(self, request: Request) -> None:
        """Note that a request is finished that was set aside, or taken by a thread that does not lead."""
        self.slots.discard(request.slot)
        self._threads[request.nodeid] -= 1
        if not self._threads[request.nodeid]:
            del self._threads[request.nodeid]
        if _is_ordered(request):
            self._in_order.discard(request.nodeid)
        for handle in _handles_of(request):
            self._descriptors.unhold(handle)

    def _begin(self, request: Request) -> None:
        self.slots.add(request.slot)
        self._threads[request.nodeid] += 1
        if _is_ordered(request):
            self._in_order.add(request.nodeid)
        for handle in _handles_of(request):
            self._descriptors.hold(handle)

    def must_wait(self, request: Request) -> bool:
        """Return whether a request must wait; if so, keep it for `take`. Call it while threads are stalled.

        A duplicate of a request in progress or of a waiting one is dropped.
        """
        if request.slot in self.slots:
            return True
        if self._can_begin(request) and not (_is_ordered(request) and self._waits_for(request.nodeid)):
            return False
        self.add(request)
        return True

    def add(self, request: Request) -> None:
        """Keep a request for `take`."""
        self.slots.add(request.slot)
        self._waiting.append(request)

    def _waits_for(self, nodeid: int) -> bool:
        return any(request.nodeid == nodeid and _is_ordered(request) for request in self._waiting)

    def _can_begin(self, request: Request) -> bool:
        leadership = self._leadership
        if leadership.in_last_thread and leadership.is_leader and request.operation not in _QUICK:
            return False
        if _is_ordered(request):
            return request.nodeid not in self._in_order
        return request.operation == Operation.PROBE or self._threads[request.nodeid] < _MAX_UNORDERED

    def take(self) -> Request | None:
        """Return the first waiting request that can be done, or None; the calling thread serves it."""
        passed_over: set[int] = set()
        for position, request in enumerate(self._waiting):
            ordered = _is_ordered(request)
            if not (ordered and request.nodeid in passed_over) and self._can_begin(request):
                del self._waiting[position]
                self.slots.discard(request.slot)
                if self._leadership.is_leader:
                    self.request = request
                else:
                    self._begin(request)
                return request
            if ordered:
                passed_over.add(request.nodeid)
        return None
