"""Programs run in the mount while processes of the server are killed: no call fails, all data is right.

The ordinary tests run this for some seconds, with each I/O mode and each load at least once. If LLLOOP_CHAOS_SECONDS is
set, each mode is combined with each load for that many seconds.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.as_user import Child
from tests.chaos import loads
from tests.chaos.conftest import BY_HAND, LAST_ROUND
from tests.chaos.killing import Killer, waiting_in
from tests.chaos.loads import Load, Place
from tests.conftest import Serve
from tests.server_processes import wait_until
from tests.watchdog import abort_connection

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.by_workers]

WAYS = {
    "workers": [],
    "uncached": ["--cache", "never"],
    "kernel": ["--io", "kernel"],
    "writeback": ["--writeback"],
}
NAMES: list[Load] = [loads.names, loads.exclusive, loads.xattrs, loads.walks, loads.unlinked]
DATA: list[Load] = [loads.appends, loads.mappings, loads.locks, loads.direct, loads.ranges, loads.copies, loads.floods]
PROGRAMS: list[Load] = [loads.git, loads.archive, loads.database, loads.fio]
SERVERS: list[Load] = [loads.postgres]
# Loads without unnamed files, which are lost if front and keeper die together.
NAMED: list[Load] = [loads.floods, loads.appends, loads.direct, loads.ranges, loads.copies, loads.archive, loads.walks]
SHORT = [
    ("workers", [loads.names, loads.unlinked, loads.walks, loads.git]),
    ("workers", [loads.appends, loads.locks, loads.mappings, loads.database]),
    ("uncached", [loads.exclusive, loads.direct, loads.ranges, loads.appends]),
    ("kernel", [loads.fio, loads.unlinked, loads.copies, loads.names]),
    ("writeback", [loads.archive, loads.xattrs, loads.mappings, loads.appends]),
]
LONG = [(way, group) for way in WAYS for group in (NAMES, DATA, PROGRAMS, SERVERS)]
SHORT_BOTH = [("workers", [loads.floods, loads.appends, loads.archive]), ("writeback", [loads.floods, loads.direct])]
LONG_BOTH = [(way, NAMED) for way in WAYS]


def _title(what: object) -> str:
    return "+".join(load.__name__ for load in what) if isinstance(what, list) else str(what)


def _outcome(child: Child[int]) -> str:
    """Waits for all children, also if the first one failed: a remaining one would keep the mount busy."""
    try:
        assert child.result() > 0
    except (AssertionError, OSError) as error:
        return repr(error) if isinstance(error, OSError) else str(error)
    return ""


@pytest.mark.parametrize(("way", "group"), LONG if BY_HAND else SHORT, ids=_title)
def test_killed_processes_cause_no_error_and_no_loss(
    serve: Serve, tmp_path: Path, seconds: float, seed: int, way: str, group: list[Load]
) -> None:
    if way == "kernel" and os.geteuid() != 0:
        pytest.skip("--io kernel needs root")
    if shutil.which("fio") is None:
        group = [load for load in group if load is not loads.fio]
    if group == SERVERS and not list(Path("/usr/lib/postgresql").glob("*/bin")):
        pytest.skip("PostgreSQL is not installed")
    kill_while_working(serve, tmp_path, seconds, seed, way, group, both=False)


@pytest.mark.parametrize(("way", "group"), LONG_BOTH if BY_HAND else SHORT_BOTH, ids=_title)
def test_named_files_survive_death_of_front_and_keeper_together(
    serve: Serve, tmp_path: Path, seconds: float, seed: int, way: str, group: list[Load]
) -> None:
    if way == "kernel" and os.geteuid() != 0:
        pytest.skip("--io kernel needs root")
    kill_while_working(serve, tmp_path, seconds, seed, way, group, both=True)


def kill_while_working(
    serve: Serve, tmp_path: Path, seconds: float, seed: int, way: str, group: list[Load], *, both: bool
) -> None:
    server = serve("--workers", "2", *WAYS[way])
    if "has_resend" not in server.output.read_text():
        pytest.skip("this kernel does not send a dead front's requests again (Linux 6.9)")
    server.expect_log(r"llloop-(front|keeper|worker-\d+) was killed by signal 9")
    if both:  # the kernel had not yet sent RELEASE for a closed and removed file
        server.expect_log("a file that was open when the front died cannot be opened again", required=False)
        server.expect_log("the keeper could not fetch the front's descriptors", required=False)
    children = {}
    end = time.monotonic() + seconds
    for number, load in enumerate(group):
        name = load.__name__
        (server.source / name).mkdir()
        scratch = tmp_path / name
        scratch.mkdir()
        place = Place(
            server.mountpoint / name,
            server.source / name,
            random.Random(seed + number),
            lambda: time.monotonic() < end,
            scratch,
            direct=_takes_direct(server.source),
            size=2000 if BY_HAND else 400,
        )
        children[name] = Child(load, place)
    killer = Killer(server, random.Random(seed), both=both)

    def all_done() -> bool:
        return all(child.is_done() for child in children.values())

    failure = ""
    try:
        killer.kill_until(all_done, (0.1, 0.4), seconds + LAST_ROUND)
        if not wait_until(all_done, LAST_ROUND):
            failure = f"a call hangs, or the machine is too slow:\n{waiting_in(server)}"
            abort_connection(str(server.mountpoint))
    except AssertionError as error:
        failure = str(error)
    failures = [f"--- {name}\n{text}" for name, child in children.items() if (text := _outcome(child))]
    told = f"with LLLOOP_CHAOS_SEED={seed}, {way}, {dict(killer.killed)} killed: {failure}"
    assert not failure and not failures, "\n".join((told, *failures, server.log.read_text()))
    assert killer.killed, "nobody was killed"
    print(told)


def _takes_direct(directory: Path) -> bool:
    probe = directory / "probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True
