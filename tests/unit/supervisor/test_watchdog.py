"""Checks from outside whether the front answers requests, and notifications to the service manager."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llloop.linux.fuse import Opcode
from llloop.shared.slots import Slots
from llloop.supervisor import watchdog
from llloop.supervisor.event_loop import EventLoop
from llloop.supervisor.process_info import process_state
from llloop.supervisor.sd_notify import Notifier
from llloop.supervisor.watchdog import Watchdog
from tests.server_processes import wait_until


class Manager(Notifier):
    """A service manager that wants to hear something every 10 milliseconds."""

    def __init__(self) -> None:
        super().__init__({})
        self.interval = 0.01
        self.told = 0

    def alive(self) -> None:
        self.told += 1


class Bench:
    """A front that does nothing, and the kernel's number of waiting requests."""

    def __init__(self, slots: Slots, directory: Path) -> None:
        self.slots = slots
        self.waiting = directory / "57" / "waiting"
        self.waiting.parent.mkdir()
        self.set_waiting(0)
        self.pid = os.fork()
        if self.pid == 0:
            signal.pause()
        front: Any = SimpleNamespace(pid=self.pid)
        self.loop = EventLoop()
        self.notifier = Manager()
        self.watchdog = Watchdog(self.loop, self.notifier, front, slots, (0, 57))

    def set_waiting(self, count: int) -> None:
        self.waiting.write_text(f"{count}\n")

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def bench(slots: Slots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(watchdog, "CONNECTIONS", tmp_path)
    own = Bench(slots, tmp_path)
    yield own
    own.close()


def test_idle_front_counts_as_answering(bench: Bench) -> None:
    assert [bench.watchdog.answers() for _ in range(3)] == [True] * 3


def test_front_with_waiting_requests_does_not_answer(bench: Bench) -> None:
    assert bench.watchdog.answers()
    bench.set_waiting(1)
    assert not bench.watchdog.answers()
    bench.slots.metrics.front.finished(Opcode.GETATTR, 7)
    assert bench.watchdog.answers(), "one was done meanwhile: it is only busy"
    assert not bench.watchdog.answers()
    bench.set_waiting(0)
    assert bench.watchdog.answers()


def test_requests_of_workers_do_not_count(bench: Bench) -> None:
    bench.slots.lend(0, 0, b"message")
    bench.set_waiting(1)
    assert [bench.watchdog.answers() for _ in range(3)] == [True] * 3
    bench.set_waiting(2)
    assert not bench.watchdog.answers()


def test_stopped_or_dead_front_does_not_answer(bench: Bench) -> None:
    os.kill(bench.pid, signal.SIGSTOP)
    assert wait_until(lambda: process_state(bench.pid) == "T")
    assert not bench.watchdog.answers()
    os.kill(bench.pid, signal.SIGKILL)
    assert wait_until(lambda: process_state(bench.pid) == "Z")
    assert not bench.watchdog.answers()
    assert process_state(None) is None


def test_living_front_counts_as_answering_without_fusectl(bench: Bench) -> None:
    bench.waiting.unlink()
    assert [bench.watchdog.answers() for _ in range(3)] == [True] * 3


def test_the_manager_hears_of_a_front_that_answers_only(bench: Bench) -> None:
    bench.watchdog.look()
    for _ in range(3):
        assert bench.loop.run_once(5)
    assert bench.notifier.told == 4
    os.kill(bench.pid, signal.SIGSTOP)
    assert wait_until(lambda: process_state(bench.pid) == "T")
    assert bench.loop.run_once(5)
    assert bench.notifier.told == 4, "it is looked at again, and nothing told"
    bench.watchdog.stop()
    assert bench.loop.due() is None
