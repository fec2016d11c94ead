"""Sending requests from the front to the workers: shards, slots, pipes and parked requests."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from typing import Any, NamedTuple

from llloop.front.fair_queue import FairQueue, ParkedRequest
from llloop.front.inodes import mix
from llloop.front.open_files import Handle
from llloop.front.request import FuseRequest
from llloop.linux import fuse
from llloop.linux.fuse import FUSE_UNIQUE_RESEND
from llloop.linux.syscalls import is_writable
from llloop.shared.leadership import Leadership
from llloop.shared.messages import MAX_MESSAGE, PIPED, Operation, Request, decode, encode
from llloop.shared.slots import Slots

# The number of handles or requests in one message. Each takes nine bytes at most.
_NUMBERS_AT_ONCE = MAX_MESSAGE // 10

# The first and the longest interval of checks for free slots, in milliseconds. No event announces a free slot.
_FIRST_PAUSE = 1
_LONGEST_PAUSE = 50
# How many bytes of payload may be parked. Further writes get ENOMEM.
MAX_PARKED = 256 * 1024 * 1024


# Identifies a request that was given to a worker or is parked: its slot (-1 if parked), and the time of its reception.
Dispatched = tuple[int, int]

# This fraction (1/4) of the slots with pipes is kept free, so that the next request is received into a pipe.
_KEPT_SHARE = 4
# A request up to this length in bytes is small: it overtakes larger ones that are parked.
_SMALL = 64 * 1024
# If a worker has so many slots, further large requests of the same kind are parked.
LARGE_AT_ONCE = 16
# A worker with fewer requests than this gets parked payloads also without a pipe. Other workers may have all pipes.
_BUSY = 4


_SMALL_ONE, _LARGE_READ, _LARGE_OTHER = range(3)


def _kind_of(message: Request) -> int:
    if message.length <= _SMALL:
        return _SMALL_ONE
    return _LARGE_READ if message.operation == Operation.READ else _LARGE_OTHER


class Served(NamedTuple):
    """A request that a worker or another thread of the front serves.

    Attributes:
        unique: its `unique`.
        caller: the id of the calling thread, 0 if it is outside of the server's PID namespace.
        shard: the worker, -1 for a thread of the front.
        message: the message to the worker; None if a thread of the front serves it.
        base: the offset of its header in the memory of the slots. If a worker serves it, only `unique` and the calling
            thread are valid there.
    """

    unique: int
    caller: int
    shard: int
    message: Request | None
    base: int


class Router:
    """Lends slots to workers and sends them messages; never waits for a worker.

    The router always keeps one slot free, for the next request. If no other slot is free, or a pipe is full, `submit`
    declines a request. It also declines if a worker would have more slots than are free for all others: a worker that
    hangs or is stopped must not block the others. A declined request is parked until it can be sent. The front never
    does it itself, because it might hang as the worker does. Small requests are sent before large ones, and a worker
    has few large ones at a time, so that no process waits for all the writes of another.

    Args:
        slots: the request slots in shared memory.
        pipes: the non-blocking write ends of the workers' request pipes.
        leadership: decides which thread serves.
    """

    def __init__(self, slots: Slots, pipes: list[int], leadership: Leadership | None = None) -> None:
        self.slots = slots
        self._leadership = leadership or Leadership()
        self._begun = slots.metrics.begun
        self._pipes = pipes
        self._shards = len(pipes)
        # RELEASE and RESUME messages that could not be sent yet, because the worker's pipe was full.
        self._waiting: list[list[tuple[Operation, int]]] = [[] for _ in pipes]
        self._parked = [FairQueue() for _ in pipes]
        self._parked_large = [FairQueue() for _ in pipes]
        # Large READs have their own queue, because large writes can all be blocked in the source.
        self._parked_reads = [FairQueue() for _ in pipes]
        self._kinds = bytearray(slots.count)
        self._piped_slots = 0 if slots.pipes is None else len(slots.pipes)
        self._parked_bytes = 0
        # The slots that previous fronts have lent, by the `unique` of their requests.
        self._inherited: dict[int, int] = {}
        self._full = [False] * len(pipes)  # whether the last request was declined because the pipe was full
        # While the lowest free slot is below this one, no worker can have too many. So a fast check suffices.
        self._plenty = slots.count // 4
        self._pause = _FIRST_PAUSE
        # Whether messages or requests wait: then `wait` must be called before the next request is read.
        self.backlog = False
        # Whether `wait` must be called even if nothing waits.
        self.attentive = False

    def shard_of(self, nodeid: int) -> int:
        """Return the shard of an inode. Consecutive nodeids are distributed evenly."""
        return mix(nodeid) % self._shards

    def dispatch(
        self,
        request: FuseRequest,
        handle: Handle,
        number: int,
        operation: Operation,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        uid: int = 0,
        gid: int = 0,
        extra: tuple[Any, ...] = (),
        *,
        in_order: bool = False,
    ) -> Dispatched:
        """Give a request to the worker of a file, which answers it; park it if that is not possible now.

        Args:
            request: the kernel's request. If the worker gets it now, its slot is lent to the worker.
            handle: the open file.
            number: the file handle.
            operation, offset, length, flags, uid, gid, extra: see `llloop.shared.messages.Request`.
            in_order: whether it must not overtake larger ones that are parked.

        Returns:
            The argument for `is_unanswered`.

        Raises:
            OSError: ENOMEM, if too much payload is parked.
        """
        shard = handle.shard
        slot = request.slot
        message = Request(
            operation,
            request.unique,
            slot,
            number,
            handle.descriptor,
            offset,
            length,
            flags,
            uid,
            gid,
            extra,
            handle.file,
            handle.nodeid,
        )
        handle.in_worker = True
        if in_order and self._parked_large[shard]:
            self._park(request, shard, message, self._parked_large)
        elif self.submit(request, shard, message):
            request.dispatched = True
            return slot, request.taken
        else:
            self.park(request, shard, message)
        request.dispatched = True
        return -1, request.taken

    def submit(self, request: FuseRequest, shard: int, message: Request) -> bool:
        """Lend the slot of a request to a worker, and set `request.slot` to a free one for the next request.

        Returns:
            False if the request was declined and must be parked.
        """
        if self._parked[shard] or (message.length > _SMALL and self._queue_of(message)[shard]):
            return False
        following = self._hand_over(request.taken, shard, message)
        if following < 0:
            return False
        request.slot = following
        return True

    def _hand_over(self, taken: int, shard: int, message: Request) -> int:
        """Lend the slot of a message and send it; return another free slot, or -1 if this was declined."""
        self._full[shard] = False
        return self._send(taken, shard, message) if self._has_room(shard, message) else -1

    def _has_room(self, shard: int, message: Request) -> bool:
        """Return whether a worker may have the slot of a message. Its pipe may be full all the same."""
        if self._waiting[shard] and not self._flush(shard):
            return False
        slot = message.slot
        if slot >= self._plenty and not self._may_lend(shard):
            return False
        if message.flags & PIPED:
            return self._may_lend_piped(shard)
        kind = _kind_of(message)
        return not kind or slot < LARGE_AT_ONCE or self._may_have_large(shard, kind)

    def _send(self, taken: int, shard: int, message: Request) -> int:
        """Lend the slot of a message and send it; return another free slot, or -1 if the pipe is full."""
        slots = self.slots
        slot = message.slot
        packet = encode(tuple(message))
        self._begun[slot] = taken
        self._kinds[slot] = _kind_of(message)
        slots.lend(slot, shard, packet, message.unique)
        following = slots.free_slot()
        if following >= 0:
            try:
                os.write(self._pipes[shard], packet)
            except BlockingIOError:
                self._full[shard] = True
            else:
                return following
        slots.give_back(slot)
        return -1

    def park(self, request: FuseRequest, shard: int, message: Request) -> None:
        """Park a request that `submit` has declined; `wait` sends it. Its slot is free for other requests then.

        Raises:
            OSError: ENOMEM, if too much payload is parked.
        """
        self._park(request, shard, message, self._queue_of(message))

    def _queue_of(self, message: Request) -> list[FairQueue]:
        return (self._parked, self._parked_reads, self._parked_large)[_kind_of(message)]

    def _park(self, request: FuseRequest, shard: int, message: Request, parked: list[FairQueue]) -> None:
        # The caller of a write from the page cache is the kernel.
        uid = message.uid if message.operation == Operation.WRITE else request.caller().uid
        parked[shard].append(uid, self._parked_request(request.taken, request.pid(), message))
        self.backlog = True

    def _parked_request(self, taken: int, caller: int, message: Request) -> ParkedRequest:
        if message.operation != Operation.WRITE:
            return ParkedRequest(message, taken, caller)
        slot, length, flags = message.slot, message.length, message.flags
        if flags & PIPED:
            assert self.slots.pipes is not None
            spare = self.slots.pipes.set_aside(slot, length)
            if spare is not None:
                return ParkedRequest(message, taken, caller, spare=spare)
        if self._parked_bytes + length > MAX_PARKED:
            if flags & PIPED:
                self.slots.discard(slot)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return self._copy_payload(taken, caller, message)

    def _copy_payload(self, taken: int, caller: int, message: Request) -> ParkedRequest:
        slots = self.slots
        slot, length, flags = message.slot, message.length, message.flags
        payload = slots.payload(slot, length)
        if flags & PIPED:
            assert slots.pipes is not None
            slots.pipes.take_all(slot, payload)
        self._parked_bytes += length
        return ParkedRequest(message._replace(flags=flags & ~PIPED), taken, caller, bytes(payload))

    def _deliver(self, shard: int) -> None:
        """Send parked requests to a worker as far as possible."""
        if self._full[shard] and not is_writable(self._pipes[shard]):
            return
        self._full[shard] = False
        slots = self.slots
        for parked in (self._parked[shard], self._parked_reads[shard], self._parked_large[shard]):
            while parked and self._may_lend(shard):
                message, taken, caller, payload, spare = parked.first
                slot = slots.free_slot()
                message = message._replace(slot=slot)
                if spare is not None and not (slot < self._piped_slots and self._may_lend_piped(shard)):
                    if bytes(slots.states).count(shard + 1) >= _BUSY:
                        return  # a pipe will be free soon, and saves the copy
                    message = message._replace(flags=message.flags & ~PIPED)
                if not self._has_room(shard, message):  # before megabytes are copied
                    break
                if spare is None:
                    slots.payload(slot, len(payload))[:] = payload
                else:
                    assert slots.pipes is not None
                    if message.flags & PIPED:
                        slots.pipes.bring_back(slot, spare, message.length)
                    else:
                        slots.pipes.copy_back(slots.payload(slot, message.length), spare)
                fuse.UNIQUE_AND_PID.pack_into(slots.memory, slots.request_offset(slot), message.unique, caller)
                if self._send(taken, shard, message) < 0:
                    if spare is not None:
                        parked.first = self._copy_payload(taken, caller, message)
                    return
                self._parked_bytes -= len(payload)
                parked.remove_first()
                self._pause = _FIRST_PAUSE

    def _may_lend(self, shard: int) -> bool:
        """Return whether a worker may have another slot: one must stay free, and the worker must not have too many."""
        states = bytes(self.slots.states)
        free = states.count(0)
        return free > 1 and states.count(shard + 1) <= free

    def _may_lend_piped(self, shard: int) -> bool:
        """Return whether a worker may have another slot with a pipe; similar conditions as for `_may_lend`."""
        states = bytes(self.slots.states[: self._piped_slots])
        free = states.count(0)
        return free > self._piped_slots // _KEPT_SHARE and states.count(shard + 1) <= free

    def _may_have_large(self, shard: int, kind: int) -> bool:
        states = bytes(self.slots.states)
        if states.count(shard + 1) < LARGE_AT_ONCE:
            return True
        same = (other == kind and state == shard + 1 for state, other in zip(states, self._kinds, strict=True))
        return sum(same) < LARGE_AT_ONCE

    def is_unanswered(self, request: Dispatched | None) -> bool:
        """Return whether a request that was given to a worker is unanswered or still parked."""
        if request is None:
            return False
        slot, taken = request
        states, begun = self.slots.states, self._begun
        if slot >= 0:
            return states[slot] != 0 and begun[slot] == taken
        if any(state and begun[slot] == taken for slot, state in enumerate(states)):
            return True
        return any(parked.taken == taken for queue in self._queues() for parked in queue)

    def _queues(self) -> tuple[FairQueue, ...]:
        return (*self._parked, *self._parked_reads, *self._parked_large)

    def caller_of_parked(self, unique: int) -> int | None:
        """Return the id of the calling thread of a parked request; None if it is not parked."""
        return next((one.caller for queue in self._queues() for one in queue if one.message.unique == unique), None)

    def unpark(self, unique: int) -> None:
        """Forget a request if it is parked, because it is answered."""
        for queue in self._queues():
            for parked in queue:
                if parked.message.unique == unique:
                    queue.remove(parked)
                    self._parked_bytes -= len(parked.payload)
                    if parked.spare is not None:
                        assert self.slots.pipes is not None
                        self.slots.pipes.discard(parked.spare)
                    return

    def find(self, unique: int) -> Served | None:
        """Return the request with that `unique`, sent again or not, if a worker or another thread serves it."""
        return next((one for one in self._served() if not (one.unique ^ unique) & ~FUSE_UNIQUE_RESEND), None)

    def inherited(self) -> list[Served]:
        """Return the requests that workers have from previous fronts. Call it before any request is served."""
        return [one for one in self._served() if one.message is not None]

    def _served(self) -> Iterator[Served]:
        """Yield the requests that occupy slots. A PROBE is not the request that it is for."""
        slots = self.slots
        for slot, state in enumerate(bytes(slots.states)):
            if not state:
                continue
            base = slots.request_offset(slot)
            unique, caller = fuse.UNIQUE_AND_PID.unpack_from(slots.memory, base)
            if not slots.is_lent(slot):
                yield Served(unique, caller, -1, None, base)
                continue
            message = decode(slots.message(slot))
            if message.operation != Operation.PROBE:
                yield Served(slots.numbers[slot], caller, state - 1, message, base)

    def is_done(self, served: Served) -> bool:
        """Return whether a worker has changed what a request changes.

        Its slot stays lent until the kernel has dropped pages of the file. For that, the kernel may need the answer to
        another request on the file.
        """
        return served.message is not None and self.slots.is_done(served.message.slot)

    def release_again(self, shard: int, number: int) -> None:
        """Make a worker close its descriptor of a file that may have been released already."""
        self._waiting[shard].append((Operation.RELEASE, number))
        self._flush(shard)

    def release(self, number: int, handle: Handle) -> None:
        """Make the worker of *handle*, or all workers if it is shared, close its descriptor."""
        for shard in range(self._shards) if handle.in_all_workers else (handle.shard,):
            self._waiting[shard].append((Operation.RELEASE, number))
            self._flush(shard)

    def take_over(self) -> None:
        """Find the slots that previous fronts have lent, which stay lent."""
        for slot, state in enumerate(bytes(self.slots.states)):
            if state:
                self._inherited[self.slots.numbers[slot] & ~FUSE_UNIQUE_RESEND] = slot

    def claim(self, unique: int) -> bool:
        """Make the worker that has a request answer it with the `unique` with which the kernel has sent it again.

        Returns:
            False if no worker has it, so that the front must serve it.
        """
        slot = self._inherited.get(unique & ~FUSE_UNIQUE_RESEND)
        if slot is None:
            return False
        slots = self.slots
        state = slots.states[slot]
        # A PROBE before a request is not the request itself.
        if not state or decode(slots.message(slot)).operation == Operation.PROBE:
            return False
        slots.claim(slot, unique)
        self._send_resume(state - 1, unique)
        return True

    def finish_takeover(self) -> None:
        """Note that all requests sent again were received; make workers give back slots that were answered before."""
        slots = self.slots
        slots.note_resent_received()
        for slot in self._inherited.values():
            state = slots.states[slot]
            if state and slots.claims[slot] != slots.generation:
                self._send_resume(state - 1, slots.numbers[slot])
        self._inherited.clear()

    def _send_resume(self, shard: int, unique: int) -> None:
        self._waiting[shard].append((Operation.RESUME, unique))
        self._flush(shard)

    def _flush(self, shard: int) -> bool:
        waiting = self._waiting[shard]
        try:
            while waiting:
                operation, _ = waiting[0]
                batch = [number for kind, number in waiting[:_NUMBERS_AT_ONCE] if kind == operation]
                rest = [one for one in waiting[:_NUMBERS_AT_ONCE] if one[0] != operation]
                os.write(self._pipes[shard], encode((operation, 0, -1, -1, -1, 0, 0, 0, 0, 0, batch)))
                waiting[:_NUMBERS_AT_ONCE] = rest
        except BlockingIOError:
            self.backlog = True
            return False
        return True

    def wait(self, *sources: int, timeout: int | None = None) -> set[int]:
        """Wait until a descriptor is readable; meanwhile send waiting messages and parked requests.

        Args:
            sources: the descriptors to read from, including /dev/fuse.
            timeout: the maximum wait in milliseconds, None for no limit.

        Returns:
            The readable descriptors; empty on timeout, or if nothing waits any more.
        """
        ready: set[int] = set()
        while True:
            for shard, waiting in enumerate(self._waiting):
                if waiting and self._pipes[shard] in ready:
                    self._flush(shard)
                self._deliver(shard)
            parked = any(self._parked) or any(self._parked_reads) or any(self._parked_large)
            self.backlog = any(self._waiting) or parked or self.attentive
            readable = ready.intersection(sources)
            if not self.backlog or readable:
                return readable
            poll = select.poll()
            for source in sources:
                poll.register(source, select.POLLIN)
            pause = timeout
            for shard, waiting in enumerate(self._waiting):
                is_parked = self._parked[shard] or self._parked_reads[shard] or self._parked_large[shard]
                if waiting or (is_parked and self._full[shard]):
                    poll.register(self._pipes[shard], select.POLLOUT)
                elif is_parked:
                    pause = self._pause  # no event announces free slots
            ready = {fd for fd, _ in self._leadership.wait(poll.poll, pause)}
            if not ready:
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
                if timeout is not None:
                    return set()
