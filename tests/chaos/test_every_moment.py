"""Kills a process at each moment of a scenario: at the beginning and at the end of each of its system calls.

Random kills hit the narrow windows once in a million times. If LLLOOP_CHAOS_SECONDS is set, these tests kill at all
moments, one after the other. The ordinary tests kill at some moments of each scenario.
"""

from __future__ import annotations

import os
import random
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.as_user import Child
from tests.chaos.conftest import BY_HAND
from tests.chaos.scenarios import DATA, LISTING, NAMES, Scenario
from tests.conftest import Serve
from tests.expect import outcome
from tests.kernel_caches import forget_unused
from tests.server import Server
from tests.server_processes import Report, descriptors, front_report, process_ids, wait_until
from tests.tracing import Traced

pytestmark = [
    pytest.mark.root,  # uses ptrace(2)
    pytest.mark.mounted,
    pytest.mark.own_loop,
    pytest.mark.by_workers,
]

# After some processes that lived for less than this, in seconds, the next one starts after a pause.
SHORT_LIFE = 0.27


def state(directory: Path) -> dict[str, tuple[object, ...]]:
    """The result of a scenario, without times and inode numbers."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif path.is_symlink():
            content = os.readlink(path)
        names = os.listxattr(path, follow_symlinks=False)
        attributes = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
        found[path.name] = (status.st_mode, status.st_nlink, content, attributes)
    return found


def process_of(server: Server, role: str, before: int) -> int:
    found: list[int] = []

    def is_there() -> bool:
        found[:] = process_ids(server, role)
        return len(found) == 1 and found[0] != before

    assert wait_until(is_there, 30), server.all_output()
    return found[0]


class KillMatrix:
    """Repeats a scenario, and kills the process at another moment each time."""

    def __init__(self, server: Server, role: str) -> None:
        self._server = server
        self._role = role
        self._victim = 0
        self._done = 0

    def kill_at(self, scenario: Scenario, stops: Iterable[int]) -> int:
        """Kill the process at these stops until the scenario ends before the next one; return the number of kills."""
        expected = self._done_natively(scenario)
        killed = 0
        for stop in stops:
            born = time.monotonic()
            _, was_killed, got = self._do(scenario, stop)
            assert got == expected, f"{scenario.name}: the {self._role} was killed at stop {stop}"
            if not was_killed:
                break
            killed += 1
            time.sleep(max(0.0, SHORT_LIFE - (time.monotonic() - born)))
        return killed

    def kill_at_random(self, scenario: Scenario, chance: random.Random) -> None:
        """Kill the process once, at a random stop of the scenario."""
        # The same scenario takes more stops in one run than in another, so a run may end before the chosen stop.
        stops = self.count_stops(scenario)
        # The first stops are those of the wait for a request.
        while not self.kill_at(scenario, [chance.randrange(3, stops)]):
            stops = max(4, stops * 3 // 4)

    def count_stops(self, scenario: Scenario) -> int:
        """Run the scenario without a kill, and return the number of moments at which the process could be killed."""
        expected = self._done_natively(scenario)
        stops, _, got = self._do(scenario, 0)
        assert got == expected, scenario.name
        return stops

    def _done_natively(self, scenario: Scenario) -> tuple[object, object]:
        self._done += 1
        twin = self._server.source.parent / f"twin-{self._done}"
        twin.mkdir()
        scenario.prepare(twin)
        return outcome(scenario.act, twin), state(twin)

    def _do(self, scenario: Scenario, stop: int) -> tuple[int, bool, tuple[object, object]]:
        self._done += 1
        name = f"{self._done}"
        source = self._server.source / name
        source.mkdir()
        scenario.prepare(source)
        victim = process_of(self._server, self._role, self._victim)
        traced = Traced(victim, self._role)
        child: Child[Any] = Child(outcome, scenario.act, self._server.mountpoint / name)
        try:
            killed = traced.kill_at(stop, child.is_done)
        finally:
            result = child.result()
        self._victim = victim if killed else 0
        return traced.passed, killed, (result, state(source))


def check_nothing_left(server: Server) -> None:
    """Check that the front is as at the beginning after the kernel has forgotten everything."""
    front = process_of(server, "front", 0)

    def held() -> tuple[list[str], Report]:
        report = front_report(server)
        return [
            path for path in descriptors(front) if str(server.source) in path and path != str(server.source)
        ], report

    def is_clean() -> bool:
        forget_unused(server.mountpoint)
        return held() == ([], Report(1, 0, 0, 0))

    assert wait_until(is_clean, 30), f"the front still holds {held()}"


@pytest.fixture
def begin(serve: Serve) -> Callable[..., Server]:
    def start(*arguments: str) -> Server:
        server = serve("--workers", "1", *arguments)
        if "has_resend" not in server.output.read_text():
            pytest.skip("this kernel does not send a dead front's requests again (Linux 6.9)")
        server.expect_log(r"llloop-(front|worker-0) was killed by signal 9")
        return server

    return start


KERNEL = ("--io", "kernel")
COMBINED = [
    ("front", (), [*NAMES, *DATA, LISTING]),
    ("front", KERNEL, [*DATA[:4], DATA[-1]]),
    ("worker", (), [DATA[1], DATA[3], DATA[-1]]),
]


def _title(what: object) -> str:
    return (
        what.name if isinstance(what, Scenario) else "".join(map(str, what)) if isinstance(what, tuple) else str(what)
    )


if BY_HAND:

    @pytest.mark.parametrize(
        ("role", "arguments", "scenario"),
        [(role, arguments, scenario) for role, arguments, scenarios in COMBINED for scenario in scenarios],
        ids=_title,
    )
    def test_every_moment(
        begin: Callable[..., Server], role: str, arguments: tuple[str, ...], scenario: Scenario
    ) -> None:
        server = begin(*arguments)
        moments = KillMatrix(server, role)
        # The listing has too many moments, and they are all similar.
        assert moments.kill_at(scenario, range(1, 1 << 30, 397 if scenario is LISTING else 1)) > 2
        check_nothing_left(server)

else:

    @pytest.mark.parametrize("part", range(3))
    @pytest.mark.parametrize(("role", "arguments", "scenarios"), COMBINED, ids=lambda what: "")
    def test_some_moments(
        begin: Callable[..., Server],
        seed: int,
        role: str,
        arguments: tuple[str, ...],
        scenarios: list[Scenario],
        part: int,
    ) -> None:
        server = begin(*arguments)
        moments = KillMatrix(server, role)
        chance = random.Random(seed)
        for scenario in scenarios[part::3]:
            try:
                for _ in range(2):
                    moments.kill_at_random(scenario, chance)
            except AssertionError as error:
                raise AssertionError(f"with LLLOOP_CHAOS_SEED={seed}: {error}") from None
        check_nothing_left(server)
