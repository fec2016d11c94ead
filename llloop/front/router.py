"""From inode to shard to pipe: how requests get from the front to the workers."""

from __future__ import annotations

import errno
import os
import select
from collections import deque
from typing import Any, NamedTuple

from llloop.front.inodes import mix
from llloop.front.open_files import Handle
from llloop.front.recovery.intents import NOWHERE
from llloop.front.request import FuseRequest
from llloop.linux.fuse import FUSE_UNIQUE_RESEND
from llloop.shared.leadership import Leadership
from llloop.shared.messages import MAX_MESSAGE, PIPED, Operation, Request, decode, decode_answer, encode
from llloop.shared.slots import Slots

# As many handles or requests as surely fit into one message, each taking at most nine bytes.
_NUMBERS_AT_ONCE = MAX_MESSAGE // 10

# Between looks for slots that have come free, of which nobody tells: at first, and at most; in milliseconds.
_FIRST_PAUSE = 1
_LONGEST_PAUSE = 50
# How many bytes of payload may be parked; who has more to write meanwhile is told that there is no memory.
_PARKED_MOST = 256 * 1024 * 1024


# What stands for a request that a worker has or is to get: its slot, -1 if it is parked, and when it was taken.
Entrusted = tuple[int, int]

# Of the slots with pipes, one in so many is kept free, so that what comes next is received into a pipe.
_KEPT_SHARE = 4
# Up to this length in bytes a request goes before larger ones that are parked.
_SMALL = 64 * 1024
# How many slots a worker may have before larger ones are parked.
_LARGE_AT_ONCE = 16


_SMALL_ONE, _LARGE_READ, _LARGE_OTHER = range(3)


def _kind_of(message: Request) -> int:
    if message.length <= _SMALL:
        return _SMALL_ONE
    return _LARGE_READ if message.operation == Operation.READ else _LARGE_OTHER


class _Parked(NamedTuple):
    """A request that could not be handed over yet.

    Attributes:
        message: what is to be done; its slot does not count.
        taken: when the kernel's request was taken.
        payload: if it is a WRITE, its payload, unless that is in
        spare: a pipe.
    """

    message: Request
    taken: int
    payload: bytes = b""
    spare: tuple[int, int] | None = None


