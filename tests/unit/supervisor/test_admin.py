"""Checks from outside whether the front answers requests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llloop.control import protocol
from llloop.linux.fuse import Opcode
from llloop.shared.slots import Slots
from llloop.supervisor import admin
from llloop.supervisor.admin import Oversight, Sight, process_state
from llloop.supervisor.sd_notify import Notifier
from llloop.supervisor.source_check import SourceCheck
from tests.server_processes import wait_until


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
        front: Any = SimpleNamespace(name="llloop-front", pid=self.pid, restarts=0)
        self.oversight = Oversight(
            Sight(
                "/nowhere",
                (0, 57),
                {"source": "/src"},
                [front],
                front,
                [],
                slots,
                SourceCheck("/", 0, False),
                lambda: None,
                lambda: None,
            ),
            Notifier({}),
        )

    def set_waiting(self, count: int) -> None:
        self.waiting.write_text(f"{count}\n")

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.oversight.close()


@pytest.fixture
def bench(slots: Slots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(admin, "_CONNECTIONS", tmp_path)
    monkeypatch.setattr(protocol, "own_directories", lambda: [str(tmp_path / "sockets")])
    own = Bench(slots, tmp_path)
    yield own
    own.close()


def test_idle_front_counts_as_answering(bench: Bench) -> None:
    assert [bench.oversight.answers() for _ in range(3)] == [True] * 3


def test_front_with_waiting_requests_does_not_answer(bench: Bench) -> None:
    assert bench.oversight.answers()
    bench.set_waiting(1)
    assert not bench.oversight.answers()
    bench.slots.metrics.front.finished(Opcode.GETATTR, 7)
    assert bench.oversight.answers(), "one was done meanwhile: it is only busy"
    assert not bench.oversight.answers()
    bench.set_waiting(0)
    assert bench.oversight.answers()


def test_requests_of_workers_do_not_count(bench: Bench) -> None:
    bench.slots.lend(0, 0, b"message")
    bench.set_waiting(1)
    assert [bench.oversight.answers() for _ in range(3)] == [True] * 3
    bench.set_waiting(2)
    assert not bench.oversight.answers()


def test_stopped_or_dead_front_does_not_answer(bench: Bench) -> None:
    os.kill(bench.pid, signal.SIGSTOP)
    assert wait_until(lambda: process_state(bench.pid) == "T")
    assert not bench.oversight.answers()
    os.kill(bench.pid, signal.SIGKILL)
    assert wait_until(lambda: process_state(bench.pid) == "Z")
    assert not bench.oversight.answers()
    assert process_state(None) is None


def test_living_front_counts_as_answering_without_fusectl(bench: Bench) -> None:
    bench.waiting.unlink()
    assert [bench.oversight.answers() for _ in range(3)] == [True] * 3
