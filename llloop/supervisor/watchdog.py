"""The watchdog: notifies the service manager at intervals as long as the front answers (sd_notify(3))."""

from __future__ import annotations

from pathlib import Path

from llloop.shared.metrics import NANOSECONDS
from llloop.shared.slots import Slots
from llloop.supervisor.child import Child
from llloop.supervisor.event_loop import EventLoop
from llloop.supervisor.process_info import SILENT, process_state
from llloop.supervisor.sd_notify import Notifier

# fusectl: one directory for each connection, named after the minor number of the mount's device.
CONNECTIONS = Path("/sys/fs/fuse/connections")


class Watchdog:
    """Checks the front at the intervals that the service manager demands.

    Args:
        loop: the supervisor's event loop.
        notifier: notifies the service manager.
        front: the front process.
        slots: the request slots, which show the progress of the front and the workers.
        device: the mount's major and minor number.
    """

    def __init__(
        self, loop: EventLoop, notifier: Notifier, front: Child, slots: Slots, device: tuple[int, int]
    ) -> None:
        self._notifier = notifier
        self._front = front
        self._slots = slots
        self._waiting_file = CONNECTIONS / str(device[1]) / "waiting"
        self._next = loop.deadline(self.look)
        self._progress: tuple[int, int] | None = None

    def look(self) -> None:
        """Notify the service manager if the front answers, and schedule the next check."""
        if self._notifier.interval is not None:
            self._next.set_in(self._notifier.interval)
            if self.answers():
                self._notifier.alive()

    def stop(self) -> None:
        """Stop checking."""
        self._next.cancel()

    def answers(self) -> bool:
        """Return whether the front answers requests, without sending one, which might hang.

        It does not if its process is gone or stopped, or if requests wait for the front and it has neither finished
        nor forwarded one since the last call.
        """
        state = process_state(self._front.pid)
        if state is None or state in SILENT:
            return False
        metrics = self._slots.metrics
        sheets = [metrics.front, *metrics.workers]
        progress = (sum(row[NANOSECONDS] for sheet in sheets for row in sheet.rows), max(metrics.begun))
        stuck = self._waiting() > 0 and progress == self._progress
        self._progress = progress
        return not stuck

    def _waiting(self) -> int:
        """Return how many requests wait for the front, 0 if the kernel does not tell (fusectl)."""
        try:
            waiting = int(self._waiting_file.read_text())
        except (OSError, ValueError):
            return 0
        return waiting - sum(1 for state in self._slots.states if state)
