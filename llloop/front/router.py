"""From inode to shard to pipe: how requests get from the front to the workers."""

from __future__ import annotations

import errno
import os
import select

from ..arena import Arena
from ..protocol import MAX_MESSAGE, Operation, decode_answer, encode
from .handles import Handle
from .inodes import mix

# As many handles as surely fit into one message, each taking at most nine bytes.
_RELEASES_AT_ONCE = MAX_MESSAGE // 10


class Router:
    """Lends slots to workers and tells them what to do; never waits for one.

    The router always keeps one free slot, `slot`, in which the next request is received. If no
    further slot is free, or a pipe is full, `submit` declines and the caller does the work itself.

    Args:
        arena: the shared memory.
        pipes: the write ends of the workers' request pipes, not blocking.
    """

    def __init__(self, arena: Arena, pipes: list[int]) -> None:
        self.arena = arena
        self._begun = arena.metrics.begun
        self._pipes = pipes
        self._shards = len(pipes)
        # Handles whose release did not fit into a pipe; nothing may overtake them.
        self._waiting: list[list[int]] = [[] for _ in pipes]
        self.slot = arena.free_slot()
        # Whether releases wait for room in a pipe: `wait` must be called before the next request is read.
        self.backlog = False
        # Whether the payload of the request at hand is in the pipe of `slot`.
        self.piped = False
        # When the request in `slot` was taken (monotonic clock, nanoseconds), for who counts how long it took.
        self.taken = 0

    def shard_of(self, nodeid: int) -> int:
        """Return the worker for an inode's data I/O, evenly spread also over consecutive numbers."""
        return mix(nodeid) % self._shards

    def submit(
        self,
        handle: Handle,
        number: int,
        operation: Operation,
        unique: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        uid: int = 0,
        gid: int = 0,
        extra: tuple[int, ...] = (),
    ) -> bool:
        """Lend the request in `slot` to the worker of *handle* and take another slot for the next one.

        Args:
            handle: the open file, *number* its number.
            operation, unique, offset, length, flags, uid, gid, extra: see `llloop.protocol.Request`.

        Returns:
            False if the request could not be handed over and is the caller's to do.
        """
        shard = handle.shard
        if self._waiting[shard] and not self._flush(shard):
            return False
        arena = self.arena
        slot = self.slot
        message = encode((operation, unique, slot, number, handle.descriptor, offset, length, flags, uid, gid, extra))
        self._begun[slot] = self.taken
        arena.lend(slot, shard, message)
        following = arena.free_slot()
        if following >= 0:
            try:
                os.write(self._pipes[shard], message)
            except BlockingIOError:
                pass
            else:
                self.slot = following
                handle.lent = True
                return True
        arena.give_back(slot)
        return False

    def release(self, number: int, handle: Handle) -> None:
        """Tell the worker of *handle*, or all of them where it is shared, to let go of its descriptor."""
        for shard in range(self._shards) if handle.shared else (handle.shard,):
            self._waiting[shard].append(number)
            self._flush(shard)

    def _flush(self, shard: int) -> bool:
        waiting = self._waiting[shard]
        try:
            while waiting:
                batch = waiting[:_RELEASES_AT_ONCE]
                os.write(self._pipes[shard], encode((Operation.RELEASE, 0, -1, -1, -1, 0, 0, 0, 0, 0, batch)))
                del waiting[: len(batch)]
        except BlockingIOError:
            self.backlog = True
            return False
        return True

    def wait(self, device: int) -> None:
        """Wait for a request on *device*, and meanwhile deliver releases as soon as there is room for them."""
        ready: set[int] = set()
        while self.backlog and device not in ready:
            poll = select.poll()
            poll.register(device, select.POLLIN)
            for shard, waiting in enumerate(self._waiting):
                if waiting:
                    poll.register(self._pipes[shard], select.POLLOUT)
            ready = {fd for fd, _ in poll.poll()}
            for shard in range(self._shards):
                if self._pipes[shard] in ready:
                    self._flush(shard)
            self.backlog = any(self._waiting)


class Exchange:
    """Asks a worker and waits for its answer: what the front does where llfuse runs the loop.

    Args:
        router: lends the slot.
        answers: the read end of the pipe the workers answer through.

    Attributes:
        calls: how many times a worker has been asked.
    """

    def __init__(self, router: Router, answers: int) -> None:
        self._router = router
        self._answers = answers
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
        router = self._router
        self.calls += 1
        slot = router.slot
        data = router.arena.payload(slot, router.arena.payload_size)
        data[: len(payload)] = payload
        if not router.submit(handle, number, operation, self.calls, offset, length, flags, uid, gid):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        while True:
            answer = decode_answer(os.read(self._answers, MAX_MESSAGE))
            if answer.unique == self.calls:  # anything else is a second answer after a worker's restart
                break
        if answer.result < 0:
            raise OSError(-answer.result, os.strerror(-answer.result))
        return answer.result, data
