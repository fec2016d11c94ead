"""The slots in shared memory: lending, giving back, receiving, and their boundaries."""

from __future__ import annotations

import copy
import os
import re
import resource
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llloop.linux import fuse
from llloop.shared.messages import Operation, encode
from llloop.shared.slots import DEFAULT_SLOTS, MAX_SHARDS, Slots
from tests.as_user import Child

LONGEST = encode(
    (9, 2**64 - 1, 4095, 2**64 - 1, 2**31, 2**64 - 1, 2**64 - 1, 7, 2**32 - 1, 2**32 - 1, (2**64 - 1,) * 3)
)


def test_all_slots_are_free_at_first(slots: Slots) -> None:
    assert slots.free_slot() == 0
    assert [slots.lent_to(shard) for shard in range(2)] == [[], []]


def test_free_slot_returns_the_lowest(slots: Slots) -> None:
    for slot in range(4):
        assert slots.free_slot() == slot
        slots.lend(slot, 0, b"x")
    assert slots.free_slot() == -1
    slots.give_back(2)
    slots.give_back(1)
    assert slots.free_slot() == 1


def test_lent_slot_keeps_its_message(slots: Slots) -> None:
    slots.lend(1, 0, b"one")
    slots.lend(3, 1, LONGEST)
    slots.lend(2, 0, b"")
    assert slots.lent_to(0) == [(1, b"one"), (2, b"")]
    assert slots.lent_to(1) == [(3, LONGEST)]
    slots.give_back(1)
    assert slots.lent_to(0) == [(2, b"")]


def test_highest_shard_fits_the_state() -> None:
    slots = Slots(2, fuse.PAGE_SIZE, MAX_SHARDS)
    slots.lend(0, MAX_SHARDS - 1, b"message")
    assert slots.free_slot() == 1
    assert slots.lent_to(MAX_SHARDS - 1) == [(0, b"message")]


def test_lending_resets_the_stage(slots: Slots) -> None:
    slots.stages[0] = 2
    slots.lend(0, 1, b"x")
    assert slots.stages[0] == 0


def test_payloads_are_page_aligned(slots: Slots) -> None:
    """O_DIRECT requires this: the worker writes the data of a WRITE from the slot."""
    for slot in range(slots.count):
        assert (slots.address + slots.request_offset(slot) + fuse.WRITE_HEADER_SIZE) % fuse.PAGE_SIZE == 0


def test_request_and_payload_are_contiguous(slots: Slots) -> None:
    reader, writer = os.pipe()
    try:
        for slot in range(slots.count):
            header = bytes([slot + 1]) * fuse.WRITE_HEADER_SIZE
            payload = bytes([slot + 101]) * 5000
            os.write(writer, header + payload)
            length = os.readv(reader, slots.receive_buffers[slot])
            assert length == len(header) + len(payload)
            slots.complete(slot, length)
            start = slots.request_offset(slot)
            assert slots.memory[start : start + len(header)] == header
            assert slots.payload(slot, 5000) == payload
    finally:
        os.close(reader)
        os.close(writer)


def room(buffers: list[memoryview]) -> int:
    return sum(map(len, buffers))


def test_receive_buffer_fits_the_largest_write(slots: Slots) -> None:
    for buffers in slots.receive_buffers:
        assert room(buffers) == fuse.WRITE_HEADER_SIZE + slots.payload_size
    assert room(slots.receive_buffers[0]) >= 8192, "FUSE_MIN_READ_BUFFER: the kernel refuses to read into less"


def receive(slots: Slots, slot: int, request: bytes) -> None:
    with tempfile.TemporaryFile() as device:
        device.write(request)
        device.seek(0)
        slots.complete(slot, os.readv(device.fileno(), slots.receive_buffers[slot]))


def faults_of_receiving(count: int, again: bool) -> list[int]:
    """How many pages the largest requests met that were not in the page table, one request for each slot."""
    slots = Slots(count, 128 * fuse.PAGE_SIZE, 1)
    slots.touch()
    if again:
        for slot in range(count):
            receive(slots, slot, bytes(room(slots.receive_buffers[slot])))
    device = os.memfd_create("device")
    os.truncate(device, room(slots.receive_buffers[0]))
    faults = []
    for slot in range(count):
        os.lseek(device, 0, os.SEEK_SET)
        buffers = slots.receive_buffers[slot]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        os.readv(device, buffers)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults


@pytest.mark.parametrize("again", [False, True])
def test_receiving_needs_no_new_pages(again: bool) -> None:
    """The kernel answers a request with EIO if it cannot copy it."""
    faults = Child(faults_of_receiving, 40, again).result()
    assert sum(faults) < 20, "what Python itself touches is not much"


