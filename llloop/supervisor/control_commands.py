"""The commands of a mount's control socket: status, stats, source, log-level, reload, stop, trace."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from llloop.config import ServeConfig
from llloop.errors import UsageError
from llloop.linux.mount_identity import MountIdentity
from llloop.logging import setup as log
from llloop.shared.metrics import Count, Gauge
from llloop.shared.watch_state import NOTHING_HEARD
from llloop.supervisor.child import Child
from llloop.supervisor.connection import Connection
from llloop.supervisor.control_server import Command, Stream
from llloop.supervisor.cpu_latency import CpuLatency
from llloop.supervisor.process_info import SILENT, cpu_seconds, open_files, process_state
from llloop.supervisor.processes import Processes
from llloop.supervisor.shared_resources import SharedResources
from llloop.supervisor.source_check import SourceCheck
from llloop.supervisor.tracing import Tracing
from llloop.version import __version__

_log = logging.getLogger(__name__)


class ControlCommands:
    """The commands of one mount.

    Args:
        config: the mount's options.
        source: the absolute path of the source.
        mount: the mount.
        connection: the connection with the kernel.
        processes: the supervisor's child processes.
        resources: the shared memory, with the counters and what the watcher has heard.
        cpu_latency: keeps idle CPUs awake.
        source_check: checks the source.
        tracing: the readers of the trace.
        phase: returns the supervisor's phase: "serving", "reloading" or "stopping".
        reload: starts a reload.
        stop: starts unmounting.
    """

    def __init__(
        self,
        config: ServeConfig,
        source: str,
        mount: MountIdentity,
        connection: Connection,
        processes: Processes,
        resources: SharedResources,
        cpu_latency: CpuLatency,
        source_check: SourceCheck,
        tracing: Tracing,
        *,
        phase: Callable[[], str],
        reload: Callable[[], None],
        stop: Callable[[], None],
    ) -> None:
        self._facts = _facts(config, source, mount, connection)
        self._processes = processes
        self._slots = resources.slots
        self._cpu_latency = cpu_latency
        self._source_check = source_check
        self._watch = resources.watch
        self._tracing = tracing
        self._phase = phase
        self._ask_reload = reload
        self._ask_stop = stop
        self._begun = time.monotonic()
        self._began = time.time()

    def table(self) -> dict[str, Command]:
        """Return the commands by name."""
        return {
            "status": self._status,
            "stats": self._stats,
            "source": self._source,
            "log-level": self._set_log_level,
            "reload": self._reload,
            "stop": self._stop,
            "trace": self._trace,
        }

    def _status(self, request: dict[str, Any]) -> dict[str, Any]:
        own = {"role": "supervisor", "pid": os.getpid(), "state": process_state(os.getpid()), "restarts": 0}
        processes = [{**own, "busy": None}]
        for child in self._processes.all:
            role = child.name.removeprefix("llloop-")
            state = process_state(child.pid) or "restarting"
            told = {"role": role, "pid": child.pid, "state": state, "restarts": child.restarts}
            processes.append({**told, "busy": self._busy(child)})
        return {
            **self._facts,
            "in_force": {**self._facts["in_force"], "watch": self._watch.describe() if self._watch else "off"},
            "version": __version__,
            "state": self._state(),
            "pid": os.getpid(),
            "began": self._began,
            "uptime": time.monotonic() - self._begun,
            "processes": processes,
        }

    def _busy(self, child: Child) -> float | None:
        """Return the age in seconds of a worker's oldest request; None if it has none or is not a worker."""
        slots = self._slots
        if child not in self._processes.workers:
            return None
        state = self._processes.workers.index(child) + 1
        begun = [slots.metrics.begun[slot] for slot, its in enumerate(bytes(slots.states)) if its == state]
        return max(0.0, time.monotonic() - min(begun) / 1e9) if begun else None

    def _state(self) -> str:
        phase = self._phase()
        front = process_state(self._processes.front.pid)
        return "not answering" if phase != "stopping" and (front is None or front in SILENT) else phase

    def _stats(self, request: dict[str, Any]) -> dict[str, Any]:
        slots = self._slots
        metrics = slots.metrics
        states = bytes(slots.states)
        by_front = metrics.front.snapshot()
        by_workers = [sheet.snapshot() for sheet in metrics.workers]
        gauges = metrics.gauges
        return {
            "source": self._facts["source"],
            "mountpoint": self._facts["mountpoint"],
            "state": self._state(),
            "time": time.monotonic(),
            "uptime": time.monotonic() - self._begun,
            "operations": {name: count._asdict() for name, count in _together([by_front, *by_workers]).items()},
            "front": {**_totals(by_front), **_of_process(self._processes.front)},
            "workers": [
                {"name": f"worker-{shard}", "queue": states.count(shard + 1), **_totals(counts), **_of_process(child)}
                for shard, (counts, child) in enumerate(zip(by_workers, self._processes.workers, strict=True))
            ],
            "inodes": gauges[Gauge.INODES],
            "handles": gauges[Gauge.HANDLES],
            "awake_seconds": self._cpu_latency.seconds,
            "slots": {"used": len(states) - states.count(0), "total": len(states)},
            "cache": {
                "kept": gauges[Gauge.KEPT],
                "dropped": gauges[Gauge.DROPPED],
                "bypassed": gauges[Gauge.BYPASSED],
                "passed_through": gauges[Gauge.PASSED_THROUGH],
            },
            "watch": (self._watch.counts() if self._watch else NOTHING_HEARD)._asdict(),
        }

    def _source(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._source_check.ask()

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
        self._ask_reload()
        return "reloading"

    def _trace(self, request: dict[str, Any]) -> Stream:
        return self._tracing.open()

    def _stop(self, request: dict[str, Any]) -> str:
        self._ask_stop()
        return "stopping"


def _facts(config: ServeConfig, source: str, mount: MountIdentity, connection: Connection) -> dict[str, Any]:
    """Return the part of the status that does not change while the mount is served."""
    capabilities = connection.capabilities
    options = {
        one.name: getattr(value := getattr(config, one.name), "value", value)
        for one in fields(config)
        if one.name not in ("source", "mountpoint", "loop", "slots")
    }
    return {
        "source": source,
        "mountpoint": mount.mountpoint,
        "options": options,
        "loop": "own" if capabilities is not None else "llfuse",
        "protocol": f"7.{capabilities.minor}" if capabilities is not None else None,
        "capabilities": capabilities.names() if capabilities is not None else [],
        "in_force": connection.in_force(config),
    }


def _of_process(child: Child) -> dict[str, Any]:
    pid = child.pid
    return {
        "pid": pid,
        "state": process_state(pid) or "restarting",
        "restarts": child.restarts,
        "descriptors": open_files(pid),
        "cpu_seconds": cpu_seconds(pid),
    }


def _totals(counts: dict[str, Count]) -> dict[str, int]:
    values = counts.values()
    return {
        "requests": sum(count.requests for count in values),
        "errors": sum(count.errors for count in values),
        "bytes": sum(count.bytes for count in values),
    }


def _together(sheets: list[dict[str, Count]]) -> dict[str, Count]:
    """Return the sums of the counters of several processes."""
    found: dict[str, Count] = {}
    for counts in sheets:
        for name, count in counts.items():
            found[name] = found[name].plus(count) if name in found else count
    return found
