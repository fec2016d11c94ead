"""Keeping idle CPUs awake: when the supervisor begins and ends it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from llloop.config import WakeLatency
from llloop.errors import HostError
from llloop.shared.metrics import AWAKE, NEVER, Gauge, Metrics
from llloop.supervisor import cpu_latency
from llloop.supervisor.cpu_latency import CpuLatency
from llloop.supervisor.event_loop import EventLoop

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SECOND = 10**9


class Supervisor:
    """A `CpuLatency` with a file in place of the device, and a clock that the test moves."""

    def __init__(self, device: Path, wanted: WakeLatency) -> None:
        self.now = 10**12
        self.loop = EventLoop()
        self.device = device
        self.asked, self.awake = os.pipe2(os.O_NONBLOCK)
        self.gauges = (metrics := Metrics(1, 1)).gauges
        self.latency = CpuLatency(self.loop, self.asked, metrics, wanted, device=str(device), clock=lambda: self.now)

    def close(self) -> None:
        self.latency.end()
        os.close(self.asked)
        os.close(self.awake)

    def ask(self, seconds: float = AWAKE / SECOND) -> None:
        """Do what the front does when it gets many requests."""
        os.write(self.awake, b"!")
        self.gauges[Gauge.AWAKE_UNTIL] = self.now + int(seconds * SECOND)
        self.loop.run_once(0)

    def let_pass(self, nanoseconds: int) -> None:
        """Let time pass, and run the deadline that the loop has by then."""
        self.now += nanoseconds
        self.loop.run_once(1)

    def holds(self) -> bool:
        """Whether this process has the device open."""
        links = []
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the descriptor of the listing
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
        return str(self.device) in links


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "cpu_dma_latency"
    path.touch()
    return path


@pytest.fixture
def supervisor(device: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(device, WakeLatency.HOLD)
    yield supervisor
    supervisor.close()


def test_cpus_are_awake_from_the_question_to_the_noted_time(supervisor: Supervisor) -> None:
    assert not supervisor.holds()
    supervisor.ask()
    assert supervisor.holds()
    assert supervisor.device.read_bytes() == bytes(4)
    supervisor.let_pass(AWAKE)
    assert not supervisor.holds()
    assert supervisor.latency.seconds == AWAKE / SECOND


def test_the_noted_time_can_be_extended(supervisor: Supervisor) -> None:
    supervisor.ask()
    supervisor.gauges[Gauge.AWAKE_UNTIL] = supervisor.now + 2 * AWAKE
    supervisor.let_pass(AWAKE)
    assert supervisor.holds()
    supervisor.let_pass(AWAKE)
    assert not supervisor.holds()


def test_nothing_is_due_while_nobody_asks(supervisor: Supervisor) -> None:
    assert supervisor.loop.due() is None
    supervisor.ask()
    assert supervisor.loop.due() is not None
    supervisor.let_pass(AWAKE)
    assert supervisor.loop.due() is None


def test_a_late_question_is_ignored(supervisor: Supervisor) -> None:
    supervisor.gauges[Gauge.AWAKE_UNTIL] = supervisor.now - 1
    os.write(supervisor.awake, b"!")
    supervisor.loop.run_once(0)
    assert not supervisor.holds()


def test_short_bursts_keep_cpus_awake_for_a_tenth_of_the_time_in_vain(supervisor: Supervisor) -> None:
    bursts = 0
    end = supervisor.now + 20 * SECOND
    while supervisor.now < end:
        if supervisor.now >= supervisor.gauges[Gauge.HALT_UNTIL]:
            supervisor.ask()
            bursts += 1
            supervisor.let_pass(AWAKE)
        else:
            supervisor.now += AWAKE
    assert 1.9 <= bursts * AWAKE / SECOND <= 2.2


def test_after_a_long_time_without_requests_some_bursts_are_allowed(supervisor: Supervisor) -> None:
    for _ in range(5):
        assert supervisor.now >= supervisor.gauges[Gauge.HALT_UNTIL]
        supervisor.ask()
        supervisor.let_pass(AWAKE)


def test_a_forked_child_does_not_keep_the_device(supervisor: Supervisor) -> None:
    supervisor.ask()
    assert supervisor.holds()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"yes" if supervisor.holds() else b"no")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 9) == b"no"
    assert supervisor.holds()
    os.close(reader)
    os.close(writer)


def test_never_ignores_the_front(device: Path) -> None:
    supervisor = Supervisor(device, WakeLatency.NEVER)
    assert supervisor.gauges[Gauge.HALT_UNTIL] == NEVER
    supervisor.ask()
    assert not supervisor.holds()
    supervisor.close()


@pytest.mark.parametrize(
    ("driver", "cpus", "held"), [("haltpoll", 4, True), ("haltpoll", 64, False), ("none", 2, False)]
)
def test_auto_only_does_what_helps(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, cpus: int, held: bool
) -> None:
    (tmp_path / "driver").write_text(f"{driver}\n")
    monkeypatch.setattr(cpu_latency, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    supervisor = Supervisor(device, WakeLatency.AUTO)
    supervisor.ask()
    assert supervisor.holds() == held
    supervisor.close()


def test_a_device_that_fails_later_is_given_up(supervisor: Supervisor) -> None:
    supervisor.device.unlink()
    supervisor.ask()
    assert not supervisor.holds()
    assert supervisor.gauges[Gauge.HALT_UNTIL] == NEVER
    assert supervisor.latency.seconds == 0


def test_hold_without_the_device_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(HostError, match=r"--wake-latency hold is not possible: .*missing: No such file"):
        cpu_latency.check(WakeLatency.HOLD, missing)
    cpu_latency.check(WakeLatency.AUTO, missing)
    cpu_latency.check(WakeLatency.NEVER, missing)
