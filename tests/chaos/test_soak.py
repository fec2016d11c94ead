"""Continuous work leaves the processes as they were: descriptors, inodes, memory."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from tests.as_user import Child, run_together
from tests.chaos import loads
from tests.chaos.conftest import LAST_ROUND
from tests.chaos.killing import Killer
from tests.chaos.loads import Load, Place
from tests.conftest import Serve
from tests.kernel_caches import forget_unused
from tests.server import Server
from tests.server_processes import descriptors, front_report, private_memory, titles, wait_until

pytestmark = [pytest.mark.root, pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.by_workers]

LOADS: list[Load] = [loads.names, loads.unlinked, loads.xattrs, loads.appends, loads.direct]
# The maximum memory that the interpreter keeps for its next objects, in bytes.
TOLERANCE = 4 << 20


def work(server: Server, scratch: Path, chance: random.Random, seconds: float) -> None:
    """Runs all loads at the same time, and removes their files."""
    end = time.monotonic() + seconds

    def more() -> bool:
        return time.monotonic() < end

    calls = []
    for load in LOADS:
        name = load.__name__
        (server.source / name).mkdir(exist_ok=True)
        place = Place(server.mountpoint / name, server.source / name, chance, more, scratch, direct=False, size=0)
        calls.append((load, (place,)))
    run_together(calls)
    for load in LOADS:
        for path in (server.mountpoint / load.__name__).iterdir():
            path.unlink()


def state(server: Server) -> dict[str, list[str]]:
    """The open descriptors of each process, after the kernel has forgotten what it does not use."""
    forget_unused(server.mountpoint)
    pids = titles(server)
    found = {}
    for title, pid in pids.items():
        paths = [re.sub(r"\d+", "", path) for path in descriptors(pid)]
        # The descriptors that a child inherits from the supervisor depend on the moment of its fork.
        inherited = () if title == "llloop-supervisor" else ("anon_inode:[pidfd]", "pipe:[]")
        found[title] = sorted(path for path in paths if path not in inherited)
    return found


def settled(server: Server) -> dict[str, list[str]]:
    """Wait until the front has received FORGET for all inodes except the root, and return the state."""

    def is_forgotten() -> bool:
        forget_unused(server.mountpoint)
        return front_report(server)[:2] == (1, 0)

    assert wait_until(is_forgotten, 60), f"the front still knows more than the root: {front_report(server)}"
    return state(server)


def same_again(server: Server, before: dict[str, list[str]]) -> None:
    def is_same() -> bool:
        return state(server) == before

    assert wait_until(is_same, 60), {
        title: set(paths) ^ set(before[title]) or (len(paths), len(before[title]))
        for title, paths in state(server).items()
        if paths != before[title]
    }


def test_descriptors_and_memory_do_not_grow(serve: Serve, tmp_path: Path, seconds: float, seed: int) -> None:
    server = serve("--workers", "2")
    chance = random.Random(seed)
    work(server, tmp_path, chance, seconds / 2)
    before = settled(server)
    memory = {title: private_memory(pid) for title, pid in titles(server).items()}
    work(server, tmp_path, chance, seconds)
    same_again(server, before)
    grown = {title: private_memory(pid) - memory[title] for title, pid in titles(server).items()}
    assert all(growth < TOLERANCE for growth in grown.values()), grown


def test_nothing_grows_after_deaths(serve: Serve, tmp_path: Path, seconds: float, seed: int) -> None:
    """Successors find and clean up what a process leaves when it dies in the middle of its work."""
    server = serve("--workers", "2")
    server.expect_log(r"llloop-(front|keeper|worker-\d+) was killed by signal 9")
    chance = random.Random(seed)
    killer = Killer(server, chance)

    def work_and_kill(seconds: float) -> None:
        working = Child(work, server, tmp_path, random.Random(seed), seconds)
        killer.kill_until(working.is_done, (0.1, 0.3), seconds + LAST_ROUND)
        working.result()

    try:
        work_and_kill(seconds / 2)
        for role in ("keeper", "front"):
            killer.kill(role)
        killer.wait_for_all()
        before = settled(server)
        supervisor = private_memory(server.pid)
        work_and_kill(seconds)
        killer.wait_for_all()
        same_again(server, before)
        assert private_memory(server.pid) - supervisor < TOLERANCE
    except AssertionError as error:
        raise AssertionError(f"with LLLOOP_CHAOS_SEED={seed}: {error}") from None
