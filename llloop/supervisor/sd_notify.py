"""Notifications to the service manager (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress

from llloop.logging.escape import printable


class Notifier:
    """Sends notifications to the service manager at $NOTIFY_SOCKET, if it is set. Never blocks or fails.

    Args:
        environment: contains NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.

    Attributes:
        interval: how often to call `alive`, in seconds: half of the watchdog timeout; None without a watchdog.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address[:1] not in ("/", "@"):
            self._address = ""
        self.interval = self._watchdog(environment) if self._address else None
        self._stopping = False

    @staticmethod
    def _watchdog(environment: Mapping[str, str]) -> float | None:
        allowed = environment.get("WATCHDOG_USEC", "")
        if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            return None
        return int(allowed) / 2_000_000 if allowed.isdecimal() and int(allowed) else None

    def _send(self, *lines: str) -> None:
        if not self._address or self._stopping:
            return
        address = os.fsencode(self._address)
        if address.startswith(b"@"):  # the abstract name space (unix(7))
            address = b"\0" + address[1:]
        message = "\n".join(lines).encode(errors="surrogateescape")
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, address)

    def ready(self, status: str) -> None:
        """Notify that the mount answers requests, for the first time or after a reload."""
        self._send("READY=1", f"MAINPID={os.getpid()}", f"STATUS={printable(status)}")

    def status(self, text: str) -> None:
        """Send a status line."""
        self._send(f"STATUS={printable(text)}")

    def reloading(self) -> None:
        """Notify that a reload has started; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Notify that the mount ends. Only the first call has an effect, and no other notification follows it."""
        self._send("STOPPING=1", "STATUS=unmounting")
        self._stopping = True

    def alive(self) -> None:
        """Notify the watchdog that the mount still answers."""
        self._send("WATCHDOG=1")
