"""The main loop of a worker: messages from the pipe, and requests that a previous worker has left."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from llloop.shared.leadership import Leadership
from llloop.shared.messages import Operation, Request, encode
from llloop.shared.metrics import ProcessCounters
from llloop.shared.slots import Slots
from llloop.workers.descriptors import Descriptors
from llloop.workers.invalidations import Invalidations
from llloop.workers.loop import Worker

SHARD = 1


class Recorder:
    """Replaces `Operations`: records requests and gives back their slots."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.executed: list[int] = []
        self.resumed: list[int] = []

    def execute(self, request: Request) -> bool:
        self.executed.append(request.unique)
        if request.slot >= 0:
            self.slots.give_back(request.slot)
        return True

    def resume(self, request: Request) -> bool:
        self.resumed.append(request.unique)
        self.slots.give_back(request.slot)
        return True


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe2(os.O_DIRECT)
    yield reader, writer
    os.close(reader)


@pytest.fixture
def recorder(slots: Slots) -> Recorder:
    return Recorder(slots)


@pytest.fixture
def counters() -> ProcessCounters:
    return ProcessCounters()


def new_worker(slots: Slots, pipe: int, recorder: Recorder, counters: ProcessCounters) -> Worker:
    return Worker(SHARD, slots, pipe, recorder, counters, Descriptors(slots), Leadership(), Invalidations(-1))  # type: ignore[arg-type]


def do_waiting(worker: Worker) -> None:
    """Do what a worker before this one has left, before there is a message."""
    worker.recover()
    assert worker.do_waiting()


@pytest.fixture
def worker(slots: Slots, pipe: tuple[int, int], recorder: Recorder, counters: ProcessCounters) -> Worker:
    return new_worker(slots, pipe[0], recorder, counters)


def message(unique: int, slot: int = -1) -> bytes:
    return encode((Operation.READ, unique, slot, 1, 2))


def lend(slots: Slots, slot: int, unique: int, shard: int = SHARD) -> None:
    slots.lend(slot, shard, message(unique, slot), unique)


def test_messages_are_done_in_order_until_end_of_pipe(
    worker: Worker, pipe: tuple[int, int], recorder: Recorder
) -> None:
    for unique in (3, 1, 2):
        os.write(pipe[1], message(unique))
    os.close(pipe[1])
    worker.run()
    assert recorder.executed == [3, 1, 2]
    assert recorder.resumed == []


