"""Reports that the supervisor logs on demand: counters (SIGUSR1) and stack dumps (SIGUSR2)."""

from __future__ import annotations

import logging
import os
import signal

from llloop.logging import setup as log
from llloop.logging import stacks
from llloop.logging.stacks import Stacks
from llloop.shared.slots import Slots
from llloop.supervisor.event_loop import EventLoop
from llloop.supervisor.process_info import process_state
from llloop.supervisor.processes import Processes

_log = logging.getLogger(__name__)


class Reports:
    """The reports of one mount.

    Args:
        loop: the supervisor's event loop.
        processes: the supervisor's child processes.
        slots: the request slots, with the counters.

    Raises:
        OSError: there are no free descriptors.
    """

    def __init__(self, loop: EventLoop, processes: Processes, slots: Slots) -> None:
        self._processes = processes
        self._slots = slots
        self._own_stacks = Stacks("llloop-supervisor")
        self._dumped = loop.deadline(self._log_stacks)

    def log_counters(self) -> None:
        """Log the workers' counters, and make the front log the number of its inodes, handles and slots."""
        for child, sheet in zip(self._processes.workers, self._slots.metrics.workers, strict=True):
            counts = sheet.snapshot()
            _log.info(
                "%s: %d requests, %d errors, %d bytes read, %d bytes written, %d restarts",
                child.name,
                sum(count.requests for count in counts.values()),
                sum(count.errors for count in counts.values()),
                *(counts[name].bytes if name in counts else 0 for name in ("READ", "WRITE")),
                child.restarts,
            )
        self._processes.front.signal(signal.SIGUSR1)

    def dump_stacks(self) -> None:
        """Make each process dump its stacks; log them a moment later."""
        for child in self._processes.all:
            child.stacks.take()
            child.signal(signal.SIGUSR2)
        self._own_stacks.dump()
        self._dumped.set_in(stacks.DUMP_TIME)

    def _log_stacks(self) -> None:
        told = [("llloop-supervisor", os.getpid(), self._own_stacks)]
        told += [(child.name, child.pid or 0, child.stacks) for child in self._processes.all]
        for name, pid, its in told:
            text = log.Lines(its.take() or f"no answer; its state is {process_state(pid) or 'gone'}")
            _log.info("stacks of %s (process %d):\n%s", name, pid, text, extra={"on_demand": True})

    def close(self) -> None:
        """Close the descriptor."""
        self._own_stacks.close()
