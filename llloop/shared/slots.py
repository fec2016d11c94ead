"""The request slots in memory that supervisor, front and workers share, and the identity of the front.

The front reads each request from /dev/fuse into a *slot*: header and payload. So a worker can write the data of a WRITE
from the slot, without a copy. A slot also contains the message to the worker, so a request survives its worker.

Each process may die at any moment. These rules ensure that a request is done once, and never after newer ones:

* A slot has these states, and one store enters each state. The front *lends* it to a shard. The worker *begins* the
  request, and then notes it as *done* before it sends the answer (`stages`, `results`). Then the worker *gives back*
  the slot.
* While a slot is lent, only the worker of that shard does the request, even if the kernel sends it again. The successor
  of a worker starts after the dead worker has ended, so there is never more than one.
* The worker gives back a slot only after the kernel has accepted the answer. A message about that request that is still
  in a pipe is then ignored. The worker recognises it by the request's `unique`, which the kernel never reuses.
* After the death of a front, the kernel sends unanswered requests again, with another bit set in `unique`. It accepts
  no answer to the old `unique` any more. The next front searches for the slot in which that request is lent. If there
  is one, the front *claims* it: it notes the new `unique` (`numbers`), then notes the claim (`claims`), and sends the
  worker a reminder. The worker answers with the new `unique`. The front does not serve the request itself.
* If the kernel refuses an answer, there are two possible reasons: a worker that died has answered it before but has not
  given back the slot, or the kernel sends the request again. `resent_received` tells them apart: once the current
  front has received all requests that were sent again, a slot that it has not claimed was answered before.

The memory is one anonymous shared ``mmap``. The supervisor creates it before the first fork. No lock is needed, because
each byte has one writer at a time. The front marks a slot as lent after it has written everything else. The worker
marks it as free after it has written the answer.

The kernel must find the pages for a request in the front's page table. While a process that was killed reads a request,
the kernel gives it no new pages. It then answers the request with EIO (fs/fuse/dev.c, fuse_dev_do_read()) instead of
keeping it for the next front. So each front first touches one page of payload in each slot, and the *landing area*,
which receives the rest of longer payloads. The front copies that rest into the slot once. These pages of the slot are
touched from then on, and the slot receives the next request directly.
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

# A shard's number plus 1 must fit into the state byte, in which 0 means free and `_HELD` held by the front.
MAX_SHARDS = 253
_HELD = 255

# A request to a worker occupies a slot until it is answered, so this limits their number. The front parks further
# requests. Untouched memory of a slot occupies no pages.
DEFAULT_SLOTS = 256

_LENGTH = Struct("=H")
_MADV_POPULATE_WRITE = 23  # <asm-generic/mman-common.h>
_FREE = b"\0"


class Slots:
    """The slots in shared memory.

    Args:
        count: the number of slots.
        payload: the largest WRITE payload in bytes (INIT's max_write).
        shards: the number of workers.
    """

    def __init__(self, count: int, payload: int, shards: int) -> None:
        self.count = count
        self.payload_size = payload
        pages = fuse.PAGE_SIZE
        # Bytes per slot: states and stages 1; results, written, numbers, claims and touched 8.
        results = (2 * count + 7) & ~7
        written, numbers, claims, touched, front = (results + 8 * count * place for place in range(1, 6))
        self._landing = (front + 32 + pages - 1) // pages * pages
        first = self._landing + payload
        # The payload is page-aligned, as O_DIRECT requires. The page before it contains the message and, at its end,
        # the request's header.
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
        # The `unique` with which the kernel expects the answer, and the `generation` of the front that noted it last.
        self.numbers = self.view[numbers:claims].cast("Q")
        self.claims = self.view[claims:touched].cast("Q")
        # How many bytes of payload the front receives directly in the slot; the rest goes to the landing area.
        self.touched = self.view[touched:front].cast("Q")
        self.metrics = Metrics(shards, count)
        self._front_cells = self.view[front : front + 32].cast("q")
        self.receive_buffers: list[list[memoryview]] = []
        self._receive_by_landing()
        self.pipes: PayloadPipes | None = None

    def open_pipes(self) -> PayloadPipes:
        """Create the pipes for large payloads, before the first fork, and return them."""
        self.pipes = PayloadPipes(self.count, self.payload_size)
        return self.pipes

    def discard(self, slot: int) -> None:
        """Discard the content of the pipe of *slot*."""
        if self.pipes is None or slot >= len(self.pipes):
            return
        while left := self.pipes.left(slot):
            self.pipes.take(slot, self.payload(slot, min(left, self.payload_size)))

    @property
    def front_pid(self) -> int:
        """The process id of the front, whose descriptors workers duplicate; 0 while there is no front."""
        return self._front_cells[0]

    @property
    def generation(self) -> int:
        """The number of the current front, counted from 1. A worker must fetch descriptors again from a new front."""
        return self._front_cells[1]

    @property
    def resent_received(self) -> bool:
        """Whether the current front has received all requests that the kernel sends again."""
        return self._front_cells[3] == self._front_cells[1]

    def note_resent_received(self) -> None:
        """Note that the current front has received all requests that the kernel sends again."""
        self._front_cells[3] = self._front_cells[1]

    @property
    def front_started(self) -> int:
        """The front's `pidfds.start_time`."""
        return self._front_cells[2]

    def clear_front(self) -> None:
        """Note that there is no front."""
        self._front_cells[0] = 0

    def set_front(self, pid: int) -> None:
        """Note that process *pid* is the new front."""
        self._front_cells[2] = start_time(pid)
        self._front_cells[0] = pid
        self._front_cells[1] += 1

    def free_held(self) -> None:
        """Free the slots that the previous front held."""
        for slot, state in enumerate(bytes(self.states)):
            if state == _HELD:
                self.states[slot] = 0

    def lock(self) -> None:
        """Lock pages of the slots in memory when they are touched, as far as RLIMIT_MEMLOCK allows (mlock2(2)).

        The kernel removes pages that it swaps out from the page table.
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
        """Touch all pages that receive requests, so that this process's page table has them (madvise(2), Linux 5.14).

        These are the landing area, and two pages of each slot: header and message, and the first page of payload.
        """
        page = fuse.PAGE_SIZE
        with suppress(OSError):
            self.memory.madvise(_MADV_POPULATE_WRITE, self._landing, self.payload_size)
            for slot in range(self.count):
                self.memory.madvise(_MADV_POPULATE_WRITE, self._records + slot * self._stride, 2 * page)
        self._receive_by_landing()

    def _receive_by_landing(self) -> None:
        """Make the landing area receive all but the first page of each payload."""
        page = fuse.PAGE_SIZE
        self.receive_buffers[:] = [self._buffers(slot, page) for slot in range(self.count)]
        for slot in range(self.count):
            self.touched[slot] = page

    def _buffers(self, slot: int, touched: int) -> list[memoryview]:
        """Return the buffers that receive a request for *slot*, of whose payload *touched* bytes are touched."""
        start = self.request_offset(slot)
        in_place = self.view[start : start + fuse.WRITE_HEADER_SIZE + touched]
        return [in_place, self.view[self._landing : self._landing + self.payload_size - touched]]

    def complete(self, slot: int, length: int) -> None:
        """Copy the rest of a request from the landing area into its *slot*, after it was received.

        If the front dies before the end, the next front can repeat this, as long as it has not received a request.

        Args:
            slot: the slot.
            length: the request's length in bytes.
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
        """Return the memory of the request in *slot*, header and payload."""
        start = self.request_offset(slot)
        return self.view[start : start + fuse.WRITE_HEADER_SIZE + self.payload_size]

    def request_offset(self, slot: int) -> int:
        """Return the offset of the request header of *slot* in `memory`."""
        return self._requests + slot * self._stride

    def slot_of(self, offset: int) -> int:
        """Return the slot whose request header is at *offset* in `memory`."""
        return (offset - self._requests) // self._stride

    def payload(self, slot: int, size: int) -> memoryview:
        """Return the first *size* bytes of the page-aligned payload of *slot*."""
        start = self._records + fuse.PAGE_SIZE + slot * self._stride
        return self.view[start : start + size]

    def free_slot(self) -> int:
        """Return the lowest free slot, which is the most likely one to be in the processor's cache, or -1."""
        return self.memory.find(_FREE, 0, self.count)

    def lend(self, slot: int, shard: int, message: bytes, unique: int = 0) -> None:
        """Lend *slot* to the worker of *shard*.

        Args:
            slot: the slot.
            shard: the worker's shard.
            message: the encoded request to the worker.
            unique: the `unique` with which the kernel expects the answer.
        """
        start = self._records + slot * self._stride
        memory = self.memory
        memory[start + 2 : start + 2 + len(message)] = message
        _LENGTH.pack_into(memory, start, len(message))
        self.numbers[slot] = unique
        self.stages[slot] = 0
        self.states[slot] = shard + 1

    def claim(self, slot: int, unique: int) -> None:
        """Note that the kernel has sent the request in *slot* again, with this new `unique`."""
        self.numbers[slot] = unique
        self.claims[slot] = self.generation

    def is_lent(self, slot: int) -> bool:
        """Return whether a worker has *slot*."""
        return 0 < self.states[slot] < _HELD

    def is_done(self, slot: int) -> bool:
        """Return whether the worker that has *slot* has done a request that must not be done twice."""
        return self.stages[slot] != 0 and self.results[slot] < 0

    def give_back(self, slot: int) -> None:
        """Mark *slot* as free."""
        self.states[slot] = 0

    def hold(self, slot: int) -> None:
        """Note that *slot* contains a request that the front still serves while it receives others."""
        self.states[slot] = _HELD

    def free_if_held(self, slot: int) -> None:
        """Mark *slot* as free if the front holds it."""
        if self.states[slot] == _HELD:
            self.states[slot] = 0

    def empty_pipes(self) -> None:
        """Empty the pipes of slots that are not lent: the dead front had just received the requests in them.

        The kernel sends these requests again, except BATCH_FORGET. A BATCH_FORGET is read into its slot.
        """
        for slot in range(len(self.pipes) if self.pipes is not None else 0):
            if not self.states[slot]:
                self._take_forget(slot)
                self.discard(slot)

    def _take_forget(self, slot: int) -> None:
        """Read a BATCH_FORGET from the pipe into *slot*. The dead front may have read its beginning already."""
        assert self.pipes is not None
        left = self.pipes.left(slot)
        buffer = self.buffer(slot)
        taken = fuse.WRITE_HEADER_SIZE
        length, opcode = fuse.OPCODE.unpack_from(buffer)
        if length == taken + left and opcode == Opcode.BATCH_FORGET:
            self._take(slot, buffer[taken:length])
        elif length != taken + left and left:  # the pipe does not contain the rest of the request in the slot
            self._take(slot, buffer[: min(taken, left)])
            length, opcode = fuse.OPCODE.unpack_from(buffer)
            if length == left and opcode == Opcode.BATCH_FORGET:
                self._take(slot, buffer[taken:length])

    def _take(self, slot: int, buffer: memoryview) -> None:
        assert self.pipes is not None
        while buffer:
            buffer = buffer[self.pipes.take(slot, buffer) :]

    def message(self, slot: int) -> bytes:
        """Return the encoded request that was sent to the worker of a lent *slot*."""
        start = self._records + slot * self._stride
        (length,) = _LENGTH.unpack_from(self.memory, start)
        return self.memory[start + 2 : start + 2 + length]

    def lent_to(self, shard: int) -> list[tuple[int, bytes]]:
        """Return the slots that are lent to *shard*, each with its encoded request."""
        return [(slot, self.message(slot)) for slot, state in enumerate(bytes(self.states)) if state == shard + 1]
