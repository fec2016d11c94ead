"""Requests from the front to the workers: none is lost, the front never waits, RELEASE is never overtaken."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llloop.front.llfuse.exchange import Exchange
from llloop.front.open_files import Handle
from llloop.front.recovery.intents import NOWHERE
from llloop.front.request import FuseRequest
from llloop.front.router import Router
from llloop.linux import fuse
from llloop.shared.messages import MAX_MESSAGE, PIPED, Operation, Request, decode, encode
from llloop.shared.slots import Slots
from tests.expect import fails
from tests.unit.support import packet_pipe, packets

ROOM = 4  # messages in a pipe


class Pipes:
    """Two workers' pipes, from which only tests read."""

    def __init__(self, ends: list[tuple[int, int]]) -> None:
        self.readers = [reader for reader, _ in ends]
        self.writers = [writer for _, writer in ends]

    def take(self, shard: int) -> list[Request]:
        return [decode(message) for message in packets(self.readers[shard])]

    def fill(self, shard: int) -> None:
        with fails(errno.EAGAIN):
            while True:
                os.write(self.writers[shard], encode((Operation.FSYNC, 0, 0, 0, 0)))


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    with packet_pipe(ROOM) as first, packet_pipe(ROOM) as second:
        yield Pipes([first, second])


@pytest.fixture
def router(slots: Slots, pipes: Pipes) -> Router:
    return Router(slots, pipes.writers)


def handle(shard: int = 0, descriptor: int = 33) -> Handle:
    return Handle(descriptor, 100, shard, os.O_RDWR)


def at_hand(router: Router, unique: int = 1) -> FuseRequest:
    """A request that has been received."""
    request = FuseRequest(router.slots.memory, NOWHERE)
    request.slot = router.slots.free_slot()
    request.base = router.slots.request_offset(request.slot)
    request.unique = unique
    return request


def message(
    request: FuseRequest, opened: Handle, operation: Operation, length: int = 0, offset: int = 0, flags: int = 0
) -> Request:
    slot, unique = request.slot, request.unique
    return Request(operation, unique, slot, unique, opened.descriptor, offset, length, flags, nodeid=opened.nodeid)


def submit(router: Router, opened: Handle, unique: int, operation: Operation = Operation.READ, length: int = 0) -> bool:
    request = at_hand(router, unique)
    return router.submit(request, opened.shard, message(request, opened, operation, length))


def park(router: Router, opened: Handle, unique: int, operation: Operation = Operation.READ, length: int = 0) -> None:
    request = at_hand(router, unique)
    router.park(request, opened.shard, message(request, opened, operation, length))


def test_request_reaches_the_worker_of_its_handle(router: Router, pipes: Pipes, slots: Slots) -> None:
    opened = handle(shard=1)
    request = at_hand(router, 2**63)
    given = router.dispatch(request, opened, 7, Operation.COPY_FILE_RANGE, 5, 6, 1, 1000, 1001, (8, 9, 10))
    expected = Request(Operation.COPY_FILE_RANGE, 2**63, 0, 7, 33, 5, 6, 1, 1000, 1001, (8, 9, 10), 0, 100)
    assert pipes.take(1) == [expected]
    assert pipes.take(0) == []
    assert slots.lent_to(1) == [(0, encode(expected))]
    assert opened.in_worker, "else the worker would not be told of the release"
    assert given == (0, request.taken)
    assert request.dispatched and request.slot == 1


def test_submit_declines_without_free_slot(router: Router, pipes: Pipes, slots: Slots) -> None:
    for unique in range(3):
        assert submit(router, handle(), unique)
    opened = handle()
    last = slots.free_slot()
    assert not submit(router, opened, 3)
    assert slots.free_slot() == last, "the request is still to be done from where it lies"
    assert len(pipes.take(0)) == len(slots.lent_to(0)) == 3
    slots.give_back(1)
    assert submit(router, opened, 4)
    assert [request.slot for request in pipes.take(0)] == [1]


