"""How the front waits for the next request: when it polls, and when it asks for awake CPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import pytest

from llloop.front.waiting import COMPARED, INTERRUPTED, INTERVAL, LIMIT, PAUSE, SLOW, Waiting
from llloop.shared.metrics import AWAKE, NEVER, Gauge, Metrics

# Durations of rounds in nanoseconds.
SHORT, LONG = SLOW // 8, SLOW // 4


class Clock:
    """A clock that the test moves; each look takes *step* nanoseconds."""

    def __init__(self) -> None:
        self.now = 10**12
        self.step = 0

    def __call__(self) -> int:
        self.now += self.step
        return self.now


class Front:
    """A `Waiting` with a device and a supervisor's pipe that are pipes of the test."""

    def __init__(self, can_poll: bool = True) -> None:
        self.clock = Clock()
        self.device, self.requests = os.pipe()
        self.asked, awake = os.pipe2(os.O_NONBLOCK)
        self.metrics = Metrics(1, 1)
        self.waiting = Waiting(self.device, self.metrics, can_poll, awake, self.clock)
        self.descriptors = [self.device, self.requests, self.asked, awake]

    def rounds(self, count: int, sleeping: int, polling: int) -> list[bool]:
        """Let rounds pass that take so long with either way of waiting; return in which of them the front polled."""
        found = []
        for _ in range(count):
            found.append(self.waiting.polls)
            self.clock.now += polling if self.waiting.polls else sleeping
            self.waiting.review(self.clock.now)
        return found

    def polls(self) -> bool:
        """Return whether the front polls for the next request."""
        return self.waiting.polls

    def questions(self) -> int:
        """Return how often the front has asked the supervisor since the last call."""
        try:
            return len(os.read(self.asked, 4096))
        except BlockingIOError:
            return 0


@pytest.fixture
def front() -> Iterator[Front]:
    front = Front()
    yield front
    for fd in front.descriptors:
        os.close(fd)


def test_the_front_polls_if_rounds_then_take_less_time(front: Front) -> None:
    front.rounds(1 + COMPARED, sleeping=LONG, polling=SHORT)
    assert all(front.rounds(INTERVAL - COMPARED - 1, sleeping=LONG, polling=SHORT))


@pytest.mark.parametrize("polling", [LONG, LONG * 97 // 100], ids=["slower", "hardly faster"])
def test_the_front_sleeps_if_polling_saves_nothing(front: Front, polling: int) -> None:
    front.rounds(1 + COMPARED, sleeping=LONG, polling=polling)
    assert not any(front.rounds(INTERVAL - COMPARED - 1, sleeping=LONG, polling=polling))


def test_few_rounds_are_spent_in_the_other_way(front: Front) -> None:
    front.rounds(1, SHORT, LONG)
    polled = front.rounds(10 * INTERVAL, sleeping=SHORT, polling=LONG)
    assert sum(polled) == 10 * COMPARED // 2


def test_another_load_gets_another_decision(front: Front) -> None:
    front.rounds(2 * INTERVAL, sleeping=LONG, polling=SHORT)
    polled = front.rounds(3 * INTERVAL, sleeping=SHORT, polling=LONG)
    assert sum(polled[INTERVAL + COMPARED :]) <= COMPARED


def test_one_round_in_which_others_had_the_cpu_does_not_count(front: Front) -> None:
    front.rounds(2, sleeping=LONG, polling=SHORT)
    front.rounds(1, sleeping=SLOW, polling=SLOW)
    front.rounds(COMPARED, sleeping=LONG, polling=SHORT)
    assert front.polls()


def test_after_few_requests_the_front_sleeps(front: Front) -> None:
    front.rounds(1 + COMPARED, sleeping=LONG, polling=SHORT)
    assert front.polls()
    front.clock.now += SLOW + 1
    front.waiting.review(front.clock.now)
    assert not front.polls()
    assert not any(front.rounds(10, sleeping=SLOW + 1, polling=SLOW + 1))


def test_without_permission_the_front_never_polls() -> None:
    front = Front(can_poll=False)
    assert not any(front.rounds(3 * INTERVAL, sleeping=LONG, polling=SHORT))
    for fd in front.descriptors:
        os.close(fd)


def test_polling_ends_with_a_request(front: Front) -> None:
    os.write(front.requests, b"!")
    before = front.clock.now
    front.waiting.poll()
    assert front.clock.now == before


def test_polling_ends_after_its_limit(front: Front) -> None:
    front.clock.step = 1000
    before = front.clock.now
    front.waiting.poll()
    assert LIMIT <= front.clock.now - before <= LIMIT + 2 * front.clock.step


def test_the_front_stops_polling_if_another_process_uses_the_cpu(front: Front) -> None:
    front.rounds(1 + COMPARED, sleeping=LONG, polling=SHORT)
    assert front.polls()
    front.clock.step = INTERRUPTED + 1
    front.waiting.poll()
    front.clock.step = 0
    assert not front.polls()
    assert not any(front.rounds(PAUSE, sleeping=LONG, polling=SHORT))
    front.rounds(1 + COMPARED, sleeping=LONG, polling=SHORT)
    assert front.polls()


def test_cpus_are_to_be_awake_until_shortly_after_the_last_round(front: Front) -> None:
    front.rounds(2, SHORT, SHORT)
    assert front.metrics.gauges[Gauge.AWAKE_UNTIL] == front.clock.now + AWAKE
    assert front.questions() == 1, "it asks once for a burst of requests"
    front.rounds(5, SHORT, SHORT)
    assert front.metrics.gauges[Gauge.AWAKE_UNTIL] == front.clock.now + AWAKE
    assert not front.questions()


def test_few_requests_wake_nobody(front: Front) -> None:
    front.rounds(10, SLOW + 1, SLOW + 1)
    assert not front.questions()
    assert not front.metrics.gauges[Gauge.AWAKE_UNTIL]


def test_the_front_does_not_ask_in_vain(front: Front) -> None:
    front.metrics.gauges[Gauge.HALT_UNTIL] = NEVER
    front.rounds(10, SHORT, SHORT)
    assert not front.questions()


def test_the_front_asks_again_after_a_refusal(front: Front) -> None:
    front.metrics.gauges[Gauge.HALT_UNTIL] = front.clock.now + 10 * SHORT
    front.rounds(9, SHORT, SHORT)
    assert not front.questions()
    front.rounds(2, SHORT, SHORT)
    assert front.questions() == 1


def test_a_supervisor_that_does_not_read_does_not_hold_up_the_front(front: Front) -> None:
    with suppress(BlockingIOError):
        while True:
            os.write(front.descriptors[-1], bytes(4096))
    front.rounds(2, SHORT, SHORT)
    while front.questions():
        pass
    front.metrics.gauges[Gauge.AWAKE_UNTIL] = 0
    front.rounds(1, SHORT, SHORT)
    assert front.questions() == 1
