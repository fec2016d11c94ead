"""Kills processes of a mount's tree at random, as long as somebody works in the mount."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.mirror import Mirror
from tests.server_processes import process_ids, titles, wait_until

# A restart under load takes so long at most, in seconds.
RESTART = 30.0


def waiting_in(mirror: Mirror) -> str:
    """What those who work in the mount are waiting for in the kernel."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit():
                process = Path("/proc", entry)
                command = process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                where = process.joinpath("wchan").read_text()
                if where.startswith(("fuse", "request_wait")) or str(mirror.mountpoint) in command:
                    found.append(f"{entry} {command[:200]}: {where}\n{process.joinpath('stack').read_text()}")
    return "\n".join(found)


class Killer:
    """Kills fronts, keepers and workers.

    Front and keeper hold the open files together, so a file without a name survives the death of one of them, until
    the other has a new partner; before that neither is killed. Workers may die at any time.
    """

    def __init__(self, mirror: Mirror, chance: random.Random) -> None:
        self._mirror = mirror
        self._chance = chance
        self.killed: Counter[str] = Counter()
        self._dead: set[int] = set()

    def kill_until(self, done: Callable[[], bool], pause: tuple[float, float], seconds: float) -> None:
        """Kill a process, wait for *pause* (from, to; in seconds), again; for *seconds* at most."""
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            time.sleep(self._chance.uniform(*pause))
            self.kill(self._chance.choice(["front", "front", "front", "worker", "worker", "keeper"]))

    def kill(self, role: str) -> None:
        if role == "worker":
            victims = [pid for pid in process_ids(self._mirror, role) if pid not in self._dead]
            if victims:
                self._kill(role, self._chance.choice(victims))
            return
        front, keeper = self._pair()
        self._kill(role, front if role == "front" else keeper)
        if role == "keeper":  # the front is replaced, too
            self._dead.add(front)

    def wait_for_all(self) -> None:
        """Wait until nobody is being replaced."""
        self._pair()
        count = len(self._mirror.processes())
        assert wait_until(lambda: len(titles(self._mirror)) == count, RESTART)

    def _pair(self) -> tuple[int, int]:
        pair: list[int] = []

        def both_are_there() -> bool:
            fronts, keepers = process_ids(self._mirror, "front"), process_ids(self._mirror, "keeper")
            pair[:] = [pid for pid in (*fronts[-1:], *keepers[-1:]) if pid not in self._dead]
            return len(fronts) == len(keepers) == 1 and len(pair) == 2

        assert wait_until(both_are_there, RESTART), f"front or keeper did not come back:\n{self._mirror.all_output()}"
        return pair[0], pair[1]

    def _kill(self, role: str, pid: int) -> None:
        self._dead.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.killed[role] += 1
