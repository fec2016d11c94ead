"""The shared memory between supervisor, front and workers: slots for requests, and who the front is.

A *slot* is where one request lies from the moment the front reads it off /dev/fuse: its header
and payload, so that a WRITE reaches its worker without being copied. Lending a slot to a worker
also keeps the message that was sent about it, so that a request lives on when its worker dies.

Each process may die at any moment. That a request is done once, and never after newer ones, rests on these rules:

* A slot goes through these states, each entered by one store: *lent* to a shard by the front; *begun* and *done* by
  the worker (`stages`, `results`; done is noted before the answer is sent); *given back* by the worker.
* From lent to given back, only the worker of that shard does the request, even if the kernel sends it again. A worker's
  successor is started when the dead one has ended, so there is never more than one.
* The worker gives a slot back when the kernel has taken the answer, and not before. Whatever is still in a pipe about
  it then is recognised by the request's number, which the kernel does not use twice, and dropped.
* When a front has died, the kernel sends again what has no answer, under a number with one more bit, and takes
  no answer under the old number any more. The next front looks for a slot in which that request is lent. If there is
  one, it *claims* it: it notes the new number (`numbers`), then that it has done so (`claims`), and reminds the worker,
  which answers under the new number. The request is not served anew.
* An answer that the kernel does not take was either given before (by a worker that died before it gave the slot back),
  or the request is being sent again. `settled` tells: as soon as the present front has noted that all that is sent
  again has come, a slot that it has not claimed was answered before.

The memory is one anonymous shared ``mmap``, made before the first fork. No mutex guards it:
each byte has one writer at a time. The front marks a slot as lent (last, when all else is in
place), the borrower marks it as free (last, when the answer is written).

The kernel copies requests only into pages that are in the front's page table already. A process that is killed while
it reads a request gets no new pages any more, and the kernel then answers that request with EIO by itself
(fs/fuse/dev.c, fuse_dev_do_read()) instead of keeping it for the next front. So each front first touches one page of
payload in each slot, and the *landing area*, which takes what is longer. From there it is copied into its slot once;
that much of the slot is touched then, and the next request is received in it directly.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
from contextlib import suppress
from struct import Struct

from llloop.linux import fuse, syscalls
from llloop.linux.fuse import Opcode
from llloop.linux.pidfds import start_time
from llloop.shared.metrics import Metrics
from llloop.shared.pipes import PayloadPipes

# Shard numbers must fit the state byte, in which 0 means free and the highest number that the front has it.
MAX_SHARDS = 253
_HELD = 255

# Every request handed to a worker holds a slot until it is answered, so this bounds how many
# can be under way; beyond it requests are parked in the front. Memory is used only when touched.
DEFAULT_SLOTS = 256

_LENGTH = Struct("=H")
_MADV_POPULATE_WRITE = 23  # <asm-generic/mman-common.h>
_FREE = b"\0"


class Slots:
    """The shared memory.

    Args:
        count: how many requests can be lent at a time.
        payload: the largest WRITE payload in bytes (INIT's max_write).
        shards: how many workers there are.
    """

    def __init__(self, count: int, payload: int, shards: int) -> None:
        self.count = count
        self.payload_size = payload
        pages = fuse.PAGE_SIZE
        # states, stages: a byte per slot; results, written, numbers, claims, touched: eight
        results = (2 * count + 7) & ~7
        written, numbers, claims, touched, front = (results + 8 * count * place for place in range(1, 6))
        self._landing = (front + 32 + pages - 1) // pages * pages
        first = self._landing + payload
        # The payload is page-aligned, which O_DIRECT needs; the record lies in the page before it, ahead of the header.
        self._stride = pages + payload
        self._records = first
        self._requests = first + pages - fuse.WRITE_HEADER_SIZE
        self.memory = mmap.mmap(-1, first + count * self._stride)
        self.view = memoryview(self.memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.states = self.view[:count]
        self.stages = self.view[count : 2 * count]
        self.results = self.view[results:written].cast("q")
        self.written = self.view[written:numbers].cast("q")
        # Under which number the kernel waits for the answer, and which front has noted that last, as a `generation`.
        self.numbers = self.view[numbers:claims].cast("Q")
        self.claims = self.view[claims:touched].cast("Q")
        # How many bytes of each slot's payload the front receives in place; what lies behind them lands elsewhere.
        self.touched = self.view[touched:front].cast("Q")
        self.metrics = Metrics(shards, count)
        self._front = self.view[front : front + 32].cast("q")
        self.receive_buffers: list[list[memoryview]] = []
        self._receive_by_landing()
        self.pipes: PayloadPipes | None = None

    def open_pipes(self) -> PayloadPipes:
        """Give slots pipes for large payloads, before the first fork."""
        self.pipes = PayloadPipes(self.count, self.payload_size)
        return self.pipes

    def discard(self, slot: int) -> None:
        """Throw away what the pipe of *slot* still holds."""
        if self.pipes is None or slot >= len(self.pipes):
            return
        while left := self.pipes.left(slot):
            self.pipes.take(slot, self.payload(slot, min(left, self.payload_size)))

    @property
    def front_pid(self) -> int:
        """The process id of the front, from which workers pull descriptors; 0 while there is none."""
        return self._front[0]

    @property
    def generation(self) -> int:
        """How many fronts have taken over; each has to be asked afresh for descriptors."""
        return self._front[1]

    @property
    def settled(self) -> bool:
        """Whether all that the kernel sends again has come to the present front."""
        return self._front[3] == self._front[1]

    def settle(self) -> None:
        """Note that all that the kernel sends again has come."""
        self._front[3] = self._front[1]

    @property
    def front_started(self) -> int:
        """When the front was started, as `pidfds.start_time` says it."""
        return self._front[2]

    def no_front(self) -> None:
        """Note that the front is gone."""
        self._front[0] = 0

    def new_front(self, pid: int) -> None:
        """Note that process *pid* is the front from now on."""
        self._front[2] = start_time(pid)
        self._front[0] = pid
        self._front[1] += 1
        for slot, state in enumerate(bytes(self.states)):
            if state == _HELD:
                self.states[slot] = 0

    def lock(self) -> None:
        """Keep in memory what this process touches of it, as much as it may lock (mlock2(2), RLIMIT_MEMLOCK).

        What is swapped out is not in the page table any more.
        """
        allowed, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        size = len(self.memory)
        for length in (size, min(size, allowed // fuse.PAGE_SIZE * fuse.PAGE_SIZE)):
            try:
                syscalls.lock_on_fault(self.address, length)
            except OSError:
                continue
            return

    def touch(self) -> None:
        """Enter all that requests are received in into this process's page table (madvise(2), Linux 5.14)."""
        page = fuse.PAGE_SIZE
        with suppress(OSError):
            self.memory.madvise(_MADV_POPULATE_WRITE, self._landing, self.payload_size)
            for slot in range(self.count):
                self.memory.madvise(_MADV_POPULATE_WRITE, self._records + slot * self._stride, 2 * page)
        self._receive_by_landing()

    def _receive_by_landing(self) -> None:
        """Have all but the first page of each payload received in the landing area."""
        page = fuse.PAGE_SIZE
        self.receive_buffers[:] = [self._buffers(slot, page) for slot in range(self.count)]
        for slot in range(self.count):
            self.touched[slot] = page

    def _buffers(self, slot: int, touched: int) -> list[memoryview]:
        """Return where a request is received for *slot*, of whose payload that many bytes are touched."""
        start = self.request_offset(slot)
        in_place = self.view[start : start + fuse.WRITE_HEADER_SIZE + touched]
        return [in_place, self.view[self._landing : self._landing + self.payload_size - touched]]

    def complete(self, slot: int, length: int) -> None:
        """Bring a request together in its *slot* that has just been received and is *length* bytes long.

        A front that dies before the end of this leaves the rest in the landing area, from which the next one, before
        it receives anything, can do this again.
        """
        size = length - fuse.WRITE_HEADER_SIZE
        touched = self.touched[slot]
        if size > touched:
            rest = self._landing + size - touched
            self.payload(slot, size)[touched:] = self.view[self._landing : rest]
            touched = min((size + fuse.PAGE_SIZE - 1) // fuse.PAGE_SIZE * fuse.PAGE_SIZE, self.payload_size)
            self.receive_buffers[slot] = self._buffers(slot, touched)
            self.touched[slot] = touched

    def buffer(self, slot: int) -> memoryview:
        """Return where a request and its payload lie in *slot*."""
        start = self.request_offset(slot)
        return self.view[start : start + fuse.WRITE_HEADER_SIZE + self.payload_size]

    def request_offset(self, slot: int) -> int:
        """Return where in `memory` the request header of *slot* begins."""
        return self._requests + slot * self._stride

    def payload(self, slot: int, size: int) -> memoryview:
        """Return *size* bytes of the payload of *slot*; they begin on a page."""
        start = self._records + fuse.PAGE_SIZE + slot * self._stride
        return self.view[start : start + size]

    def free_slot(self) -> int:
        """Return the lowest free slot, which is the one most likely still in a cache, or -1."""
        return self.memory.find(_FREE, 0, self.count)

    def lend(self, slot: int, shard: int, message: bytes, unique: int = 0) -> None:
        """Lend *slot* to the worker of *shard*.

        Args:
            slot: the slot.
            shard: the worker's.
            message: tells it what to do.
            unique: the number under which the kernel waits for the answer.
        """
        start = self._records + slot * self._stride
        memory = self.memory
        memory[start + 2 : start + 2 + len(message)] = message
        _LENGTH.pack_into(memory, start, len(message))
        self.numbers[slot] = unique
        self.stages[slot] = 0
        self.states[slot] = shard + 1

    def claim(self, slot: int, unique: int) -> None:
        """Note that the kernel has sent the request in *slot* again, and waits for the answer under this number."""
        self.numbers[slot] = unique
        self.claims[slot] = self.generation

    def give_back(self, slot: int) -> None:
        """Mark *slot* as free."""
        self.states[slot] = 0

    def hold(self, slot: int) -> None:
        """Note that *slot* holds a request that the front is still doing while it receives others."""
        self.states[slot] = _HELD

    def let_go(self, slot: int) -> None:
        """Mark *slot* as free, if the front still holds it."""
        if self.states[slot] == _HELD:
            self.states[slot] = 0

    def empty_pipes(self) -> None:
        """Empty the pipes of slots that are not lent: a front that died had just received what they hold.

        The kernel sends it again, but for BATCH_FORGET, which is taken into its slot.
        """
        for slot in range(len(self.pipes) if self.pipes is not None else 0):
            if not self.states[slot]:
                self._take_forget(slot)
                self.discard(slot)

    def _take_forget(self, slot: int) -> None:
        """Take a BATCH_FORGET out of the pipe of *slot*, of which the front may have taken the beginning already."""
        assert self.pipes is not None
        left = self.pipes.left(slot)
        buffer = self.buffer(slot)
        taken = fuse.WRITE_HEADER_SIZE
        length, opcode = fuse.OPCODE.unpack_from(buffer)
        if length == taken + left and opcode == Opcode.BATCH_FORGET:
            self._take(slot, buffer[taken:length])
        elif length != taken + left and left:  # else it is the rest of what the slot begins with
            self._take(slot, buffer[: min(taken, left)])
            length, opcode = fuse.OPCODE.unpack_from(buffer)
            if length == left and opcode == Opcode.BATCH_FORGET:
                self._take(slot, buffer[taken:length])

    def _take(self, slot: int, buffer: memoryview) -> None:
        assert self.pipes is not None
        while buffer:
            buffer = buffer[self.pipes.take(slot, buffer) :]

    def message(self, slot: int) -> bytes:
        """Return the message about a lent *slot*."""
        start = self._records + slot * self._stride
        (length,) = _LENGTH.unpack_from(self.memory, start)
        return self.memory[start + 2 : start + 2 + length]

    def lent_to(self, shard: int) -> list[tuple[int, bytes]]:
        """Return the slots lent to *shard*, each with its message."""
        return [(slot, self.message(slot)) for slot, state in enumerate(bytes(self.states)) if state == shard + 1]
