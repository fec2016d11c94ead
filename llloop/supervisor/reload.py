"""Reloading: the log file is opened again, and the processes are replaced one after the other, under load."""

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
        processes: those to be replaced. The supervisor starts the next one when one has ended, and calls `go_on`.
        connection: tells whether the front can be replaced.
        notifier: the service manager, which is told of the beginning and the end.
        description: what it is told at the end.
    """

    def __init__(self, processes: Processes, connection: Connection, notifier: Notifier, description: str) -> None:
        self._all = processes.all
        self._replaceable = [*processes.workers, *processes.invalidators]
        # Where the kernel does not send them again, the front's requests would fail.
        if connection.capabilities is not None and Feature.HAS_RESEND in connection.capabilities.features:
            self._replaceable.append(processes.keeper)  # and with it the front
        self._notifier = notifier
        self._description = description
        self._left: list[Child] = []
        self.running = False

    def begin(self) -> None:
        """Open the log file again, and begin to replace the processes, unless that is going on."""
        log.reopen()
        if not self.running:
            _log.info("reloading: replacing the processes one by one")
            self.running = True
            self._left = list(self._replaceable)
            self._notifier.reloading()
            self.go_on()

    def go_on(self) -> None:
        """Replace the next process, if all are running."""
        if not self.running or any(child.asked or child.process is None for child in self._all):
            return
        if self._left:
            self._left.pop(0).replace()
            return
        self.running = False
        _log.info("reloaded")
        self._notifier.ready(self._description)