def test_submit_declines_with_full_pipe(router: Router, pipes: Pipes, slots: Slots) -> None:
    pipes.fill(0)
    opened = handle()
    slot = slots.free_slot()
    assert not submit(router, opened, 1)
    assert slots.free_slot() == slot
    assert slots.lent_to(0) == []
    assert submit(router, handle(shard=1), 2), "the other worker has nothing to do with it"
    pipes.take(0)
    assert submit(router, opened, 3)


def test_release_contains_the_handle(router: Router, pipes: Pipes) -> None:
    router.release(77, handle(shard=1))
    (request,) = pipes.take(1)
    assert (request.operation, request.slot, request.extra) == (Operation.RELEASE, -1, (77,))
    assert pipes.take(0) == []
    assert not router.backlog


def test_release_of_a_shared_handle_goes_to_all_workers(router: Router, pipes: Pipes) -> None:
    opened = handle(shard=1)
    opened.in_all_workers = True
    router.release(77, opened)
    assert [request.extra for shard in range(2) for request in pipes.take(shard)] == [(77,), (77,)]


def test_waiting_release_is_not_overtaken(router: Router, pipes: Pipes) -> None:
    pipes.fill(0)
    for number in range(5):
        router.release(number, handle())
    assert router.backlog
    assert not submit(router, handle(), 1), "it would go into the pipe before the releases"
    pipes.take(0)
    assert submit(router, handle(), 2)
    taken = pipes.take(0)
    assert [request.operation for request in taken[:-1]] == [Operation.RELEASE] * (len(taken) - 1)
    assert [number for request in taken[:-1] for number in request.extra] == [0, 1, 2, 3, 4]
    assert taken[-1].unique == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(steps=st.lists(st.sampled_from(["submit", "release", "take"]), max_size=60))
def test_requests_arrive_before_their_release(steps: list[str]) -> None:
    """Each handle is used once, if a worker accepts the request, and then released."""
    with packet_pipe(ROOM) as (reader, writer):
        slots = Slots(64, fuse.PAGE_SIZE, 1)
        router = Router(slots, [writer])
        seen: list[tuple[int, int]] = []
        submitted: list[int] = []
        number = 0

        def take() -> None:
            for message in packets(reader):
                request = decode(message)
                if request.operation == Operation.RELEASE:
                    seen.extend((Operation.RELEASE, released) for released in request.extra)
                else:
                    seen.append((request.operation, request.handle))
                    slots.give_back(request.slot)

        for step in steps:
            if step == "submit":
                number += 1
                if submit(router, handle(), number):
                    submitted.append(number)
            elif step == "release" and number:
                router.release(number, handle())
                number += 1
            else:
                take()
        for _ in range(100):
            take()
            router.release(0, handle())
        take()
        assert [used for operation, used in seen if operation == Operation.READ] == submitted
        for used in submitted:
            if (Operation.RELEASE, used) in seen:
                assert seen.index((Operation.READ, used)) < seen.index((Operation.RELEASE, used))


def test_releases_are_batched(router: Router, pipes: Pipes) -> None:
    pipes.fill(0)
    numbers = [2**64 - 1 - index for index in range(3000)]
    for number in numbers:
        router.release(number, handle())
    told: list[int] = []
    while len(told) < len(numbers):
        messages = packets(pipes.readers[0])
        assert messages or not told, "nothing comes any more"
        assert all(len(message) <= MAX_MESSAGE for message in messages)
        told += [number for message in messages for number in decode(message).extra]
        router.release(1, handle())
    assert told[: len(numbers)] == numbers


def test_wait_sends_waiting_releases(router: Router, pipes: Pipes) -> None:
    pipes.fill(1)
    router.release(5, handle(shard=1))
    device, request = os.pipe()
    taken: list[Request] = []
    taker = threading.Timer(0.05, lambda: taken.extend(pipes.take(1)))
    taker.start()
    try:
        router.wait(device)  # without the room that the worker makes, this never ends
        assert not router.backlog
    finally:
        taker.join()
        os.close(device)
        os.close(request)
    assert [told.extra for told in taken + pipes.take(1) if told.operation == Operation.RELEASE] == [(5,)]


