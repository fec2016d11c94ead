"""Notifications to the service manager, also if it is missing or does not read."""

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


def test_manager_receives_all_notifications(manager: Manager) -> None:
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
def test_notifier_without_manager_does_nothing(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    notifier.ready("ready")
    notifier.stopping()


def test_no_watchdog_without_manager() -> None:
    assert Notifier({}).interval is None
    assert Notifier({"WATCHDOG_USEC": "1000000"}).interval is None


def test_notifier_does_not_wait_for_the_manager(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    for _ in range(5000):  # more than the queue of a socket holds
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
def test_watchdog_interval_is_halved(allowed: str, pid: str | None, interval: float | None) -> None:
    environment = {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": allowed}
    if pid is not None:
        environment["WATCHDOG_PID"] = str(os.getpid()) if pid == "self" else pid
    assert Notifier(environment).interval == interval
