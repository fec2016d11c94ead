"""A worker's loop: messages off the pipe, and what a worker before it left."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from llloop.shared.leadership import Leadership
from llloop.shared.messages import Operation, Request, encode
from llloop.shared.metrics import Sheet
from llloop.shared.slots import Slots
from llloop.workers.descriptors import Descriptors
from llloop.workers.invalidations import Invalidations
from llloop.workers.loop import Worker

SHARD = 1


class Recorder:
    """What stands for `Transfers`: notes what it is asked to do, and gives slots back as the real one does."""

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
def sheet() -> Sheet:
    return Sheet()


def new_worker(slots: Slots, pipe: int, recorder: Recorder, sheet: Sheet) -> Worker:
    return Worker(SHARD, slots, pipe, recorder, sheet, Descriptors(slots), Leadership(), Invalidations(-1))  # type: ignore[arg-type]


def catch_up(worker: Worker) -> None:
    """Do what a worker before this one has left, before there is a message."""
    worker.recover()
    assert worker.catch_up()


@pytest.fixture
def worker(slots: Slots, pipe: tuple[int, int], recorder: Recorder, sheet: Sheet) -> Worker:
    return new_worker(slots, pipe[0], recorder, sheet)


def message(unique: int, slot: int = -1) -> bytes:
    return encode((Operation.READ, unique, slot, 1, 2))


def lend(slots: Slots, slot: int, unique: int, shard: int = SHARD) -> None:
    slots.lend(slot, shard, message(unique, slot), unique)


def test_messages_are_done_in_their_order_until_the_front_is_gone(
    worker: Worker, pipe: tuple[int, int], recorder: Recorder
) -> None:
    for unique in (3, 1, 2):
        os.write(pipe[1], message(unique))
    os.close(pipe[1])
    worker.run()
    assert recorder.executed == [3, 1, 2]
    assert recorder.resumed == []


def test_what_is_no_request_is_logged_and_dropped(
    worker: Worker, pipe: tuple[int, int], recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    for data in (b"\xc1", encode([]), message(1)[:-1], message(7)):
        os.write(pipe[1], data)
    os.close(pipe[1])
    with caplog.at_level(logging.ERROR):
        worker.run()
    assert recorder.executed == [7]
    assert len(caplog.records) == 3


def test_what_was_taken_and_not_answered_is_done_oldest_first(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    for slot, unique in enumerate((30, 10, 20)):
        lend(slots, slot, unique)
    lend(slots, 3, 5, 0)
    catch_up(worker)
    assert recorder.resumed == [10, 20, 30]
    assert [slot for slot, _ in slots.lent_to(0)] == [3], "another worker's"
    assert slots.free_slot() == 0
    os.close(pipe[1])


def test_what_still_lies_in_the_pipe_is_not_done_twice(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    for slot, unique in enumerate((10, 11, 12)):
        lend(slots, slot, unique)
        if unique > 10:  # 10 was taken off the pipe by the worker that died
            os.write(pipe[1], message(unique, slot))
    catch_up(worker)
    os.write(pipe[1], message(13))
    os.close(pipe[1])
    worker.run()
    assert recorder.resumed == [10, 11, 12]
    assert recorder.executed == [13]


def test_releases_in_the_pipe_are_done_after_a_recovery(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    lend(slots, 0, 10)
    os.write(pipe[1], encode((Operation.RELEASE, 0, -1, -1, -1, 0, 0, 0, 0, 0, (1,))))
    catch_up(worker)
    os.close(pipe[1])
    worker.run()
    assert recorder.executed == [0]


def test_a_reminder_means_requests_and_not_what_came_into_their_slots_later(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    """It was dead when a new front reminded it; its successor did all that, and the front lent the slot again."""
    lend(slots, 0, 10)
    os.write(pipe[1], encode((Operation.RESUME, 0, -1, -1, -1, 0, 0, 0, 0, 0, (10, 11))))
    catch_up(worker)
    lend(slots, 0, 12)
    os.write(pipe[1], message(12, 0))
    os.close(pipe[1])
    worker.run()
    assert recorder.resumed == [10]
    assert recorder.executed == [12]


def test_a_slot_that_holds_nonsense_does_not_stop_the_recovery(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    slots.lend(0, SHARD, b"\xff\xff")
    lend(slots, 1, 4)
    with caplog.at_level(logging.ERROR):
        catch_up(worker)
    os.close(pipe[1])
    assert recorder.resumed == [4]
    assert len(caplog.records) == 1


def resume(uniques: list[int]) -> bytes:
    return encode((Operation.RESUME, 0, -1, -1, -1, 0, 0, 0, 0, 0, uniques))


def test_what_a_dead_front_lent_and_did_not_tell_of_is_done_when_the_next_says_so(
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


def test_what_was_lent_after_the_reminder_is_told_of_as_ever(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    os.write(pipe[1], resume([10]))
    lend(slots, 1, 11)
    os.write(pipe[1], message(11, 1))
    os.close(pipe[1])
    worker.run()
    assert recorder.resumed == []
    assert recorder.executed == [11]


def test_a_reminder_after_a_recovery_does_nothing_twice(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    """Front and worker were both killed."""
    lend(slots, 0, 10)
    os.write(pipe[1], message(10, 0))
    lend(slots, 1, 11)
    os.write(pipe[1], resume([10, 11]))
    catch_up(worker)
    os.close(pipe[1])
    worker.run()
    assert sorted(recorder.resumed) == [10, 11]
    assert recorder.executed == []


RESENT = 1 << 63


def test_what_its_successor_has_done_is_not_done_by_the_successor_after_it(
    slots: Slots, pipe: tuple[int, int], recorder: Recorder, sheet: Sheet
) -> None:
    """The second was killed before it had taken the messages off the pipe; newer data may have been written since."""
    for slot in range(3):
        lend(slots, slot, 10 + slot)
        os.write(pipe[1], message(10 + slot, slot))
    catch_up(new_worker(slots, pipe[0], recorder, sheet))
    assert recorder.resumed == [10, 11, 12]
    third = new_worker(slots, pipe[0], recorder, sheet)
    catch_up(third)
    lend(slots, 1, 20)  # a slot has been given back and lent again
    os.write(pipe[1], message(20, 1))
    os.close(pipe[1])
    third.run()
    assert recorder.resumed == [10, 11, 12]
    assert recorder.executed == [20]


def test_a_request_that_was_sent_again_is_found_under_either_number(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    """The message of the front that died is in the pipe still."""
    lend(slots, 0, 10)
    os.write(pipe[1], message(10, 0))
    slots.claim(0, 10 | RESENT)
    os.write(pipe[1], resume([10 | RESENT]))
    os.close(pipe[1])
    worker.run()
    assert (recorder.resumed, recorder.executed) == ([10], [])
    assert slots.lent_to(SHARD) == []


def test_what_was_begun_is_gone_on_with_before_anything_else(
    worker: Worker, slots: Slots, pipe: tuple[int, int], recorder: Recorder
) -> None:
    for slot in range(3):
        lend(slots, slot, 10 + slot)
    lend(slots, 3, 1 | RESENT)
    slots.stages[2] = 1
    catch_up(worker)
    os.close(pipe[1])
    assert recorder.resumed == [12, 1 | RESENT, 10, 11]