def test_wait_ends_with_a_request(router: Router, pipes: Pipes) -> None:
    pipes.fill(0)
    router.release(5, handle())
    device, request = os.pipe()
    try:
        os.write(request, b"!")
        router.wait(device)
        assert router.backlog, "there is no room for the release yet"
    finally:
        os.close(device)
        os.close(request)


# With --loop llfuse


@pytest.fixture
def answers() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def answer(pipes: Pipes, slots: Slots, writer: int, result: int, data: bytes = b"") -> threading.Thread:
    """A worker that answers one request."""

    def work() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for request in pipes.take(0):
                slots.payload(request.slot, len(data))[:] = data
                os.write(writer, encode((request.unique + 1000, -errno.EIO)))  # for another request: ignored
                os.write(writer, encode((request.unique, result)))
                slots.give_back(request.slot)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_exchange_waits_for_its_own_answer(
    router: Router, pipes: Pipes, slots: Slots, answers: tuple[int, int]
) -> None:
    exchange = Exchange(router, answers[0])
    thread = answer(pipes, slots, answers[1], 4, b"data")
    try:
        count, payload = exchange.call(handle(), 1, Operation.READ, 0, 10)
        assert bytes(payload[:count]) == b"data"
    finally:
        thread.join()


def test_exchange_transfers_the_payload(router: Router, pipes: Pipes, slots: Slots, answers: tuple[int, int]) -> None:
    exchange = Exchange(router, answers[0])
    os.write(answers[1], encode((1, 7)))
    count, _ = exchange.call(handle(), 3, Operation.WRITE, 100, 7, 2, 11, 12, b"payload")
    assert count == 7
    (request,) = pipes.take(0)
    assert request == Request(Operation.WRITE, 1, 0, 3, 33, 100, 7, 2, 11, 12, (), 0, 100)
    assert bytes(slots.payload(request.slot, 7)) == b"payload"


def test_exchange_raises_the_workers_error(router: Router, answers: tuple[int, int]) -> None:
    exchange = Exchange(router, answers[0])
    os.write(answers[1], encode((1, -errno.ENOSPC)))
    with fails(errno.ENOSPC):
        exchange.call(handle(), 1, Operation.WRITE)


def test_declined_exchange_raises_eagain(router: Router, pipes: Pipes, answers: tuple[int, int]) -> None:
    pipes.fill(0)
    with fails(errno.EAGAIN):
        Exchange(router, answers[0]).call(handle(), 1, Operation.READ)


# A worker that does nothing


def submit_or_park(router: Router, opened: Handle, unique: int) -> None:
    if not submit(router, opened, unique):
        park(router, opened, unique)


