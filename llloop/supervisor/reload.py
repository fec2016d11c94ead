"""Reloading: reopens the log file, and replaces the processes one after the other while they serve."""

from __future__ import annotations

import logging

from llloop.logging import setup as log
from llloop.shared.negotiation import Feature
from llloop.supervisor.child import Child
from llloop.supervisor.connection import Connection
from llloop.supervisor.processes import Processes
from llloop.supervisor.sd_notify import Notifier

_log = logging.getLogger(__name__)


class Reload:
    """The reloads of one mount.

    Args:
        processes: the processes. When one has ended, the supervisor starts its successor and calls `go_on`.
        connection: shows whether the front can be replaced.
        notifier: notifies the service manager of the start and the end.
        description: the status text for the end.
    """

    def __init__(self, processes: Processes, connection: Connection, notifier: Notifier, description: str) -> None:
        self._all = processes.all
        self._replaceable = [*processes.workers, *processes.invalidators, *processes.relays]
        # If the kernel does not send requests again, those of the front would fail.
        if connection.capabilities is not None and Feature.HAS_RESEND in connection.capabilities.features:
            self._replaceable.append(processes.keeper)  # a new keeper also replaces the front
        self._notifier = notifier
        self._description = description
        self._left: list[Child] = []
        self.running = False

    def begin(self) -> None:
        """Reopen the log file, and start replacing the processes unless a reload is running."""
        log.reopen()
        if not self.running:
            _log.info("reloading: replacing the processes one by one")
            self.running = True
            self._left = list(self._replaceable)
            self._notifier.reloading()
            self.go_on()

    def go_on(self) -> None:
        """Replace the next process if all are running."""
        if not self.running or any(child.ending_on_purpose or child.process is None for child in self._all):
            return
        if self._left:
            self._left.pop(0).replace()
            return
        self.running = False
        _log.info("reloaded")
        self._notifier.ready(self._description)