def test_touch_is_needed_after_fork() -> None:
    slots = Slots(4, 128 * fuse.PAGE_SIZE, 1)
    slots.touch()
    receive(slots, 1, b"x" * 300_000)
    assert len(slots.receive_buffers[1][0]) > 300_000
    assert len(slots.receive_buffers[0][0]) < 5000
    slots.touch()
    assert len(slots.receive_buffers[1][0]) < 5000
    receive(slots, 1, b"y" * 400_000)
    assert bytes(slots.buffer(1)[:400_001]) == b"y" * 400_000 + b"\0"


def test_received_pages_are_locked() -> None:
    def locked() -> int:
        slots = Slots(4, 128 * fuse.PAGE_SIZE, 1)
        slots.lock()
        slots.touch()
        return int(re.findall(r"VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    assert Child(locked).result() > 600


def test_lock_respects_the_limit() -> None:
    def locked() -> int:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        os.setuid(65534)
        slots = Slots(100, 128 * fuse.PAGE_SIZE, 1)
        slots.lock()
        return int(re.findall(r"VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    if os.geteuid() == 0:
        assert Child(locked).result() == 1024


@pytest.mark.parametrize("size", [5000, 300_000])
def test_next_front_completes_a_received_request(slots: Slots, size: int) -> None:
    request = bytes(range(256)) * (size // 256)
    with tempfile.TemporaryFile() as device:
        device.write(request)
        device.seek(0)
        assert os.readv(device.fileno(), slots.receive_buffers[2]) == len(request)
    successor = copy.copy(slots)
    successor.complete(2, len(request))
    successor.complete(2, len(request))
    assert bytes(slots.buffer(2)[: len(request)]) == request


def test_slots_do_not_overlap(slots: Slots) -> None:
    messages = [bytes([65 + slot]) * len(LONGEST) for slot in range(slots.count)]
    for slot, message in enumerate(messages):
        slots.lend(slot, slot % 2, message)
        buffer = slots.buffer(slot)
        buffer[:] = bytes([slot + 1]) * len(buffer)
        slots.results[slot] = -slot
        slots.stages[slot] = slot
    slots.set_front(2**31 - 1)
    for slot, message in enumerate(messages):
        assert (slot, message) in slots.lent_to(slot % 2)
        assert bytes(slots.payload(slot, slots.payload_size)) == bytes([slot + 1]) * slots.payload_size
        assert slots.results[slot] == -slot
        assert slots.stages[slot] == slot
    assert slots.front_pid == 2**31 - 1


def test_results_hold_64_bits(slots: Slots) -> None:
    slots.results[3] = 2**63 - 1
    assert slots.results[3] == 2**63 - 1


def test_memory_is_shared_with_children(slots: Slots) -> None:
    def work() -> None:
        slots.metrics.workers[1].moved(fuse.Opcode.READ, 7)
        slots.payload(0, 3)[:] = b"abc"
        slots.give_back(0)

    slots.lend(0, 1, b"x")
    Child(work).result()
    assert slots.free_slot() == 0
    assert bytes(slots.payload(0, 3)) == b"abc"
    assert slots.metrics.workers[1].snapshot()["READ"].bytes == 7


@pytest.mark.parametrize("count", [1, 2, 5, 7, 9, DEFAULT_SLOTS, 4096])
def test_any_number_of_slots(count: int) -> None:
    slots = Slots(count, 4 * fuse.PAGE_SIZE, 3)
    last = count - 1
    slots.lend(last, 2, b"last")
    slots.results[last] = 5
    slots.set_front(7)
    buffer = slots.buffer(last)
    buffer[:] = b"\xff" * len(buffer)
    assert slots.lent_to(2) == [(last, b"last")]
    assert (slots.results[last], slots.front_pid) == (5, 7)
    assert slots.free_slot() == (0 if last else -1)


class SlotMachine(RuleBasedStateMachine):
    """Random lending and giving back, compared with a dictionary."""

    SLOTS, SHARDS = 5, 3

    @initialize()
    def start(self) -> None:
        self.slots = Slots(self.SLOTS, fuse.PAGE_SIZE, self.SHARDS)
        self.lent: dict[int, tuple[int, bytes]] = {}

    @precondition(lambda self: len(self.lent) < self.SLOTS)
    @rule(shard=st.integers(0, SHARDS - 1), unique=st.integers(0, 2**64 - 1))
    def lend(self, shard: int, unique: int) -> None:
        slot = self.slots.free_slot()
        message = encode((Operation.READ, unique, slot, 1, 2))
        self.slots.lend(slot, shard, message)
        self.lent[slot] = (shard, message)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.lent)))
        self.slots.give_back(slot)
        del self.lent[slot]

    @invariant()
    def as_the_model(self) -> None:
        free = set(range(self.SLOTS)) - set(self.lent)
        assert self.slots.free_slot() == min(free, default=-1)
        for shard in range(self.SHARDS):
            expected = [(slot, message) for slot, (lent, message) in sorted(self.lent.items()) if lent == shard]
            assert self.slots.lent_to(shard) == expected


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