@pytest.fixture
def idle() -> Iterator[int]:
    """A device that has no request, and never will."""
    reader, writer = os.pipe()
    yield reader
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("stuck", [1, 3])
def test_hanging_workers_do_not_use_all_slots(stuck: int) -> None:
    slots = Slots(64, fuse.PAGE_SIZE, 4)
    with packet_pipe(64) as first, packet_pipe(64) as second, packet_pipe(64) as third, packet_pipe(64) as last:
        router = Router(slots, [writer for _, writer in (first, second, third, last)])
        for unique in range(200):
            for shard in range(stuck):
                submit_or_park(router, handle(shard=shard), 10 * unique + shard)
        free = bytes(slots.states).count(0)
        assert free >= 64 // (stuck + 1) - 1
        assert all(len(slots.lent_to(shard)) <= free + 2 for shard in range(stuck))
        # A worker that works gets as many requests as it may have at a time.
        for unique in range(10_000, 10_000 + free // 2):
            assert submit(router, handle(shard=3), unique)


def test_parked_requests_are_sent_in_order(router: Router, pipes: Pipes, slots: Slots, idle: int) -> None:
    for unique in range(8):
        submit_or_park(router, handle(), unique)
    done: list[int] = []
    deadline = time.monotonic() + 30

    def work() -> None:
        while len(done) < 8 and time.monotonic() < deadline:
            for request in pipes.take(0):
                done.append(request.unique)
                slots.give_back(request.slot)
            time.sleep(0.002)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        router.wait(idle)  # nothing reports that a slot is free
    finally:
        worker.join()
    assert done == list(range(8))
    assert not router.backlog


def test_parked_payload_arrives_unchanged(router: Router, pipes: Pipes, slots: Slots, idle: int) -> None:
    pipes.fill(0)
    slots.payload(slots.free_slot(), 4)[:] = b"mine"
    assert not submit(router, handle(), 5, Operation.WRITE, 4)
    park(router, handle(), 5, Operation.WRITE, 4)
    slots.payload(slots.free_slot(), 4)[:] = b"next"  # another request uses the slot now
    pipes.take(0)
    router.wait(idle)
    (request,) = pipes.take(0)
    assert bytes(slots.payload(request.slot, 4)) == b"mine"
    assert request.slot != slots.free_slot()


def test_parked_request_is_not_overtaken(router: Router, pipes: Pipes) -> None:
    pipes.fill(0)
    submit_or_park(router, handle(), 1)
    pipes.take(0)
    assert not submit(router, handle(), 2)
    assert submit(router, handle(shard=1), 3)


def test_parked_payload_is_limited(router: Router, pipes: Pipes, monkeypatch: pytest.MonkeyPatch, idle: int) -> None:
    monkeypatch.setattr("llloop.front.router.MAX_PARKED", 10_000)
    pipes.fill(0)
    arguments = (router, handle(), 5, Operation.WRITE, 4096)
    park(*arguments)
    park(*arguments)
    with fails(errno.ENOMEM):
        park(*arguments)
    pipes.take(0)
    router.wait(idle)
    park(*arguments)


def test_wait_ends_with_a_request_while_a_worker_hangs(router: Router, slots: Slots) -> None:
    for unique in range(8):
        submit_or_park(router, handle(), unique)
    device, request = os.pipe()
    os.write(request, b"!")
    try:
        router.wait(device)
        assert router.backlog
    finally:
        os.close(device)
        os.close(request)


RESENT = 1 << 63


def lend(slots: Slots, slot: int, shard: int, unique: int, operation: Operation = Operation.READ) -> None:
    slots.lend(slot, shard, encode((operation, unique, slot, 7, 33)), unique)


def successor(slots: Slots, pipes: Pipes) -> Router:
    slots.set_front(os.getpid())
    router = Router(slots, pipes.writers)
    router.take_over()
    return router


def reminded(pipes: Pipes, shard: int) -> list[int]:
    found: list[int] = []
    for request in pipes.take(shard):
        assert (request.operation, request.slot) == (Operation.RESUME, -1)
        found += request.extra
    return found


def test_resent_request_of_a_worker_is_claimed(pipes: Pipes, slots: Slots) -> None:
    """The worker answers with the new `unique`, even if it has not received the message yet."""
    lend(slots, 2, 1, 100)
    router = successor(slots, pipes)
    assert router.claim(100 | RESENT)
    assert (slots.numbers[2], slots.claims[2]) == (100 | RESENT, slots.generation)
    assert reminded(pipes, 1) == [100 | RESENT]
    assert not router.claim(102 | RESENT), "that is nobody's"
    router.finish_takeover()
    assert reminded(pipes, 1) == [], "it will be answered under the new number"
    assert slots.lent_to(1) != []


def test_request_resent_twice_is_claimed(pipes: Pipes, slots: Slots) -> None:
    lend(slots, 2, 1, 100)
    for _ in range(3):
        router = successor(slots, pipes)
        assert not slots.resent_received
        assert router.claim(100 | RESENT)
        assert slots.claims[2] == slots.generation
        assert reminded(pipes, 1) == [100 | RESENT]


def test_answered_request_only_gives_back_its_slot(pipes: Pipes, slots: Slots) -> None:
    lend(slots, 0, 0, 100)
    lend(slots, 1, 1, 102)
    router = successor(slots, pipes)
    assert router.claim(100 | RESENT)
    reminded(pipes, 0)
    router.finish_takeover()
    assert slots.resent_received
    assert reminded(pipes, 1) == [102]
    assert reminded(pipes, 0) == []


def test_probe_is_not_claimed(pipes: Pipes, slots: Slots) -> None:
    lend(slots, 0, 0, 100, Operation.PROBE)
    router = successor(slots, pipes)
    assert not router.claim(100 | RESENT), "the request is asked about again, or served"
    router.finish_takeover()
    assert reminded(pipes, 0) == [100]


def test_slot_given_back_is_not_claimed(pipes: Pipes, slots: Slots) -> None:
    lend(slots, 0, 0, 100)
    router = successor(slots, pipes)
    slots.give_back(0)
    assert not router.claim(100 | RESENT)
    router.finish_takeover()
    assert reminded(pipes, 0) == []


def test_resume_messages_are_split(pipes: Pipes, idle: int) -> None:
    """A message longer than a packet would be torn apart."""
    uniques = [1 << 63 | number for number in range(1000)]
    slots = Slots(len(uniques), 4096, 1)
    for slot, unique in enumerate(uniques):
        lend(slots, slot, 0, unique)
    router = successor(slots, Pipes([(pipes.readers[0], pipes.writers[0])]))
    router.finish_takeover()
    found = reminded(pipes, 0)
    while router.backlog:
        router.wait(idle, timeout=0)
        found += reminded(pipes, 0)
    assert sorted(found) == uniques


def test_resume_waits_for_a_full_pipe(pipes: Pipes, slots: Slots) -> None:
    for shard in (0, 1):
        lend(slots, shard, shard, 100 + shard)
    pipes.fill(0)
    router = successor(slots, pipes)
    router.finish_takeover()
    router.release(7, handle(shard=0))
    assert {request.operation for request in pipes.take(0)} == {Operation.FSYNC}
    assert reminded(pipes, 1) == [101]
    assert router.backlog
    device, tell = os.pipe()
    os.write(tell, b"!")
    router.wait(device)
    assert [(request.operation, request.extra) for request in pipes.take(0)] == [
        (Operation.RESUME, (100,)),
        (Operation.RELEASE, (7,)),
    ]
    os.close(device)
    os.close(tell)


def test_small_request_overtakes_parked_large_ones(router: Router, pipes: Pipes, idle: int) -> None:
    """A small read does not wait for all the writes of another process."""
    pipes.fill(0)
    for unique in (1, 2):
        assert not submit(router, handle(), unique, Operation.WRITE, 100_000)
        park(router, handle(), unique, Operation.WRITE, 100_000)
    submit_or_park(router, handle(), 3)
    pipes.take(0)
    router.wait(idle)
    assert [request.unique for request in pipes.take(0)] == [3, 1, 2]


def test_users_take_turns(router: Router, pipes: Pipes, idle: int) -> None:
    """Nobody waits for all that another has parked before; what is parked of one file stays in its order."""
    pipes.fill(0)
    own = {1000: 50, 1001: 51, 1002: 52}  # the file of each
    parked = [(1000, 50), (1000, 50), (1000, 50), (1001, 51), (1002, 50), (1001, 51), (1002, 52)]
    for unique, (uid, nodeid) in enumerate(parked):
        opened = handle()
        opened.nodeid = nodeid
        request = at_hand(router, unique)
        one = message(request, opened, Operation.WRITE, 4)._replace(uid=uid)
        router.park(request, 0, one)
    pipes.take(0)
    sent: list[tuple[int, int, int]] = []
    for _ in parked:
        router.wait(idle, timeout=0)
        for got in pipes.take(0):
            sent.append((got.uid, got.nodeid, got.unique))
            router.slots.give_back(got.slot)
    assert [(uid, nodeid) for uid, nodeid, _ in sent[:3]] == list(own.items())
    assert [unique for _, nodeid, unique in sent if nodeid == 50] == [0, 1, 2, 4]
    assert len(sent) == len(parked)


def test_no_payload_is_copied_before_there_is_room(
    router: Router, pipes: Pipes, slots: Slots, idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipes.fill(0)
    park(router, handle(), 1, Operation.WRITE, 4)
    park(router, handle(), 2, Operation.WRITE, 100_000)
    copied = []
    payload = slots.payload

    def noted(slot: int, size: int) -> memoryview:
        copied.append(size)
        return payload(slot, size)

    monkeypatch.setattr(slots, "payload", noted)
    router.wait(idle, timeout=0)
    assert copied in ([], [4])
    copied.clear()
    router.wait(idle, timeout=0)
    assert copied == [], "the pipe is still full"
    pipes.take(0)
    monkeypatch.setattr(router, "_may_have_large", lambda shard, kind: False)
    monkeypatch.setattr("llloop.front.router.LARGE_AT_ONCE", 0)
    router.wait(idle, timeout=0)
    assert copied == [4], "there may be no more large ones"
    monkeypatch.undo()
    router.wait(idle)
    assert [request.unique for request in pipes.take(0)] == [1, 2]


@pytest.mark.root  # an ordinary user has no more pipes
def test_parked_large_payloads_are_not_copied(pipes: Pipes, idle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay in pipes, in their order, and are moved back into the pipe of a slot."""
    slots = Slots(8, 32 * fuse.PAGE_SIZE, 2)
    payload_pipes = slots.open_pipes()
    # A payload that is copied would not be parked.
    monkeypatch.setattr("llloop.front.router.MAX_PARKED", 0)
    router = Router(slots, pipes.writers)
    size = 100_000
    try:
        for unique in range(6):
            content = bytes([unique]) * size
            assert os.write(payload_pipes.descriptors[2 * slots.free_slot() + 1], content) == size
            router.dispatch(at_hand(router, unique), handle(), 7, Operation.WRITE, 0, size, PIPED)
        assert router.backlog
        done: list[int] = []
        while len(done) < 6:
            for request in pipes.take(0):
                assert request.flags & PIPED
                taken = b""
                while len(taken) < size:
                    piece = bytearray(size)
                    taken += piece[: payload_pipes.take(request.slot, memoryview(piece))]
                assert taken == bytes([request.unique]) * size
                done.append(request.unique)
                slots.give_back(request.slot)
            router.wait(idle)
        assert done == list(range(6))
        assert payload_pipes.lent == 0
    finally:
        payload_pipes.close()


def test_worker_gets_parked_payloads_when_another_one_has_all_pipes(pipes: Pipes, idle: int) -> None:
    """A stopped worker can have all slots with pipes, because requests without pipes occupy such slots, too."""
    slots = Slots(64, 32 * fuse.PAGE_SIZE, 2)
    payload_pipes = slots.open_pipes()
    if len(payload_pipes) < 16:
        pytest.skip("an ordinary user has fewer pipes")
    router = Router(slots, pipes.writers)
    size = 100_000
    try:
        given: set[int] = set()
        for unique in range(14):
            router.dispatch(at_hand(router, unique), handle(), 7, Operation.READ, 0, size)
            given.update(request.slot for request in pipes.take(0))
        assert given == set(range(14))
        for unique in range(20, 26):
            writer = payload_pipes.descriptors[2 * slots.free_slot() + 1]
            assert os.write(writer, bytes([unique]) * size) == size
            router.dispatch(at_hand(router, unique), handle(shard=1), 7, Operation.WRITE, 0, size, PIPED)
        done: list[int] = []
        while len(done) < 6:
            for request in pipes.take(1):
                assert not request.flags & PIPED
                assert slots.payload(request.slot, size) == bytes([request.unique]) * size
                done.append(request.unique)
                slots.give_back(request.slot)
            router.wait(idle, timeout=10)
        assert done == list(range(20, 26))
    finally:
        payload_pipes.close()


def test_withdrawn_request_is_not_sent(router: Router, pipes: Pipes, slots: Slots) -> None:
    opened = handle()
    pipes.fill(0)
    for unique in range(1, 4):
        park(router, opened, unique, Operation.WRITE, length=8)
    assert router.caller_of_parked(2) == 0
    router.unpark(2)
    assert router.caller_of_parked(2) is None
    pipes.take(0)
    router.wait(timeout=0)
    assert [request.unique for request in pipes.take(0)] == [1, 3]
    found = router.find(3 | fuse.FUSE_UNIQUE_RESEND)
    assert found is not None and found.unique == 3 and found.message is not None
    assert router.find(2) is None
    slots.stages[found.message.slot] = 3
    assert not router.is_done(found)
    slots.results[found.message.slot] = ~8
    assert router.is_done(found)
