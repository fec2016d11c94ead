"""`--wake-latency`: idle CPUs are kept awake while programs make many requests, and at no other time."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from llloop.control import client
from tests.conftest import Serve
from tests.mount.command_line import llloop
from tests.server import Server
from tests.server_processes import is_replaced, stop_process, titles, wait_until, wait_until_quiet

DEVICE = "/dev/cpu_dma_latency"
SECONDS = 60.0

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.skipif(not os.access(DEVICE, os.W_OK), reason=f"needs write permission for {DEVICE}"),
]


# With so many threads, the front gets many requests at once also on a busy machine.
THREADS = 100


def has_device(pid: int) -> bool:
    """Returns whether a process has the device open."""
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            if os.readlink(link) == DEVICE:
                return True
    return False


def holders(server: Server) -> list[int]:
    """Returns the processes of the server that have the device open."""
    return [pid for pid in server.processes() if has_device(pid)]


@contextmanager
def many_requests(server: Server) -> Iterator[None]:
    """Makes requests without a pause: lookups of missing names that the kernel does not know yet."""
    ended = threading.Event()
    numbers = itertools.count()

    def make() -> None:
        while not ended.is_set():
            with suppress(OSError):  # the server may be killed
                os.stat(server.mountpoint / f"missing-{next(numbers)}")

    threads = [threading.Thread(target=make) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def stats(server: Server) -> dict[str, Any]:
    return dict(client.ask_mount(str(server.mountpoint), "stats"))


def lookups(server: Server) -> int:
    return int(stats(server)["operations"].get("LOOKUP", {"requests": 0})["requests"])


@pytest.mark.own_loop
def test_hold_begins_with_requests_and_ends_after_them(serve: Serve) -> None:
    server = serve("--wake-latency", "hold")
    assert not holders(server)
    with many_requests(server):
        assert wait_until(lambda: stats(server)["awake_seconds"] > 0, SECONDS)
    assert wait_until(lambda: not holders(server), SECONDS)
    before = stats(server)["awake_seconds"]
    assert "idle CPUs kept awake for" in llloop("stats", server.mountpoint).stdout
    assert stats(server)["awake_seconds"] == before


@pytest.mark.own_loop
@pytest.mark.parametrize("role", ["front", "worker-0"])
def test_no_other_process_gets_the_device(serve: Serve, role: str) -> None:
    server = serve("--workers", "1", "--wake-latency", "hold")
    server.expect_log("was killed by signal 9")
    with many_requests(server):
        assert wait_until(lambda: stats(server)["awake_seconds"] > 0, SECONDS)
        old = titles(server)[f"llloop-{role}"]
        os.kill(old, signal.SIGKILL)
        assert is_replaced(server, role, old, SECONDS)
        before = stats(server)["awake_seconds"]
        assert wait_until(lambda: stats(server)["awake_seconds"] > before, SECONDS)
    assert wait_until(lambda: not holders(server), SECONDS)


@pytest.mark.own_loop
def test_the_death_of_the_supervisor_ends_it(serve: Serve) -> None:
    server = serve("--wake-latency", "hold")
    server.expect_log("the supervisor has died; the keeper has detached")
    assert server.process
    processes = server.processes()
    deadline = time.monotonic() + SECONDS
    with many_requests(server):
        while True:
            stop_process(server.pid)
            if has_device(server.pid):
                break
            os.kill(server.pid, signal.SIGCONT)
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait(30)
        assert wait_until(lambda: not any(map(has_device, processes)), SECONDS)
    assert wait_until(lambda: not server.mounted())
    assert wait_until(lambda: server.processes() == [])
    server.clean_up()


@pytest.mark.parametrize("wanted", [(), ("--wake-latency", "never")], ids=["default", "never"])
def test_by_default_cpus_halt(serve: Serve, wanted: tuple[str, ...]) -> None:
    server = serve(*wanted)
    with many_requests(server):
        assert wait_until(lambda: lookups(server) > 5000, SECONDS)
        assert not holders(server)
    assert stats(server)["awake_seconds"] == 0


def test_after_requests_nothing_wakes_up(serve: Serve) -> None:
    server = serve("--workers", "2", "--wake-latency", "hold")
    with many_requests(server):
        assert wait_until(lambda: lookups(server) > 5000, SECONDS)
    wait_until_quiet(server, SECONDS)
    assert not holders(server)
