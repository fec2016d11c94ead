"""The shared memory: slots are lent and come back, and nothing of one lies in another."""

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

from llloop import wire
from llloop.arena import DEFAULT_SLOTS, MAX_SHARDS, Arena
from llloop.protocol import Operation, encode
from tests.as_user import Child

LONGEST = encode(
    (9, 2**64 - 1, 4095, 2**64 - 1, 2**31, 2**64 - 1, 2**64 - 1, 7, 2**32 - 1, 2**32 - 1, (2**64 - 1,) * 3)
)


def test_all_slots_are_free_at_first(arena: Arena) -> None:
    assert arena.free_slot() == 0
    assert [arena.lent_to(shard) for shard in range(2)] == [[], []]


def test_the_lowest_free_slot_comes_first(arena: Arena) -> None:
    for slot in range(4):
        assert arena.free_slot() == slot
        arena.lend(slot, 0, b"x")
    assert arena.free_slot() == -1
    arena.give_back(2)
    arena.give_back(1)
    assert arena.free_slot() == 1


def test_a_lent_slot_keeps_its_message(arena: Arena) -> None:
    arena.lend(1, 0, b"one")
    arena.lend(3, 1, LONGEST)
    arena.lend(2, 0, b"")
    assert arena.lent_to(0) == [(1, b"one"), (2, b"")]
    assert arena.lent_to(1) == [(3, LONGEST)]
    arena.give_back(1)
    assert arena.lent_to(0) == [(2, b"")]


def test_the_highest_shard_is_not_taken_for_a_free_slot() -> None:
    arena = Arena(2, wire.PAGE_SIZE, MAX_SHARDS)
    arena.lend(0, MAX_SHARDS - 1, b"message")
    assert arena.free_slot() == 1
    assert arena.lent_to(MAX_SHARDS - 1) == [(0, b"message")]


def test_lending_forgets_how_far_the_last_request_had_come(arena: Arena) -> None:
    arena.stages[0] = 2
    arena.lend(0, 1, b"x")
    assert arena.stages[0] == 0


def test_payloads_begin_on_a_page(arena: Arena) -> None:
    """A WRITE is received where it is written from, and O_DIRECT wants it aligned."""
    for slot in range(arena.slots):
        assert (arena.address + arena.request_offset(slot) + wire.WRITE_HEADER_SIZE) % wire.PAGE_SIZE == 0


def test_a_request_and_its_payload_are_received_in_one_piece(arena: Arena) -> None:
    reader, writer = os.pipe()
    try:
        for slot in range(arena.slots):
            header = bytes([slot + 1]) * wire.WRITE_HEADER_SIZE
            payload = bytes([slot + 101]) * 5000
            os.write(writer, header + payload)
            length = os.readv(reader, arena.receive_buffers[slot])
            assert length == len(header) + len(payload)
            arena.complete(slot, length)
            start = arena.request_offset(slot)
            assert arena.memory[start : start + len(header)] == header
            assert arena.payload(slot, 5000) == payload
    finally:
        os.close(reader)
        os.close(writer)


def room(buffers: list[memoryview]) -> int:
    return sum(map(len, buffers))


def test_a_receive_buffer_takes_the_largest_write(arena: Arena) -> None:
    for buffers in arena.receive_buffers:
        assert room(buffers) == wire.WRITE_HEADER_SIZE + arena.payload_size
    assert room(arena.receive_buffers[0]) >= 8192, "FUSE_MIN_READ_BUFFER: the kernel refuses to read into less"


def receive(arena: Arena, slot: int, request: bytes) -> None:
    with tempfile.TemporaryFile() as device:
        device.write(request)
        device.seek(0)
        arena.complete(slot, os.readv(device.fileno(), arena.receive_buffers[slot]))


def faults_of_receiving(slots: int, again: bool) -> list[int]:
    """How many pages the largest requests met that were not in the page table, one request for each slot."""
    arena = Arena(slots, 128 * wire.PAGE_SIZE, 1)
    arena.touch()
    if again:
        for slot in range(slots):
            receive(arena, slot, bytes(room(arena.receive_buffers[slot])))
    device = os.memfd_create("device")
    os.truncate(device, room(arena.receive_buffers[0]))
    faults = []
    for slot in range(slots):
        os.lseek(device, 0, os.SEEK_SET)
        buffers = arena.receive_buffers[slot]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        os.readv(device, buffers)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults


@pytest.mark.parametrize("again", [False, True])
def test_a_process_that_is_killed_needs_no_more_pages_to_receive_a_request(again: bool) -> None:
    """The kernel answers a request with EIO that it cannot copy."""
    faults = Child(faults_of_receiving, 40, again).result()
    assert sum(faults) < 20, "what Python itself touches is not much"


