"""The watchdog: tells the service manager again and again that the mount answers, as long as it does (sd_notify(3))."""

from __future__ import annotations

from pathlib import Path

from llloop.shared.metrics import NANOSECONDS
from llloop.shared.slots import Slots
from llloop.supervisor.child import Child
from llloop.supervisor.event_loop import EventLoop
from llloop.supervisor.process_info import SILENT, process_state
from llloop.supervisor.sd_notify import Notifier

# fusectl: one directory for each living connection, named after the minor number of the mount's device.
_CONNECTIONS = Path("/sys/fs/fuse/connections")


class Watchdog:
    """Looks at the front at the intervals that the service manager asks for.

    Args:
        loop: the supervisor's.
        notifier: the service manager.
        front: the process that must answer.
        slots: tell what it has done and what others have in hand.
        device: the mount's major and minor number.
    """

    def __init__(
        self, loop: EventLoop, notifier: Notifier, front: Child, slots: Slots, device: tuple[int, int]
    ) -> None:
        self._notifier = notifier
        self._front = front
        self._slots = slots
        self._waiting_file = _CONNECTIONS / str(device[1]) / "waiting"
        self._next = loop.deadline(self.look)
        self._progress: tuple[int, int] | None = None

    def look(self) -> None:
        """Tell the service manager if the front answers, and look again when it is time."""
        if self._notifier.interval is not None:
            self._next.set_in(self._notifier.interval)
            if self.answers():
                self._notifier.alive()

    def stop(self) -> None:
        """Look no more."""
        self._next.cancel()

    def answers(self) -> bool:
        """Whether the front takes requests, as far as can be told without asking it, which could take for ever.

        It does not if its process is gone or stopped. Nor does it if requests wait that no worker has, and none was
        finished or handed on since the last call.
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
        """Return how many requests wait for the front, as far as the kernel tells (fusectl)."""
        try:
            waiting = int(self._waiting_file.read_text())
        except (OSError, ValueError):
            return 0
        return waiting - sum(1 for state in self._slots.states if state)
