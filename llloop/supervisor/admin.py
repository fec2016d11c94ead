"""How the outside looks into a mount: by the control socket, the service manager, and the stacks in the log.

The supervisor hands over what there is to see and what can be asked of it, watches `watched`, and calls `tend`.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llloop.control import protocol
from llloop.errors import UsageError
from llloop.logging import setup as log
from llloop.logging import stacks
from llloop.logging.stacks import Stacks
from llloop.shared.metrics import NANOSECONDS, Count, Gauge
from llloop.shared.slots import Slots
from llloop.supervisor import control_server
from llloop.supervisor.child import Child
from llloop.supervisor.control_server import Control
from llloop.supervisor.sd_notify import Notifier
from llloop.supervisor.source_check import SourceCheck
from llloop.version import __version__

_log = logging.getLogger(__name__)

_CONNECTIONS = Path("/sys/fs/fuse/connections")
# States of /proc/PID/stat in which a process answers nothing: stopped, traced, dead.
_SILENT = frozenset("TtZXx")


@dataclass(frozen=True)
class Sight:
    """What can be seen of a mount, and what can be asked of its supervisor.

    Attributes:
        mountpoint: where it is, absolute.
        device: its major and minor number.
        facts: what does not change, for `llloop status`.
        children: every process of the tree but the supervisor,
        front: among them the front, and
        workers: the workers by shard.
        arena: the shared memory.
        source: looks at the source.
        reload: replaces the processes one by one.
        stop: begins to unmount.
    """

    mountpoint: str
    device: tuple[int, int]
    facts: dict[str, Any]
    children: Sequence[Child]
    front: Child
    workers: Sequence[Child]
    slots: Slots
    source: SourceCheck
    reload: Callable[[], None]
    stop: Callable[[], None]


class Oversight:
    """The supervisor's ways to the outside.

    Args:
        sight: what there is to see.
        notifier: the service manager.
    """

    def __init__(self, sight: Sight, notifier: Notifier) -> None:
        self._sight = sight
        self._notifier = notifier
        self._begun = time.monotonic()
        self._began = time.time()
        self._control = self._make_control()
        self._own_stacks = Stacks("llloop-supervisor")
        self._dumped: float | None = None
        self._next_alive: float | None = None
        self._progress: tuple[int, int] | None = None
        self._reloading = False
        self._stopping = False

    def _make_control(self) -> Control | None:
        """Return the control socket; that there is none is no reason not to serve."""
        commands: dict[str, control_server.Command] = {
            "status": self._status,
            "stats": self._stats,
            "source": lambda request: self._sight.source.ask(),
            "log-level": self._set_log_level,
            "reload": self._reload,
            "stop": self._stop,
        }
        try:
            directory = protocol.make_directory()
            control_server.remove_stale(directory)
            name = protocol.socket_name(self._sight.mountpoint, self._sight.device)
            return Control(os.path.join(directory, name), commands)
        except OSError as error:
            _log.warning(
                "llloop status, stats and control will not work: the control socket cannot be created: %s", error
            )
            return None

    # For the supervisor's loop

    @property
    def watched(self) -> list[int]:
        """The descriptors that are readable when there is something to tend to."""
        return [*([self._control.fileno()] if self._control is not None else []), *self._sight.source.watched]

    def due(self) -> float | None:
        """Return when `tend` must be called at the latest (monotonic clock), or None."""
        times = [self._next_alive, self._dumped, self._control.due() if self._control is not None else None]
        return min((one for one in times if one is not None), default=None)

    def tend(self) -> None:
        """Answer who asks, and do what is due. Never waits."""
        if self._control is not None:
            self._control.handle()
        self._sight.source.tend()
        now = time.monotonic()
        if self._dumped is not None and now >= self._dumped:
            self._dumped = None
            self._log_stacks()
        if self._next_alive is not None and now >= self._next_alive:
            assert self._notifier.interval is not None
            self._next_alive = now + self._notifier.interval
            if self.answers():
                self._notifier.alive()

    def ready(self, description: str) -> None:
        """Tell the service manager that the mount answers."""
        self._notifier.ready(description)
        self._next_alive = time.monotonic() if self._notifier.interval is not None else None

    def reload_begun(self) -> None:
        """Tell the service manager that the processes are being replaced."""
        self._reloading = True
        self._notifier.reloading()

    def reload_ended(self, description: str) -> None:
        """Tell the service manager that all are."""
        self._reloading = False
        self._notifier.ready(description)

    def stopping(self) -> None:
        """Tell the service manager that the mount ends."""
        self._next_alive = None
        if not self._stopping:
            self._stopping = True
            self._notifier.stopping()

    def close(self) -> None:
        """Take the control socket away."""
        if self._control is not None:
            self._control.close()
        self._sight.source.close()
        self._own_stacks.close()

    def remove_socket(self) -> None:
        """Remove what a supervisor that was killed has left, in a process that outlives it."""
        if self._control is not None:
            self._control.remove()

    # Whether the mount answers

    def answers(self) -> bool:
        """Whether the front takes requests, as far as can be told without asking it, which could take for ever.

        It does unless its process is gone or stopped, or requests that no worker has wait since the last call and not
        one was finished or handed on since then.
        """
        state = process_state(self._sight.front.pid)
        if state is None or state in _SILENT:
            return False
        metrics = self._sight.slots.metrics
        sheets = [metrics.front, *metrics.workers]
        progress = (sum(row[NANOSECONDS] for sheet in sheets for row in sheet.rows), max(metrics.begun))
        stuck = self._waiting() > 0 and progress == self._progress
        self._progress = progress
        return not stuck

    def _waiting(self) -> int:
        """Return how many requests wait for the front, as far as the kernel tells (fusectl)."""
        try:
            waiting = int((_CONNECTIONS / str(self._sight.device[1]) / "waiting").read_text())
        except (OSError, ValueError):
            return 0
        return waiting - sum(1 for state in self._sight.slots.states if state)

    # SIGUSR2

    def dump_stacks(self) -> None:
        """Have every process write down what it is doing; it is logged a moment later."""
        for child in self._sight.children:
            child.stacks.take()
            child.signal(signal.SIGUSR2)
        self._own_stacks.dump()
        self._dumped = time.monotonic() + stacks.DUMP_TIME

    def _log_stacks(self) -> None:
        told = [("llloop-supervisor", os.getpid(), self._own_stacks)]
        told += [(child.name, child.pid or 0, child.stacks) for child in self._sight.children]
        for name, pid, its in told:
            text = log.Lines(its.take() or f"no answer; its state is {process_state(pid) or 'gone'}")
            _log.info("stacks of %s (process %d):\n%s", name, pid, text, extra={"on_demand": True})

    # The commands of the control socket

    def _status(self, request: dict[str, Any]) -> dict[str, Any]:
        own = {"role": "supervisor", "pid": os.getpid(), "state": process_state(os.getpid()), "restarts": 0}
        processes = [{**own, "busy": None}]
        for child in self._sight.children:
            role = child.name.removeprefix("llloop-")
            state = process_state(child.pid) or "restarting"
            told = {"role": role, "pid": child.pid, "state": state, "restarts": child.restarts}
            processes.append({**told, "busy": self._busy(child)})
        return {
            **self._sight.facts,
            "version": __version__,
            "state": self._state(),
            "pid": os.getpid(),
            "began": self._began,
            "uptime": time.monotonic() - self._begun,
            "processes": processes,
        }

    def _busy(self, child: Child) -> float | None:
        """Return for how many seconds the oldest request has been with a worker, None if it has none."""
        slots = self._sight.slots
        if child not in self._sight.workers:
            return None
        state = self._sight.workers.index(child) + 1
        begun = [slots.metrics.begun[slot] for slot, its in enumerate(bytes(slots.states)) if its == state]
        return max(0.0, time.monotonic() - min(begun) / 1e9) if begun else None

    def _state(self) -> str:
        if self._stopping:
            return "stopping"
        front = process_state(self._sight.front.pid)
        if front is None or front in _SILENT:
            return "not answering"
        return "reloading" if self._reloading else "serving"

    def _stats(self, request: dict[str, Any]) -> dict[str, Any]:
        slots = self._sight.slots
        metrics = slots.metrics
        states = bytes(slots.states)
        by_front = metrics.front.snapshot()
        by_workers = [sheet.snapshot() for sheet in metrics.workers]
        gauges = metrics.gauges
        return {
            "source": self._sight.facts["source"],
            "mountpoint": self._sight.mountpoint,
            "state": self._state(),
            "time": time.monotonic(),
            "uptime": time.monotonic() - self._begun,
            "operations": {name: count._asdict() for name, count in _together([by_front, *by_workers]).items()},
            "front": {**_totals(by_front), **_of_process(self._sight.front)},
            "workers": [
                {"name": f"worker-{shard}", "queue": states.count(shard + 1), **_totals(counts), **_of_process(child)}
                for shard, (counts, child) in enumerate(zip(by_workers, self._sight.workers, strict=True))
            ],
            "inodes": gauges[Gauge.INODES],
            "handles": gauges[Gauge.HANDLES],
            "slots": {"used": len(states) - states.count(0), "total": len(states)},
            "cache": {
                "kept": gauges[Gauge.KEPT],
                "dropped": gauges[Gauge.DROPPED],
                "bypassed": gauges[Gauge.BYPASSED],
                "passed_through": gauges[Gauge.PASSED_THROUGH],
            },
        }

    def _set_log_level(self, request: dict[str, Any]) -> str:
        level = request.get("level")
        if level not in log.LEVELS:
            raise UsageError(f"the log level must be one of {', '.join(log.LEVELS)}, not {level!r:.80}")
        if not log.set_level(level):
            raise UsageError(
                "another program serves this mount with llloop.serve(), and that program sets the log level"
            )
        _log.info("logging messages of level %s and above from now on", level)
        return str(level)

    def _reload(self, request: dict[str, Any]) -> str:
        self._sight.reload()
        return "reloading"

    def _stop(self, request: dict[str, Any]) -> str:
        self._sight.stop()
        return "stopping"


def process_state(pid: int | None) -> str | None:
    """Return a process's state letter (proc_pid_stat(5)), or None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace") if pid else ""
    except OSError:
        return None
    return text.rpartition(")")[2].split()[0] if text else None


