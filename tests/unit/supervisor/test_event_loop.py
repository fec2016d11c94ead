"""The supervisor's event loop."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Iterator
from functools import partial

import pytest

from llloop.linux.process import fork
from llloop.supervisor.event_loop import EventLoop

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SECONDS = 10.0  # the maximum wait for an event that must come


@pytest.fixture
def loop() -> EventLoop:
    return EventLoop()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_a_descriptor_is_reported_as_long_as_it_is_readable(loop: EventLoop, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    calls: list[str] = []
    loop.watch(reader, lambda: calls.append("readable"))
    assert not loop.run_once(0)
    os.write(writer, b"!")
    assert loop.run_once(SECONDS)
    assert loop.run_once(SECONDS)
    os.read(reader, 1)
    assert not loop.run_once(0)
    assert calls == ["readable"] * 2


def test_the_last_to_watch_is_called(loop: EventLoop, pipe: tuple[int, int]) -> None:
    _, writer = pipe
    calls: list[str] = []
    loop.watch(writer, lambda: calls.append("readable"))
    loop.watch(writer, lambda: calls.append("writable"), writing=True)
    assert loop.run_once(SECONDS)
    assert calls == ["writable"]
    loop.forget(writer)
    loop.forget(writer)
    assert not loop.run_once(0)


def test_what_a_call_has_closed_is_not_reported_any_more(loop: EventLoop) -> None:
    """Not even if another descriptor has its number by then."""
    pipes = [os.pipe() for _ in range(2)]
    calls: list[int] = []

    def replace(number: int) -> None:
        calls.append(number)
        other = pipes[1 - number][0]
        loop.close(other)
        assert os.dup2(idle, other) == other
        loop.watch(other, lambda: calls.append(99))

    idle, idle_writer = os.pipe()
    for number, (reader, writer) in enumerate(pipes):
        loop.watch(reader, partial(replace, number))
        os.write(writer, b"!")
    try:
        assert loop.run_once(SECONDS)
        assert calls == [0]
    finally:
        for fd in (*pipes[0], *pipes[1], idle, idle_writer):
            os.close(fd)


def test_deadlines_are_called_once_and_in_order(loop: EventLoop) -> None:
    calls: list[str] = []
    late, early = loop.deadline(lambda: calls.append("late")), loop.deadline(lambda: calls.append("early"))
    late.set_in(0.02)
    early.set_in(0.01)
    begun = time.monotonic()
    while len(calls) < 2:
        assert loop.run_once(SECONDS)
    assert time.monotonic() - begun >= 0.02
    assert calls == ["early", "late"]
    assert loop.due() is None
    assert not loop.run_once(0)


def test_a_deadline_can_be_changed_and_cancelled(loop: EventLoop) -> None:
    calls: list[str] = []
    deadline, other = loop.deadline(lambda: calls.append("one")), loop.deadline(lambda: calls.append("other"))
    deadline.set_in(0)
    deadline.set_in(SECONDS)
    other.set_in(0)
    other.cancel()
    assert not loop.run_once(0)
    deadline.set_in(0)
    assert loop.run_once(SECONDS)
    assert calls == ["one"]


def test_a_call_may_cancel_another_deadline(loop: EventLoop) -> None:
    calls: list[str] = []
    second = loop.deadline(lambda: calls.append("second"))

    def cancel_second() -> None:
        calls.append("first")
        second.cancel()

    first = loop.deadline(cancel_second)
    first.set_in(0)
    second.set_in(0)
    assert loop.run_once(SECONDS)
    assert not loop.run_once(0)
    assert calls == ["first"]


def test_it_stops_at_once(loop: EventLoop) -> None:
    pipes = [os.pipe() for _ in range(2)]
    calls: list[str] = []

    def called() -> None:
        calls.append("called")
        loop.stop()

    loop.deadline(called).set_in(0)
    for reader, writer in pipes:
        loop.watch(reader, called)
        os.write(writer, b"!")
    loop.run()
    assert calls == ["called"]
    for fd in (*pipes[0], *pipes[1]):
        os.close(fd)


def test_what_a_call_raises_ends_it(loop: EventLoop) -> None:
    loop.deadline(partial(operator.floordiv, 1, 0)).set_in(0)
    with pytest.raises(ZeroDivisionError):
        loop.run()


def test_the_end_of_a_process(loop: EventLoop, pipe: tuple[int, int]) -> None:
    """Not that it closes what it has: the source's check closes everything, and goes on."""
    reader, writer = pipe

    def closes_all() -> None:
        os.closerange(reader + 1, 1000)
        os.read(reader, 1)

    descriptors = len(os.listdir("/proc/self/fd"))
    process = fork(closes_all, "llloop-test")
    pidfd = process.pidfd
    codes: list[int] = []
    loop.watch_process(process, codes.append)
    assert not loop.run_once(0.05)
    os.write(writer, b"!")
    assert loop.run_once(SECONDS)
    assert codes == [0]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(OSError):
        os.fstat(pidfd)


def test_a_forked_child_does_not_keep_it_awake(loop: EventLoop) -> None:
    """A closed descriptor that a child has, too, is reported no more."""
    reader, writer = os.pipe()
    loop.watch(reader, lambda: pytest.fail("it was closed"))
    os.write(writer, b"!")
    hold_reader, hold_writer = os.pipe()
    process = fork(lambda: len(os.read(hold_reader, 1)), "llloop-test")
    loop.close(reader)
    assert not loop.run_once(0.05)
    os.write(hold_writer, b"!")
    process.wait()
    for fd in (writer, hold_reader, hold_writer):
        os.close(fd)
