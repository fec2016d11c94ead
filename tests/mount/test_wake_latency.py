"""`--wake-latency`: idle CPUs are kept awake while programs make many requests, and at no other time."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Serve
from tests.mount.command_line import llloop
from tests.mount.test_seeing_inside import switches
from tests.server import Server
from tests.server_processes import titles, wait_until

DEVICE = "/dev/cpu_dma_latency"

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.skipif(not os.access(DEVICE, os.W_OK), reason=f"needs write permission for {DEVICE}"),
]


def holders() -> set[int]:
    """Returns the processes that have the device open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link) == DEVICE:
                found.add(int(link.parts[2]))
    return found


def holds(server: Server) -> bool:
    """Returns whether a process of the server has the device open."""
    return bool(holders() & set(server.processes()))


@contextmanager
def many_requests(server: Server) -> Iterator[None]:
    """Makes requests without a pause: a lookup of a missing name, which the kernel does not remember."""
    ended = threading.Event()

    def make() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            with suppress(OSError):  # the server may be killed
                os.stat(server.mountpoint / f"missing-{number}")

    thread = threading.Thread(target=make)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def stats(server: Server) -> Any:
    ended = llloop("stats", server.mountpoint, "--json")
    assert ended.code == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.own_loop
def test_hold_begins_with_requests_and_ends_after_them(serve: Serve) -> None:
    server = serve("--wake-latency", "hold")
    assert not holds(server)
    with many_requests(server):
        assert wait_until(lambda: holds(server))
    assert wait_until(lambda: not holds(server))
    assert stats(server)["awake_seconds"] > 0
    assert "idle CPUs kept awake for" in llloop("stats", server.mountpoint).stdout


def test_after_requests_nothing_wakes_up(serve: Serve) -> None:
    server = serve("--workers", "2", "--wake-latency", "hold")
    with many_requests(server):
        assert wait_until(lambda: stats(server)["operations"].get("LOOKUP", {"requests": 0})["requests"] > 1000)
    awake = []

    def is_quiet() -> bool:
        before = switches(server)
        time.sleep(1)
        awake.append(switches(server).items() - before.items())
        return not awake[-1]

    # Somebody else on the machine may ask for the status of all mounts.
    assert wait_until(is_quiet, 40), awake
    assert not holds(server)


@pytest.mark.own_loop
@pytest.mark.parametrize("role", ["front", "worker-0"])
def test_no_other_process_gets_the_device(serve: Serve, role: str) -> None:
    server = serve("--workers", "1", "--wake-latency", "hold")
    server.expect_log("was killed by signal 9")
    supervisor = titles(server)["llloop-supervisor"]
    with many_requests(server):
        assert wait_until(lambda: holds(server))
        old = titles(server)[f"llloop-{role}"]
        os.kill(old, signal.SIGKILL)
        assert wait_until(lambda: titles(server).get(f"llloop-{role}", old) != old)
        assert wait_until(lambda: holds(server))
        assert holders() & set(server.processes()) == {supervisor}
    assert wait_until(lambda: not holds(server))


@pytest.mark.own_loop
def test_the_death_of_the_supervisor_ends_it(serve: Serve) -> None:
    server = serve("--wake-latency", "hold")
    server.expect_log("the supervisor has died; the keeper has detached")
    processes = set(server.processes())
    with many_requests(server):
        assert wait_until(lambda: holds(server))
        os.kill(server.pid, signal.SIGKILL)
        assert server.process
        server.process.wait(30)
        assert wait_until(lambda: not holders() & processes)
    assert wait_until(lambda: not server.mounted())
    assert wait_until(lambda: server.processes() == [])
    server.clean_up()


@pytest.mark.parametrize("wanted", [(), ("--wake-latency", "never")], ids=["default", "never"])
def test_by_default_cpus_halt(serve: Serve, wanted: tuple[str, ...]) -> None:
    server = serve(*wanted)
    with many_requests(server):
        before = stats(server)["operations"].get("LOOKUP", {"requests": 0})["requests"]
        assert wait_until(lambda: stats(server)["operations"]["LOOKUP"]["requests"] > before + 1000)
        assert not holds(server)
    assert stats(server)["awake_seconds"] == 0
