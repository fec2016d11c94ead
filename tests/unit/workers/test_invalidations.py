"""Requests that wait until the kernel has dropped pages, in the worker and in the invalidator."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llloop.linux import fuse
from llloop.shared.leadership import Leadership
from llloop.shared.messages import INVALIDATE, MAX_MESSAGE, Operation, decode, decode_invalidation, encode
from llloop.shared.slots import Slots
from llloop.supervisor.invalidator import InvalidatorSetup, run_invalidator
from llloop.workers import invalidations
from llloop.workers.descriptors import Descriptors
from llloop.workers.loop import Worker
from tests.unit.support import Device
from tests.unit.workers.test_operations import Bench

NODEID = 77


@pytest.fixture
def bench(slots: Slots, device: Device, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(slots, device, tmp_path)
    yield bench
    bench.close()


def asked(bench: Bench) -> tuple[int, int, int, int]:
    return decode_invalidation(os.read(bench.asked[0], MAX_MESSAGE))


def dropped(bench: Bench, unique: int) -> None:
    held = bench.invalidations.take(unique)
    assert held is not None
    left = bench.operations.continue_held(held)
    if left is not None:
        bench.operations.resume(left)


def lent(bench: Bench) -> int:
    return sum(1 for state in bench.slots.states if state)


def test_lseek_sees_writes_of_dropped_pages(bench: Bench) -> None:
    path = bench.open(1)
    os.truncate(path, 1 << 20)
    request = bench.lend(Operation.LSEEK, flags=INVALIDATE, extra=(os.SEEK_DATA, NODEID))
    assert not bench.operations.execute(request)
    assert bench.device.take() == []
    assert asked(bench) == (request.unique, NODEID, 0, 0)
    with path.open("r+b") as file:
        file.seek(1 << 19)
        file.write(b"data")
    dropped(bench, request.unique)
    reply = bench.answered(request)
    assert int.from_bytes(reply.payload, "little") == 1 << 19


def test_getattr_waits_for_pages_of_a_write(bench: Bench) -> None:
    path = bench.open(1, b"old")
    request = bench.lend(Operation.WRITE, payload=b"new", flags=INVALIDATE, extra=(NODEID,))
    assert bench.operations.execute(request)
    assert bench.device.only().unique == request.unique, "the kernel may keep a page locked until it is answered"
    assert path.read_bytes() == b"new"
    assert asked(bench) == (request.unique, NODEID, 0, 3)
    other = bench.lend(Operation.GETATTR, extra=(NODEID + 1, fuse.error_reply(98, 0)))
    assert bench.operations.execute(other)
    assert bench.device.only().unique == other.unique
    follower = bench.lend(Operation.GETATTR, extra=(NODEID, fuse.error_reply(99, 0)))
    assert not bench.operations.execute(follower)
    assert bench.device.take() == []
    assert lent(bench) == 2
    dropped(bench, request.unique)
    assert bench.device.only().unique == follower.unique
    assert lent(bench) == 0


def test_successor_drops_the_pages_again(bench: Bench) -> None:
    bench.open(1, b"old")
    request = bench.lend(Operation.WRITE, payload=b"new", flags=INVALIDATE, extra=(NODEID,))
    bench.operations.execute(request)
    assert bench.device.only().unique == request.unique
    asked(bench)
    bench.invalidations.take(request.unique)  # as if the worker had died
    bench.operations.resume(request)
    assert asked(bench) == (request.unique, NODEID, 0, 0), "and those of others that it may have waited for"
    dropped(bench, request.unique)
    assert lent(bench) == 0


def test_at_most_two_writes_of_an_inode_are_held(bench: Bench) -> None:
    """Otherwise they could occupy all slots, and the READ for which the kernel waits would get none."""
    bench.open(1, bytes(100))
    requests = [
        bench.lend(Operation.WRITE, payload=b"new", offset=10 * number, flags=INVALIDATE, extra=(NODEID,))
        for number in range(3)
    ]
    for request in requests[:2]:
        bench.operations.execute(request)
    follower = bench.lend(Operation.GETATTR, extra=(NODEID, fuse.error_reply(99, 0)))
    assert not bench.operations.execute(follower)
    bench.operations.execute(requests[2])
    bench.device.take()
    assert lent(bench) == 3, "two writes and who follows them"
    assert asked(bench) == (requests[0].unique, NODEID, 0, 3)
    dropped(bench, requests[0].unique)
    assert bench.device.take() == []
    assert asked(bench) == (requests[2].unique, NODEID, 10, 13)
    dropped(bench, requests[2].unique)
    assert bench.device.only().unique == follower.unique
    assert lent(bench) == 0


def test_invalidator_is_asked_again_after_timeout(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The invalidator may have been killed."""
    monkeypatch.setattr(invalidations, "ANSWER_TIMEOUT", 0.01)
    bench.open(1)
    reader, writer = os.pipe2(os.O_DIRECT)
    descriptors = Descriptors(bench.slots)
    worker = Worker(
        1, bench.slots, reader, bench.operations, bench.counters, descriptors, Leadership(), bench.invalidations
    )
    request = bench.lend(Operation.LSEEK, flags=INVALIDATE, extra=(os.SEEK_HOLE, NODEID))
    bench.operations.execute(request)
    running = threading.Thread(target=worker.run)
    running.start()
    try:
        assert asked(bench) == asked(bench) == (request.unique, NODEID, 0, 0)
    finally:
        os.close(writer)
        running.join(30)
        os.close(reader)


def test_invalidator_answers_the_worker_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llloop.supervisor.invalidator.drop_capabilities_except", lambda capabilities: None)
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr("llloop.shared.notifications.drop_pages", lambda *arguments: told.append(arguments))
    wanted = [os.pipe2(os.O_DIRECT) for _ in range(2)]
    pipes = [os.pipe2(os.O_DIRECT) for _ in range(2)]
    setup = InvalidatorSetup(-1, [reader for reader, _ in wanted], [writer for _, writer in pipes])
    running = threading.Thread(target=run_invalidator, args=(setup,))
    running.start()
    try:
        os.write(wanted[1][1], encode((5, NODEID, 100, 200)))
        message = decode(os.read(pipes[1][0], MAX_MESSAGE))
        assert (message.operation, message.slot, message.extra) == (Operation.INVALIDATED, -1, (5,))
        assert told == [(-1, NODEID, 100, 200)]
    finally:
        for _, writer in wanted:
            os.close(writer)
        running.join(30)
        for fd in (*(reader for reader, _ in wanted), *(end for pipe in pipes for end in pipe)):
            os.close(fd)
