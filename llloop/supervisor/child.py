"""Child processes of the supervisor: forking, restarting and ending them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from setproctitle import setproctitle, setthreadtitle

from llloop.linux import syscalls
from llloop.linux.process import Process, fork
from llloop.linux.stdio import redirect_standard_descriptors
from llloop.logging.escape import printable
from llloop.logging.stacks import Stacks
from llloop.supervisor.signals import ignore_signals

_log = logging.getLogger(__name__)

# How long to wait for the end of a killed process, in seconds. It takes longer only if the source hangs.
TIMEOUT = 5.0
# If so many successive processes lived for less than _SHORT_LIFE seconds, the next one starts after a pause, which
# doubles each time.
_SHORT_LIFE = 0.25
_SHORT_LIVES = 10
_FIRST_PAUSE = 0.05
LONGEST_PAUSE = 5.0


@dataclass
class Child:
    """A process and its successors.

    Attributes:
        name: its role, which is also its title in ps(1).
        launch: starts the process.
        process: the running process; None in the pause before the next.
        started: when it was started (monotonic clock, seconds).
        due: when to start the next one (monotonic clock, seconds).
        short_lives: how many successive processes had a short life.
        restarts: how many processes were started after the first.
        ending_on_purpose: whether this process is being ended on purpose, to be replaced.
        stacks: its stack dumps.
    """

    name: str
    launch: Callable[[Stacks], Process]
    process: Process | None = None
    started: float = 0.0
    due: float = 0.0
    short_lives: int = 0
    restarts: int = 0
    ending_on_purpose: bool = False
    stacks: Stacks = field(init=False)

    def __post_init__(self) -> None:
        self.stacks = Stacks(self.name)

    @property
    def pid(self) -> int | None:
        """The process id; None if the process has ended, because the kernel may reuse the id."""
        return self.process.pid if self.process is not None and self.process.is_alive() else None

    def start(self) -> Process:
        """Start the process, and return it.

        Raises:
            OSError: there are no free processes or descriptors. No process was started.
        """
        self.started = time.monotonic()
        self.process = self.launch(self.stacks)
        return self.process

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process if it is running."""
        if self.process is not None:
            self.process.signal(number)

    def replace(self) -> None:
        """Kill the process on purpose; `schedule_restart` does not count this as a short life."""
        if self.process is not None:
            self.ending_on_purpose = True
            self.signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill the process and wait for its end."""
        process, self.process = self.process, None
        if process is not None and not process.end(TIMEOUT):
            _log.warning("%s waits for the source and ends only when the source answers", self.name)

    def close(self) -> None:
        """End the process for good."""
        self.end()
        self.stacks.close()

    def schedule_restart(self) -> float:
        """Set when to start the next process; return the pause until then in seconds."""
        self.process = None
        now = time.monotonic()
        young = now - self.started < _SHORT_LIFE and not self.ending_on_purpose
        self.short_lives = self.short_lives + 1 if young else 0
        excess = self.short_lives - _SHORT_LIVES
        pause = min(_FIRST_PAUSE * 2 ** min(excess, 10), LONGEST_PAUSE) if excess >= 0 else 0.0
        self.due = now + pause
        self.restarts += 1
        self.ending_on_purpose = False
        return pause


def show_title(name: str, mountpoint: str) -> None:
    """Set the title of this process: ps(1) shows role and mount point, top(1) and pgrep(1) only the role."""
    setproctitle(f"{name} {printable(mountpoint)}".rstrip())
    setthreadtitle(name)


def start_child(
    name: str,
    target: Callable[[], None],
    stacks: Stacks,
    *,
    detached: bool,
    outlives: bool = False,
    mountpoint: str = "",
) -> Process:
    """Start a process that runs *target*; for the other arguments see `child_main`."""
    supervisor = os.getpid()
    return fork(lambda: child_main(name, target, supervisor, detached, stacks, outlives, mountpoint), name)


def child_main(
    name: str,
    target: Callable[[], None],
    supervisor: int,
    detached: bool,
    stacks: Stacks,
    outlives: bool = False,
    mountpoint: str = "",
) -> None:
    """Run *target* in a new child process, after resetting the signals that the supervisor handles.

    Args:
        name: its role.
        target: the function to run.
        supervisor: the process id of the supervisor.
        detached: whether to redirect the standard descriptors to /dev/null.
        stacks: its stack dumps.
        outlives: whether it continues after the end of the supervisor.
        mountpoint: the path of the mount point, for its title.
    """
    ignore_signals()
    stacks.answer_signals()
    if not outlives:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)
    if detached:
        redirect_standard_descriptors()
    show_title(name, mountpoint)
    try:
        target()
    except Exception:
        _log.exception("%s ends after an unexpected error", name, extra={"once": name})
        sys.exit(1)
