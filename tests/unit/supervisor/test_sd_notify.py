"""What a service manager is told, and that one who is not there or does not listen is no trouble."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llloop.supervisor.sd_notify import Notifier


class Manager:
    """Receives what sd_notify(3) would send to systemd."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)

    def heard(self) -> list[str]:
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode(errors="surrogateescape"))
            except BlockingIOError:
                return found


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    own = Manager(str(tmp_path / "notify") if request.param == "path" else f"@llloop-test-{os.getpid()}")
    yield own
    own.socket.close()


def test_the_manager_hears_everything(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    notifier.ready("serving /a\nb\x1b[2J")
    notifier.reloading()
    notifier.status("waiting")
    notifier.alive()
    notifier.stopping()
    ready, reloading, status, alive, stopping = manager.heard()
    assert ready == f"READY=1\nMAINPID={os.getpid()}\nSTATUS=serving /a\\nb\\x1b[2J"
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)
    assert (status, alive) == ("STATUS=waiting", "WATCHDOG=1")
    assert stopping.startswith("STOPPING=1\n")


@pytest.mark.parametrize("address", ["", "relative", "/no/such/socket", "@nobody", "vsock:1:2", "/" + "x" * 200])
def test_nobody_to_tell_is_no_trouble(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    notifier.ready("ready")
    notifier.stopping()


def test_without_a_manager_there_is_no_watchdog() -> None:
    assert Notifier({}).interval is None
    assert Notifier({"WATCHDOG_USEC": "1000000"}).interval is None


def test_a_manager_that_does_not_listen_is_not_waited_for(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    for _ in range(5000):  # far more than a socket's queue takes
        notifier.alive()
    assert 0 < len(manager.heard()) < 5000
    manager.socket.close()


@pytest.mark.parametrize(
    ("allowed", "pid", "interval"),
    [
        ("3000000", None, 1.5),
        ("3000000", "self", 1.5),
        ("3000000", "1", None),
        ("0", None, None),
        ("nonsense", None, None),
        ("-5", None, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_asked(allowed: str, pid: str | None, interval: float | None) -> None:
    environment = {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": allowed}
    if pid is not None:
        environment["WATCHDOG_PID"] = str(os.getpid()) if pid == "self" else pid
    assert Notifier(environment).interval == interval