def _of_process(child: Child) -> dict[str, Any]:
    pid = child.pid
    return {
        "pid": pid,
        "state": process_state(pid) or "restarting",
        "restarts": child.restarts,
        "descriptors": _descriptors(pid),
        "cpu_seconds": _cpu_seconds(pid),
    }


def _cpu_seconds(pid: int | None) -> float:
    """Return how long a process has kept CPUs busy (proc_pid_stat(5), utime and stime)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace") if pid else ""
    except OSError:
        return 0.0
    ticks = text.rpartition(")")[2].split()[11:13]
    return sum(int(one) for one in ticks) / os.sysconf("SC_CLK_TCK")


def _descriptors(pid: int | None) -> int:
    """Return how many descriptors a process has open, 0 if that cannot be seen."""
    if pid is None:
        return 0
    try:
        # The directory's size is their number since Linux 6.2; counting them would take long where there are many.
        return os.stat(f"/proc/{pid}/fd").st_size or len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def _totals(counts: dict[str, Count]) -> dict[str, int]:
    values = counts.values()
    return {
        "requests": sum(count.requests for count in values),
        "errors": sum(count.errors for count in values),
        "bytes": sum(count.bytes for count in values),
    }


def _together(sheets: list[dict[str, Count]]) -> dict[str, Count]:
    """Return the sums of several processes' counts."""
    found: dict[str, Count] = {}
    for counts in sheets:
        for name, count in counts.items():
            found[name] = found[name].plus(count) if name in found else count
    return found
