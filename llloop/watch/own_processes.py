"""Which processes belong to this mount: what they do in the source, the kernel knows already."""

from __future__ import annotations

import time
from pathlib import Path

# How long an answer counts, in seconds. It must be shorter than the time in which a process id is used again.
_VALID = 0.25


class OwnProcesses:
    """Recognises the supervisor and its children by the parent of a process.

    A process that has ended counts as a stranger. That only costs a needless notification.

    Args:
        supervisor: its process id.
    """

    def __init__(self, supervisor: int) -> None:
        self._supervisor = supervisor
        self._answers: dict[int, bool] = {}
        self._until = 0.0

    def include(self, pid: int) -> bool:
        """Return whether the process *pid* belongs to the mount."""
        own = self._answers.get(pid)
        if own is None:
            own = self._answers[pid] = self._look(pid)
        return own

    def refresh(self) -> None:
        """Forget answers that are too old. Called before each batch of events."""
        now = time.monotonic()
        if now >= self._until:
            self._answers.clear()
            self._until = now + _VALID

    def _look(self, pid: int) -> bool:
        if pid == self._supervisor:
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return False
        return int(stat.rpartition(b")")[2].split()[1]) == self._supervisor  # proc_pid_stat(5): state, ppid
