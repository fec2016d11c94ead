"""A worker's life: take a message off the pipe, do what it says, again."""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Sequence

from llloop.arena import Arena
from llloop.metrics import Sheet
from llloop.protocol import MAX_MESSAGE, Malformed, Operation, Request, decode, decode_strictly
from llloop.syscalls import is_readable
from llloop.wire import FUSE_UNIQUE_RESEND as RESENT

from .invalidations import Invalidations
from .transfers import Transfers, opcode_of

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
        invalidations: the requests that *transfers* holds until the kernel has dropped pages.
    """

    def __init__(
        self,
        shard: int,
        arena: Arena,
        pipe: int,
        transfers: Transfers,
        sheet: Sheet,
        invalidations: Invalidations,
    ) -> None:
        self._shard = shard
        self._arena = arena
        self._pipe = pipe
        self._transfers = transfers
        self._sheet = sheet
        self._invalidations = invalidations

    def recover(self) -> None:
        """Do what a worker before this one had taken off the pipe, or may have, but not answered."""
        for request in self._lent():
            self._resume(request)

    def _lent(self) -> list[Request]:
        """Return the requests in the slots that are lent to this shard: the one that was begun, then the older first.

        Nothing else is done while one is begun: how far it had come shows in the state of its open file.
        """
        arena = self._arena
        requests = []
        for slot, message in arena.lent_to(self._shard):
            try:
                request = decode_strictly(message)
                if request.slot != slot or request.operation == Operation.RELEASE:
                    raise Malformed("no such request is lent a slot")
                requests.append(request)
            except Malformed as error:
                _log.error("a lent slot holds no request: %s", error)
                arena.give_back(slot)
        return sorted(requests, key=lambda request: (not arena.stages[request.slot], request.unique & ~RESENT))

    def _resume(self, request: Request) -> None:
        """Do what a worker, or a front, before this one has left."""
        begun = self._arena.metrics.begun[request.slot]
        try:
            self._transfers.resume(request)
        except _SENSELESS as error:
            _log.error("a lent slot's request makes no sense: %s", error)
            self._arena.give_back(request.slot)
        if request.operation != Operation.PROBE and self._arena.states[request.slot] != self._shard + 1:
            self._sheet.finished(opcode_of(request), time.monotonic_ns() - begun)

    def _resume_all(self, uniques: Sequence[int]) -> None:
        """Do those of the requests that are lent to this worker still, whatever a slot that they had holds now."""
        wanted = {unique & ~RESENT for unique in uniques}
        for request in self._lent():
            if request.unique & ~RESENT in wanted:
                self._resume(request)

    def _go_on(self, unique: int) -> None:
        """Go on with what was held until the kernel had dropped pages for the request *unique*."""
        held = self._invalidations.take(unique)
        if held is None:  # it was asked for twice
            return
        begun = self._arena.metrics.begun
        starts = [(request, begun[request.slot]) for request in self._transfers.waiting_in(held)]
        self._transfers.go_on(held)
        for request, start in starts:
            if self._arena.states[request.slot] != self._shard + 1:
                self._sheet.finished(opcode_of(request), time.monotonic_ns() - start)

    def run(self) -> None:
        """Serve until the pipe's last writer is gone."""
        execute = self._transfers.execute
        pipe = self._pipe
        read = os.read
        begun = self._arena.metrics.begun
        states, numbers, stages = self._arena.states, self._arena.numbers, self._arena.stages
        own = self._shard + 1
        clock = time.monotonic_ns
        finished = self._sheet.finished
        invalidations = self._invalidations
        held = invalidations.held
        while True:
            if held and not is_readable(pipe, invalidations.patience()):
                invalidations.ask_again()
                continue
            message = read(pipe, MAX_MESSAGE)
            if not message:
                return
            try:
                request = decode(message)
            except Malformed as error:
                _log.error("a message that is no request was dropped: %s", error)
                continue
            try:
                slot = request.slot
                if slot < 0:  # nobody waits for it
                    if request.operation == Operation.RESUME:
                        self._resume_all(request.extra)
                    elif request.operation == Operation.INVALIDATED:
                        self._go_on(*request.extra)
                    else:
                        execute(request)
                    continue
                if states[slot] != own or numbers[slot] != request.unique or stages[slot]:
                    self._resume_all((request.unique,))  # a worker before this one has had it
                    continue
                start = begun[slot]  # with the answer the slot becomes somebody else's
                done = execute(request)
                if not done or request.operation == Operation.PROBE:  # the front counts what a PROBE was for
                    continue
                finished(opcode_of(request), clock() - start)
            except _SENSELESS as error:
                _log.error("a message that makes no sense was dropped: %s", error)