def test_invalid_messages_are_logged_and_dropped(
    worker: Worker, pipe: tuple[int, int], recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    for data in (b"\xc1", encode([]), message(1)[:-1], message(7)):
        os.write(pipe[1], data)
    os.close(pipe[1])
    with caplog.at_level(logging.ERROR):
        worker.run()
    assert recorder.executed == [7]
    assert len(caplog.records) == 3


def test_recovery_does_unanswered_requests_oldest_first(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    for slot, unique in enumerate((30, 10, 20)):
        lend(slots, slot, unique)
    lend(slots, 3, 5, 0)
    do_waiting(worker)
    assert recorder.resumed == [10, 20, 30]
    assert [slot for slot, _ in slots.lent_to(0)] == [3], "another worker's"
    assert slots.free_slot() == 0
    os.close(pipe[1])


def test_recovered_requests_in_the_pipe_are_not_repeated(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    for slot, unique in enumerate((10, 11, 12)):
        lend(slots, slot, unique)
        if unique > 10:  # 10 was taken off the pipe by the worker that died
            os.write(pipe[1], message(unique, slot))
    do_waiting(worker)
    os.write(pipe[1], message(13))
    os.close(pipe[1])
    worker.run()
    assert recorder.resumed == [10, 11, 12]
    assert recorder.executed == [13]


def test_releases_in_the_pipe_are_done_after_recovery(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    lend(slots, 0, 10)
    os.write(pipe[1], encode((Operation.RELEASE, 0, -1, -1, -1, 0, 0, 0, 0, 0, (1,))))
    do_waiting(worker)
    os.close(pipe[1])
    worker.run()
    assert recorder.executed == [0]


def test_resume_ignores_newer_requests_in_the_same_slots(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    """The worker died before it read RESUME. Its successor did the requests, and the front reused the slots."""
    lend(slots, 0, 10)
    os.write(pipe[1], encode((Operation.RESUME, 0, -1, -1, -1, 0, 0, 0, 0, 0, (10, 11))))
    do_waiting(worker)
    lend(slots, 0, 12)
    os.write(pipe[1], message(12, 0))
    os.close(pipe[1])
    worker.run()
    assert recorder.resumed == [10]
    assert recorder.executed == [12]


def test_recovery_skips_slots_with_invalid_requests(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    slots.lend(0, SHARD, b"\xff\xff")
    lend(slots, 1, 4)
    with caplog.at_level(logging.ERROR):
        do_waiting(worker)
    os.close(pipe[1])
    assert recorder.resumed == [4]
    assert len(caplog.records) == 1


def resume(uniques: list[int]) -> bytes:
    return encode((Operation.RESUME, 0, -1, -1, -1, 0, 0, 0, 0, 0, uniques))


def test_resume_does_requests_whose_message_was_never_sent(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    lend(slots, 0, 10)
    os.write(pipe[1], message(10, 0))  # told
    lend(slots, 2, 12)
    lend(slots, 1, 11)
    lend(slots, 3, 13, 0)
    os.write(pipe[1], resume([10, 11, 12]))
    os.write(pipe[1], resume([]))
    os.close(pipe[1])
    worker.run()
    assert recorder.executed == [10], "it was told of this and has done it before it is reminded"
    assert recorder.resumed == [11, 12]
    assert [slot for slot, _ in slots.lent_to(0)] == [3], "another worker's"


def test_requests_after_resume_are_done_from_their_messages(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    os.write(pipe[1], resume([10]))
    lend(slots, 1, 11)
    os.write(pipe[1], message(11, 1))
    os.close(pipe[1])
    worker.run()
    assert recorder.resumed == []
    assert recorder.executed == [11]


def test_resume_after_recovery_repeats_nothing(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    """Front and worker were both killed."""
    lend(slots, 0, 10)
    os.write(pipe[1], message(10, 0))
    lend(slots, 1, 11)
    os.write(pipe[1], resume([10, 11]))
    do_waiting(worker)
    os.close(pipe[1])
    worker.run()
    assert sorted(recorder.resumed) == [10, 11]
    assert recorder.executed == []


RESENT = 1 << 63


def test_second_successor_does_not_repeat_requests(
    slots: Slots, pipe: tuple[int, int], recorder: Recorder, counters: ProcessCounters
) -> None:
    """The first successor died before it read the messages from the pipe. There may be newer data since."""
    for slot in range(3):
        lend(slots, slot, 10 + slot)
        os.write(pipe[1], message(10 + slot, slot))
    do_waiting(new_worker(slots, pipe[0], recorder, counters))
    assert recorder.resumed == [10, 11, 12]
    third = new_worker(slots, pipe[0], recorder, counters)
    do_waiting(third)
    lend(slots, 1, 20)  # the slot was given back and lent again
    os.write(pipe[1], message(20, 1))
    os.close(pipe[1])
    third.run()
    assert recorder.resumed == [10, 11, 12]
    assert recorder.executed == [20]


def test_resent_request_is_found_with_old_and_new_unique(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    """The message of the dead front is still in the pipe."""
    lend(slots, 0, 10)
    os.write(pipe[1], message(10, 0))
    slots.claim(0, 10 | RESENT)
    os.write(pipe[1], resume([10 | RESENT]))
    os.close(pipe[1])
    worker.run()
    assert (recorder.resumed, recorder.executed) == ([10], [])
    assert slots.lent_to(SHARD) == []


def test_begun_request_is_resumed_first(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    for slot in range(3):
        lend(slots, slot, 10 + slot)
    lend(slots, 3, 1 | RESENT)
    slots.stages[2] = 1
    do_waiting(worker)
    os.close(pipe[1])
    assert recorder.resumed == [12, 1 | RESENT, 10, 11]