class Router:
    """Lends slots to workers and tells them what to do; never waits for one.

    The router always leaves one slot free, in which the next request is received. If no further slot is free, or a
    pipe is full, `submit` declines. It also declines when a worker would hold more slots than are left for all
    others: a worker that hangs in a dead source, or is stopped, must not stop the rest. What is declined is parked
    until it can be handed over; the front never does it itself, for it would hang in the same place. Small requests are
    handed over before large ones, and a worker has few large ones at a time, so that nobody waits for all that another
    has to write.

    Args:
        arena: the shared memory.
        pipes: the write ends of the workers' request pipes, not blocking.
        leadership: which thread of the front serves.
    """

    def __init__(self, slots: Slots, pipes: list[int], leadership: Leadership | None = None) -> None:
        self.slots = slots
        self._leadership = leadership or Leadership()
        self._begun = slots.metrics.begun
        self._pipes = pipes
        self._shards = len(pipes)
        # Handles to be released, and requests to be resumed, of which a worker was not told, for its pipe was full.
        self._waiting: list[list[tuple[Operation, int]]] = [[] for _ in pipes]
        self._parked: list[deque[_Parked]] = [deque() for _ in pipes]
        self._parked_large: list[deque[_Parked]] = [deque() for _ in pipes]
        # Large READs wait for each other and not for large writes, which can all be held up in the source.
        self._parked_reads: list[deque[_Parked]] = [deque() for _ in pipes]
        self._kinds = bytearray(slots.count)
        self._piped_slots = 0 if slots.pipes is None else len(slots.pipes)
        self._parked_bytes = 0
        # The slots that fronts before this one have lent, by the requests' numbers.
        self._inherited: dict[int, int] = {}
        self._full = [False] * len(pipes)  # whether it was the pipe that had no room
        # As long as the lowest free slot is one of these, no worker can have too many; that is quickly seen.
        self._plenty = slots.count // 4
        self._pause = _FIRST_PAUSE
        # Whether releases or requests wait to be handed over: `wait` must be called before the next request is read.
        self.backlog = False
        # Whether it must be called even if nothing waits.
        self.attentive = False

    def shard_of(self, nodeid: int) -> int:
        """Return the worker for an inode's data I/O, evenly spread also over consecutive numbers."""
        return mix(nodeid) % self._shards

    def entrust(
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
    ) -> Entrusted:
        """Have the worker of a file answer a request; it gets the request now or, parked, as soon as that can be.

        Args:
            request: the kernel's request. If the worker gets it now, its slot becomes the worker's.
            handle: the open file, *number* its number.
            operation, offset, length, flags, uid, gid, extra: see `llloop.shared.messages.Request`.
            in_order: whether it may not overtake larger ones that are parked.

        Returns:
            What `is_unanswered` takes.

        Raises:
            OSError: ENOMEM, if too much is parked already.
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
        handle.lent = True
        if in_order and self._parked_large[shard]:
            self._park(request, shard, message, self._parked_large)
        elif self.submit(request, shard, message):
            request.entrusted = True
            return slot, request.taken
        else:
            self.park(request, shard, message)
        request.entrusted = True
        return -1, request.taken

    def submit(self, request: FuseRequest, shard: int, message: Request) -> bool:
        """Lend the slot of a request to a worker, and take another one for the next request.

        Returns:
            False if it could not be handed over and is to be parked.
        """
        if self._parked[shard] or (message.length > _SMALL and self._queue_of(message)[shard]):
            return False
        following = self._hand_over(request.taken, shard, message)
        if following < 0:
            return False
        request.slot = following
        return True

    def _hand_over(self, taken: int, shard: int, message: Request) -> int:
        """Lend the slot that a message names; return another one that is free, or -1 if it could not be lent."""
        if self._waiting[shard] and not self._flush(shard):
            return -1
        slots = self.slots
        slot = message.slot
        self._full[shard] = False
        if slot >= self._plenty and not self._may_lend(shard):
            return -1
        kind = _kind_of(message)
        if message.flags & PIPED:
            if not self._may_pipe(shard):
                return -1
        elif kind and slot >= _LARGE_AT_ONCE and not self._may_have_large(shard, kind):
            return -1
        packet = encode(tuple(message))
        self._begun[slot] = taken
        self._kinds[slot] = kind
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
        """Keep a message that `submit` has declined, to be handed over in `wait`; the slot is another's then.

        Raises:
            OSError: ENOMEM, if too much is kept already.
        """
        self._park(request, shard, message, self._queue_of(message))

    def _queue_of(self, message: Request) -> list[deque[_Parked]]:
        return (self._parked, self._parked_reads, self._parked_large)[_kind_of(message)]

    def _park(self, request: FuseRequest, shard: int, message: Request, parked: list[deque[_Parked]]) -> None:
        parked[shard].append(self._kept(request.taken, message))
        self.backlog = True

    def _kept(self, taken: int, message: Request) -> _Parked:
        if message.operation != Operation.WRITE:
            return _Parked(message, taken)
        slot, length, flags = message.slot, message.length, message.flags
        if flags & PIPED:
            assert self.slots.pipes is not None
            spare = self.slots.pipes.set_aside(slot, length)
            if spare is not None:
                return _Parked(message, taken, spare=spare)
        if self._parked_bytes + length > _PARKED_MOST:
            if flags & PIPED:
                self.slots.discard(slot)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        payload = self._take_payload(slot, length, flags)
        self._parked_bytes += length
        return _Parked(message._replace(flags=flags & ~PIPED), taken, payload)

    def _take_payload(self, slot: int, length: int, flags: int) -> bytes:
        slots = self.slots
        payload = slots.payload(slot, length)
        if flags & PIPED:
            assert slots.pipes is not None
            done = 0
            while done < length:
                done += slots.pipes.take(slot, payload[done:])
        return bytes(payload)

    def _deliver(self, shard: int) -> None:
        """Hand parked requests over as far as there is room."""
        slots = self.slots
        for parked in (self._parked[shard], self._parked_reads[shard], self._parked_large[shard]):
            while parked and self._may_lend(shard):
                message, taken, payload, spare = parked[0]
                slot = slots.free_slot()
                message = message._replace(slot=slot)
                if spare is not None:
                    if slot >= self._piped_slots or not self._may_pipe(shard):
                        return
                    assert slots.pipes is not None
                    slots.pipes.bring_back(slot, spare, message.length)
                else:
                    slots.payload(slot, len(payload))[:] = payload
                if self._hand_over(taken, shard, message) < 0:
                    if spare is not None:
                        parked[0] = self._kept(taken, message)
                    break
                self._parked_bytes -= len(payload)
                parked.popleft()
                self._pause = _FIRST_PAUSE

    def _may_lend(self, shard: int) -> bool:
        """Whether a worker may have one more slot: one is left then, and it has no more than all others can have."""
        states = bytes(self.slots.states)
        free = states.count(0)
        return free > 1 and states.count(shard + 1) <= free

    def _may_pipe(self, shard: int) -> bool:
        """Whether a worker may have one more slot with a pipe, of which the same holds."""
        states = bytes(self.slots.states[: self._piped_slots])
        free = states.count(0)
        return free > self._piped_slots // _KEPT_SHARE and states.count(shard + 1) <= free

    def _may_have_large(self, shard: int, kind: int) -> bool:
        states = bytes(self.slots.states)
        if states.count(shard + 1) < _LARGE_AT_ONCE:
            return True
        same = (other == kind and state == shard + 1 for state, other in zip(states, self._kinds, strict=True))
        return sum(same) < _LARGE_AT_ONCE

    def is_unanswered(self, request: Entrusted | None) -> bool:
        """Whether a worker still has a request that was entrusted to it, or it is still parked."""
        if request is None:
            return False
        slot, taken = request
        states, begun = self.slots.states, self._begun
        if slot >= 0:
            return states[slot] != 0 and begun[slot] == taken
        if any(state and begun[slot] == taken for slot, state in enumerate(states)):
            return True
        queues = (*self._parked, *self._parked_reads, *self._parked_large)
        return any(parked.taken == taken for queue in queues for parked in queue)

    def release(self, number: int, handle: Handle) -> None:
        """Tell the worker of *handle*, or all of them where it is shared, to let go of its descriptor."""
        for shard in range(self._shards) if handle.shared else (handle.shard,):
            self._waiting[shard].append((Operation.RELEASE, number))
            self._flush(shard)

    def take_over(self) -> None:
        """Find what fronts before this one have lent: it stays the workers'."""
        for slot, state in enumerate(bytes(self.slots.states)):
            if state:
                self._inherited[self.slots.numbers[slot] & ~FUSE_UNIQUE_RESEND] = slot

    def claim(self, unique: int) -> bool:
        """Have the worker that has a request answer it under the number under which it was sent again.

        Returns:
            False if no worker has it, so that it is to be served.
        """
        slot = self._inherited.get(unique & ~FUSE_UNIQUE_RESEND)
        if slot is None:
            return False
        slots = self.slots
        state = slots.states[slot]
        # A look at the source that was to be made before a request is served is not that request.
        if not state or decode(slots.message(slot)).operation == Operation.PROBE:
            return False
        slots.claim(slot, unique)
        self._remind(state - 1, unique)
        return True

    def settle(self) -> None:
        """Have the workers give back what was answered before: all that is sent again has come."""
        slots = self.slots
        slots.settle()
        for slot in self._inherited.values():
            state = slots.states[slot]
            if state and slots.claims[slot] != slots.generation:
                self._remind(state - 1, slots.numbers[slot])
        self._inherited.clear()

    def _remind(self, shard: int, unique: int) -> None:
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

    def wait(self, *sources: int, patience: int | None = None) -> set[int]:
        """Wait for something to read, and meanwhile hand over what waits as soon as there is room for it.

        Args:
            sources: the descriptors to read from; /dev/fuse is one.
            patience: for how many milliseconds at most; None for any time.

        Returns:
            Those that are readable, if it was that for which it had to wait.
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
            pause = patience
            for shard, waiting in enumerate(self._waiting):
                is_parked = self._parked[shard] or self._parked_reads[shard] or self._parked_large[shard]
                if waiting or (is_parked and self._full[shard]):
                    poll.register(self._pipes[shard], select.POLLOUT)
                elif is_parked:
                    pause = self._pause  # for slots, of which nobody tells when they are free
            ready = {fd for fd, _ in self._leadership.wait(poll.poll, pause)}
            if not ready:
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
                if patience is not None:
                    return set()


class Exchange:
    """Asks a worker and waits for its answer: what the front does where llfuse runs the loop.

    Args:
        router: lends the slot.
        answers: the read end of the pipe the workers answer through.

    Attributes:
        request: what stands for the request at hand, of which only the slot and when it was taken count.
        calls: how many times a worker has been asked.
    """

    def __init__(self, router: Router, answers: int) -> None:
        self._router = router
        self._answers = answers
        self.request = FuseRequest(router.slots.memory, NOWHERE)
        self.request.slot = router.slots.free_slot()
        self.calls = 0

    def call(
        self,
        handle: Handle,
        number: int,
        operation: Operation,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        uid: int = 0,
        gid: int = 0,
        payload: bytes = b"",
    ) -> tuple[int, memoryview]:
        """Have a worker do *operation* and return its count or offset, and the slot's payload.

        Raises:
            OSError: what the worker ran into.
        """
        router, request = self._router, self.request
        self.calls += 1
        slot = request.slot
        data = router.slots.payload(slot, router.slots.payload_size)
        data[: len(payload)] = payload
        message = Request(
            operation,
            self.calls,
            slot,
            number,
            handle.descriptor,
            offset,
            length,
            flags,
            uid,
            gid,
            (),
            handle.file,
            handle.nodeid,
        )
        handle.lent = True
        if not router.submit(request, handle.shard, message):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        while True:
            answer = decode_answer(os.read(self._answers, MAX_MESSAGE))
            if answer.unique == self.calls:  # anything else is a second answer after a worker's restart
                break
        if answer.result < 0:
            raise OSError(-answer.result, os.strerror(-answer.result))
        return answer.result, data
