"""The main loop of a worker: read a message from the pipe, do the request."""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Sequence

from llloop.linux.fuse import FUSE_UNIQUE_RESEND as RESENT
from llloop.linux.syscalls import is_readable
from llloop.shared.leadership import CHECK_INTERVAL, Leadership
from llloop.shared.messages import MAX_MESSAGE, Malformed, Operation, Request, decode, decode_strictly
from llloop.shared.metrics import ProcessCounters
from llloop.shared.slots import Slots
from llloop.workers.descriptors import Descriptors
from llloop.workers.invalidations import Invalidations
from llloop.workers.operations import Operations, opcode_of
from llloop.workers.pending import Pending

_log = logging.getLogger(__name__)

# The exceptions that invalid fields of a message cause. Catching them is cheaper than checking each message.
_INVALID_FIELDS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error)


class Worker:
    """The worker of one shard.

    Args:
        shard: the worker's number.
        slots: the request slots in shared memory.
        pipe: the read end of the request pipe.
        operations: does the requests.
        counters: the worker's counters.
        descriptors: the open files.
        leadership: decides which thread serves.
        invalidations: the requests that wait until the kernel has dropped pages.
    """

    def __init__(
        self,
        shard: int,
        slots: Slots,
        pipe: int,
        operations: Operations,
        counters: ProcessCounters,
        descriptors: Descriptors,
        leadership: Leadership,
        invalidations: Invalidations,
    ) -> None:
        self._shard = shard
        self._slots = slots
        self._pipe = pipe
        self._operations = operations
        self._counters = counters
        self._descriptors = descriptors
        self._leadership = leadership
        self._pending = Pending(descriptors, leadership)
        leadership.on_new_leader = self._pending.set_aside
        self._invalidations = invalidations

    def recover(self) -> None:
        """Make `run` begin with the requests that the previous worker may have received but has not answered."""
        for request in self._lent():
            self._pending.add(request)

    def _lent(self) -> list[Request]:
        """Return the requests in the slots that are lent to this shard: first the one that was begun, then by age.

        A begun request must be finished before others: the state of its open file shows how far it had come.
        """
        slots = self._slots
        requests = []
        for slot, message in slots.lent_to(self._shard):
            try:
                request = decode_strictly(message)
                if request.slot != slot or request.operation == Operation.RELEASE:
                    raise Malformed("no such request is lent a slot")
                requests.append(request)
            except Malformed as error:
                _log.error("returned a slot that holds no valid request: %s", error)
                slots.give_back(slot)
        return sorted(requests, key=lambda request: (not slots.stages[request.slot], request.unique & ~RESENT))

    def _resume(self, request: Request) -> None:
        """Do a request that a previous worker or front has left unfinished."""
        begun = self._slots.metrics.begun[request.slot]
        try:
            self._operations.resume(request)
        except _INVALID_FIELDS as error:
            _log.error("returned a slot with an invalid request: %s", error)
            self._slots.give_back(request.slot)
        if request.operation != Operation.PROBE and self._slots.states[request.slot] != self._shard + 1:
            self._counters.finished(opcode_of(request), time.monotonic_ns() - begun)

    def _resume_all(self, uniques: Sequence[int]) -> bool:
        """Do those of the requests that are still lent to this worker.

        Other threads answer the requests that they serve, with the `unique` that is noted in the slot then.

        Args:
            uniques: the `unique` of each request, with or without `FUSE_UNIQUE_RESEND`.

        Returns:
            Whether this thread is still the leader.
        """
        wanted = {unique & ~RESENT for unique in uniques}
        for request in self._lent():
            if request.unique & ~RESENT in wanted and request.slot not in self._pending.slots:
                self._pending.add(request)
        return self.do_waiting()

    def do_waiting(self) -> bool:
        """Do the waiting requests that can be done now; return whether this thread is still the leader."""
        while request := self._pending.take():
            self._resume(request)
            if not self._finish_request(request):
                return False
        return True

    def _finish_request(self, request: Request | None) -> bool:
        """Finish a request: close released descriptors; if another thread leads, do waiting requests, then leave.

        Args:
            request: the request of the calling thread, or None if `Pending` was not told of it.

        Returns:
            Whether this thread is still the leader.
        """
        pending, leadership = self._pending, self._leadership
        while True:
            if leadership.is_leader:
                pending.request = None
            elif request is not None:
                pending.finished(request)
            self._close()
            if leadership.is_leader:
                return True
            request = pending.take()
            if request is None:
                leadership.become_follower()
                return False
            self._resume(request)

    def _close(self) -> None:
        """Close released descriptors. The last close(2) of a large file that was removed takes long."""
        closing, leadership = self._descriptors.closing, self._leadership
        while closing and not (leadership.in_last_thread and leadership.is_leader):
            leadership.call(self._descriptors.close, closing.pop())

    def _invalidated(self, unique: int) -> bool:
        """Continue with the requests that waited until the kernel had dropped pages for the request *unique*.

        Returns:
            Whether this thread is still the leader.
        """
        held = self._invalidations.take(unique)
        if held is None:  # the invalidator was asked twice
            return True
        begun = self._slots.metrics.begun
        starts = [(request, begun[request.slot]) for request in held.followers]
        left = self._operations.continue_held(held)
        for request, start in starts:
            if self._slots.states[request.slot] != self._shard + 1:
                self._counters.finished(opcode_of(request), time.monotonic_ns() - start)
        if left is not None and left.slot not in self._pending.slots:
            self._pending.add(left)
        return self.do_waiting()

    def run(self) -> None:
        """Serve until all writers of the pipe are closed."""
        self._leadership.run(self._serve)

    def _serve(self, thread: int) -> bool:
        """Serve as the leader; return True at the end of the pipe, False if another thread has become the leader."""
        execute = self._operations.execute
        pipe = self._pipe
        read = os.read
        begun = self._slots.metrics.begun
        states, numbers, stages = self._slots.states, self._slots.numbers, self._slots.stages
        own = self._shard + 1
        clock = time.monotonic_ns
        finished = self._counters.finished
        pending, leadership, closing = self._pending, self._leadership, self._descriptors.closing
        invalidations = self._invalidations
        held = invalidations.held
        if not self.do_waiting():
            return False
        while True:
            if held and not leadership.wait(is_readable, pipe, invalidations.timeout()):
                invalidations.ask_again()
                continue
            message = leadership.wait(read, pipe, MAX_MESSAGE) if leadership.stalled else read(pipe, MAX_MESSAGE)
            if not message:
                while leadership.stalled:
                    leadership.wait(time.sleep, CHECK_INTERVAL)
                return True
            try:
                request = decode(message)
            except Malformed as error:
                _log.error("dropped a message that is not a request: %s", error)
                continue
            at_hand = None
            try:
                slot = request.slot
                if slot < 0:  # the message needs no answer
                    if request.operation == Operation.RESUME:
                        if not self._resume_all(request.extra):
                            return False
                    elif request.operation == Operation.INVALIDATED:
                        if not self._invalidated(*request.extra):
                            return False
                    else:
                        execute(request)
                elif leadership.stalled and pending.must_wait(request):
                    continue
                elif states[slot] != own or numbers[slot] != request.unique or stages[slot]:
                    if not self._resume_all((request.unique,)):  # a previous worker has received it
                        return False
                    continue
                else:
                    start = begun[slot]  # read now, because the slot is free after the answer
                    at_hand = pending.request = request
                    if execute(request) and request.operation != Operation.PROBE:  # the front counts that request
                        finished(opcode_of(request), clock() - start)
            except _INVALID_FIELDS as error:
                _log.error("dropped an invalid request: %s", error)
            if leadership.stalled or closing:
                if not self._finish_request(at_hand):
                    return False
            else:
                pending.request = None
