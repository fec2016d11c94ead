"""Kills processes of a server at random while programs work in the mount."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.server import Server
from tests.server_processes import process_ids, titles, wait_until

# The maximum duration of a restart under load, in seconds.
RESTART = 30.0


def waiting_in(server: Server) -> str:
    """Describes where processes that use the mount wait in the kernel."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit():
                process = Path("/proc", entry)
                command = process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                where = process.joinpath("wchan").read_text()
                if where.startswith(("fuse", "request_wait")) or str(server.mountpoint) in command:
                    found.append(f"{entry} {command[:200]}: {where}\n{process.joinpath('stack').read_text()}")
    return "\n".join(found)


# Candidates for a single kill; repeated entries are more likely.
ONE = ("front", "front", "front", "worker", "worker", "keeper")
# Pairs of processes that are killed shortly after each other.
TWO = (
    ("front", "worker"),
    ("worker", "front"),
    ("front", "front"),
    ("worker", "worker"),
    ("keeper", "worker"),
    ("worker", "keeper"),
)
# Pairs whose death loses the descriptors of all open files; the next front reopens named files.
BOTH = (("front", "keeper"), ("keeper", "front"), ("keeper", "keeper"))
# The maximum time between both kills, in seconds.
APART = 0.2


class Killer:
    """Kills fronts, keepers and workers, one or two at a time.

    Front and keeper share the descriptors of open files. So an unnamed file survives the death of one of them. Until
    the dead one is replaced, the other is not killed, unless *both* is true. Workers may die at any time.

    Args:
        server: whose processes are killed.
        chance: decides which, and when.
        both: whether front and keeper may die together.
    """

    def __init__(self, server: Server, chance: random.Random, *, both: bool = False) -> None:
        self._server = server
        self._chance = chance
        self._two = (*TWO, *BOTH, *BOTH) if both else TWO
        self.killed: Counter[str] = Counter()
        self._dead: set[int] = set()
        self._replaced = 0  # the front whose keeper was killed last
        self._roles = set(titles(server))

    def kill_until(self, done: Callable[[], bool], pause: tuple[float, float], seconds: float) -> None:
        """Kill one process or two, wait for *pause* (from, to; in seconds), again; for *seconds* at most."""
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            time.sleep(self._chance.uniform(*pause))
            if self._chance.random() < 0.5:
                self.kill(self._chance.choice(ONE))
            else:
                self.kill_two(*self._chance.choice(self._two))

    def kill(self, role: str) -> None:
        if self._kill_one(role):
            self.killed[role] += 1

    def kill_two(self, first: str, second: str) -> None:
        """Kill a process, and another, or the successor of the first, within `APART` seconds."""
        if not self._kill_one(first):
            return
        time.sleep(self._chance.choice([0.0, self._chance.uniform(0, APART)]))
        pids: list[int] = []

        def is_there() -> bool:
            pids[:] = self._living(second)
            return bool(pids)

        if wait_until(is_there, 2 * APART):
            self._kill(self._chance.choice(pids))
            self.killed[f"{first}+{second}"] += 1
        else:
            self.killed[first] += 1

    def _kill_one(self, role: str) -> bool:
        if role == "worker":
            victims = self._living(role)
            if victims:
                self._kill(self._chance.choice(victims))
            return bool(victims)
        front, keeper = self._pair()
        self._kill(front if role == "front" else keeper)
        if role == "keeper":  # the front is replaced, too
            self._replaced = front
        return True

    def wait_for_all(self) -> None:
        """Wait until all processes run. A process that has died often is replaced after a pause of some seconds."""
        self._pair()

        def all_live() -> bool:
            living = titles(self._server)
            return set(living) == self._roles and not self._dead & set(living.values())

        assert wait_until(all_live, RESTART), f"not all came back:\n{self._server.all_output()}"

    def _living(self, role: str) -> list[int]:
        return [pid for pid in process_ids(self._server, role) if pid not in self._dead]

    def _pair(self) -> tuple[int, int]:
        pair: list[int] = []

        def both_are_there() -> bool:
            fronts, keepers = process_ids(self._server, "front"), process_ids(self._server, "keeper")
            gone = {*self._dead, self._replaced}
            pair[:] = [pid for pid in (*fronts[-1:], *keepers[-1:]) if pid not in gone]
            return len(fronts) == len(keepers) == 1 and len(pair) == 2

        assert wait_until(both_are_there, RESTART), f"front or keeper did not come back:\n{self._server.all_output()}"
        return pair[0], pair[1]

    def _kill(self, pid: int) -> None:
        self._dead.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
