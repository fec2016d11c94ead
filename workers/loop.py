"""A worker's life: take a message off the pipe, do what it says, again."""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Sequence

from llloop.linux.fuse import FUSE_UNIQUE_RESEND as RESENT
from llloop.linux.syscalls import is_readable
from llloop.shared.leadership import TICK, Leadership
from llloop.shared.messages import MAX_MESSAGE, Malformed, Operation, Request, decode, decode_strictly
from llloop.shared.metrics import Sheet
from llloop.shared.slots import Slots
from llloop.workers.descriptors import Descriptors
from llloop.workers.invalidations import Invalidations
from llloop.workers.operations import Operations, opcode_of
from llloop.workers.pending import Pending

_log = logging.getLogger(__name__)

# What comes of fields that are no numbers, or none that a request can have; looked for only here, off the hot path.
_SENSELESS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error)


class Worker:
    """One shard's worker.

    Args:
        shard: its number.
        arena: the shared memory.
        pipe: the read end of its request pipe.
        transfers: does the work.
        sheet: where the requests are counted.
        leases: the open files.
        leadership: which thread serves.
        invalidations: the requests that *transfers* holds until the kernel has dropped pages.
    """

    def __init__(
        self,
        shard: int,
        slots: Slots,
        pipe: int,
        operations: Operations,
        sheet: Sheet,
        descriptors: Descriptors,
        leadership: Leadership,
        invalidations: Invalidations,
    ) -> None:
        self._shard = shard
        self._slots = slots
        self._pipe = pipe
        self._operations = operations
        self._sheet = sheet
        self._descriptors = descriptors
        self._leadership = leadership
        self._pending = leadership.in_hand = Pending(descriptors, leadership)
        self._invalidations = invalidations

    def recover(self) -> None:
        """Have `run` begin with what a worker before this one had taken off the pipe, or may have, but not answered."""
        for request in self._lent():
            self._pending.add(request)

    def _lent(self) -> list[Request]:
        """Return the requests in the slots that are lent to this shard: the one that was begun, then the older first.

        Nothing else is done while one is begun: how far it had come shows in the state of its open file.
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
        """Do what a worker, or a front, before this one has left."""
        begun = self._slots.metrics.begun[request.slot]
        try:
            self._operations.resume(request)
        except _SENSELESS as error:
            _log.error("returned a slot with an invalid request: %s", error)
            self._slots.give_back(request.slot)
        if request.operation != Operation.PROBE and self._slots.states[request.slot] != self._shard + 1:
            self._sheet.finished(opcode_of(request), time.monotonic_ns() - begun)

    def _resume_all(self, uniques: Sequence[int]) -> bool:
        """Do those of the requests that are lent to this worker still, whatever a slot that they had holds now.

        Those that are under way in other threads are answered by these, under the number that holds then.

        Returns:
            Whether this thread still leads.
        """
        wanted = {unique & ~RESENT for unique in uniques}
        for request in self._lent():
            if request.unique & ~RESENT in wanted and request.slot not in self._pending.slots:
                self._pending.add(request)
        return self.catch_up()

    def catch_up(self) -> bool:
        """Do what waits, as far as it need not wait longer; return whether this thread still leads."""
        while request := self._pending.take():
            self._resume(request)
            if not self._go_on():
                return False
        return True

    def _go_on(self) -> bool:
        """After each request: close what it has left; if another thread leads, do what waits, and leave.

        Returns:
            Whether this thread still leads.
        """
        pending, leadership = self._pending, self._leadership
        while True:
            if leadership.leads:
                pending.request = None
            else:
                pending.finished()
            self._close()
            if leadership.leads:
                return True
            request = pending.take()
            if request is None:
                return not leadership.must_leave()
            self._resume(request)

    def _close(self) -> None:
        """Close what is not needed any more. For a large file that was removed, the last close(2) takes long."""
        closing, leadership = self._descriptors.closing, self._leadership
        while closing and not (leadership.alone and leadership.leads):
            leadership.call(self._descriptors.close, closing.pop())

    def _invalidated(self, unique: int) -> bool:
        """Go on with what was held until the kernel had dropped pages for the request *unique*.

        Returns:
            Whether this thread still leads.
        """
        held = self._invalidations.take(unique)
        if held is None:  # it was asked for twice
            return True
        begun = self._slots.metrics.begun
        starts = [(request, begun[request.slot]) for request in held.followers]
        left = self._operations.go_on(held)
        for request, start in starts:
            if self._slots.states[request.slot] != self._shard + 1:
                self._sheet.finished(opcode_of(request), time.monotonic_ns() - start)
        if left is not None and left.slot not in self._pending.slots:
            self._pending.add(left)
        return self.catch_up()

    def run(self) -> None:
        """Serve until the pipe's last writer is gone."""
        self._leadership.run(self._lead)

    def _lead(self) -> bool:
        """Serve until the pipe's last writer is gone, or another thread does it; return whether it is gone."""
        execute = self._operations.execute
        pipe = self._pipe
        read = os.read
        begun = self._slots.metrics.begun
        states, numbers, stages = self._slots.states, self._slots.numbers, self._slots.stages
        own = self._shard + 1
        clock = time.monotonic_ns
        finished = self._sheet.finished
        pending, leadership, closing = self._pending, self._leadership, self._descriptors.closing
        invalidations = self._invalidations
        held = invalidations.held
        if not self.catch_up():
            return False
        while True:
            if held and not leadership.wait(is_readable, pipe, invalidations.patience()):
                invalidations.ask_again()
                continue
            message = leadership.wait(read, pipe, MAX_MESSAGE) if leadership.stalled else read(pipe, MAX_MESSAGE)
            if not message:
                while leadership.stalled:
                    leadership.wait(time.sleep, TICK)
                return True
            try:
                request = decode(message)
            except Malformed as error:
                _log.error("dropped a message that is not a request: %s", error)
                continue
            try:
                slot = request.slot
                if slot < 0:  # nobody waits for it
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
                    if not self._resume_all((request.unique,)):  # a worker before this one has had it
                        return False
                    continue
                else:
                    start = begun[slot]  # with the answer the slot becomes somebody else's
                    pending.request = request
                    if execute(request) and request.operation != Operation.PROBE:  # the front counts what that was for
                        finished(opcode_of(request), clock() - start)
            except _SENSELESS as error:
                _log.error("dropped an invalid request: %s", error)
            if leadership.stalled or closing:
                if not self._go_on():
                    return False
            else:
                pending.request = None