def test_the_next_process_begins_with_a_page_table_of_its_own() -> None:
    arena = Arena(4, 128 * wire.PAGE_SIZE, 1)
    arena.touch()
    receive(arena, 1, b"x" * 300_000)
    assert len(arena.receive_buffers[1][0]) > 300_000
    assert len(arena.receive_buffers[0][0]) < 5000
    arena.touch()
    assert len(arena.receive_buffers[1][0]) < 5000
    receive(arena, 1, b"y" * 400_000)
    assert bytes(arena.buffer(1)[:400_001]) == b"y" * 400_000 + b"\0"


def test_what_is_received_stays_in_memory() -> None:
    def locked() -> int:
        arena = Arena(4, 128 * wire.PAGE_SIZE, 1)
        arena.lock()
        arena.touch()
        return int(re.findall(r"VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    assert Child(locked).result() > 600


def test_who_may_not_lock_all_of_it_locks_the_beginning() -> None:
    def locked() -> int:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        os.setuid(65534)
        arena = Arena(100, 128 * wire.PAGE_SIZE, 1)
        arena.lock()
        return int(re.findall(r"VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    if os.geteuid() == 0:
        assert Child(locked).result() == 1024


@pytest.mark.parametrize("size", [5000, 300_000])
def test_a_request_whose_front_died_before_it_was_brought_together_is_so_by_the_next(arena: Arena, size: int) -> None:
    request = bytes(range(256)) * (size // 256)
    with tempfile.TemporaryFile() as device:
        device.write(request)
        device.seek(0)
        assert os.readv(device.fileno(), arena.receive_buffers[2]) == len(request)
    successor = copy.copy(arena)
    successor.complete(2, len(request))
    successor.complete(2, len(request))
    assert bytes(arena.buffer(2)[: len(request)]) == request


def test_nothing_of_a_slot_lies_in_another(arena: Arena) -> None:
    messages = [bytes([65 + slot]) * len(LONGEST) for slot in range(arena.slots)]
    for slot, message in enumerate(messages):
        arena.lend(slot, slot % 2, message)
        buffer = arena.buffer(slot)
        buffer[:] = bytes([slot + 1]) * len(buffer)
        arena.results[slot] = -slot
        arena.stages[slot] = slot
    arena.new_front(2**31 - 1)
    for slot, message in enumerate(messages):
        assert (slot, message) in arena.lent_to(slot % 2)
        assert bytes(arena.payload(slot, arena.payload_size)) == bytes([slot + 1]) * arena.payload_size
        assert arena.results[slot] == -slot
        assert arena.stages[slot] == slot
    assert arena.front_pid == 2**31 - 1


def test_results_hold_any_count_and_position(arena: Arena) -> None:
    arena.results[3] = 2**63 - 1
    assert arena.results[3] == 2**63 - 1


def test_what_a_child_does_is_seen(arena: Arena) -> None:
    def work() -> None:
        arena.metrics.workers[1].moved(wire.Opcode.READ, 7)
        arena.payload(0, 3)[:] = b"abc"
        arena.give_back(0)

    arena.lend(0, 1, b"x")
    Child(work).result()
    assert arena.free_slot() == 0
    assert arena.payload(0, 3) == b"abc"
    assert arena.metrics.workers[1].snapshot()["READ"].bytes == 7


@pytest.mark.parametrize("slots", [1, 2, 5, 7, 9, DEFAULT_SLOTS, 4096])
def test_any_number_of_slots(slots: int) -> None:
    arena = Arena(slots, 4 * wire.PAGE_SIZE, 3)
    last = slots - 1
    arena.lend(last, 2, b"last")
    arena.results[last] = 5
    arena.new_front(7)
    buffer = arena.buffer(last)
    buffer[:] = b"\xff" * len(buffer)
    assert arena.lent_to(2) == [(last, b"last")]
    assert (arena.results[last], arena.front_pid) == (5, 7)
    assert arena.free_slot() == (0 if last else -1)


class SlotMachine(RuleBasedStateMachine):
    """Random lending and giving back against a dictionary."""

    SLOTS, SHARDS = 5, 3

    @initialize()
    def start(self) -> None:
        self.arena = Arena(self.SLOTS, wire.PAGE_SIZE, self.SHARDS)
        self.lent: dict[int, tuple[int, bytes]] = {}

    @precondition(lambda self: len(self.lent) < self.SLOTS)
    @rule(shard=st.integers(0, SHARDS - 1), unique=st.integers(0, 2**64 - 1))
    def lend(self, shard: int, unique: int) -> None:
        slot = self.arena.free_slot()
        message = encode((Operation.READ, unique, slot, 1, 2))
        self.arena.lend(slot, shard, message)
        self.lent[slot] = (shard, message)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.lent)))
        self.arena.give_back(slot)
        del self.lent[slot]

    @invariant()
    def as_the_model(self) -> None:
        free = set(range(self.SLOTS)) - set(self.lent)
        assert self.arena.free_slot() == min(free, default=-1)
        for shard in range(self.SHARDS):
            expected = [(slot, message) for slot, (lent, message) in sorted(self.lent.items()) if lent == shard]
            assert self.arena.lent_to(shard) == expected


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
