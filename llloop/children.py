"""The processes below the supervisor: how one is forked, restarted and ended."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

from setproctitle import setproctitle

from . import syscalls
from .redirect import let_go_of_standard_descriptors
from .stacks import Stacks

_log = logging.getLogger(__name__)

# Forked, not spawned: a child must inherit the mount's session, the descriptors and the shared memory.
fork = multiprocessing.get_context("fork")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# How long the kernel may take to end a killed process, in seconds; longer only if the source hangs.
PATIENCE = 5.0
# A process that died after less than this, in seconds, is restarted after a pause that doubles up to the longest.
_SHORT_LIFE = 10.0
_FIRST_PAUSE = 0.05
LONGEST_PAUSE = 5.0


@dataclass
class Child:
    """A process of the tree and its successors.

    Attributes:
        name: its role, also its title in ps(1).
        target: what it runs.
        process: the one that runs now, or None in the pause before the next.
        started: when it was started (monotonic clock).
        due: when the next is to be started.
        pause: how long to wait before the next if this one dies young.
        restarts: how many have been started after the first.
        survivor: whether it lives on when the supervisor dies.
        asked: whether this one is being ended on purpose, to be replaced.
        stacks: where it tells what it is doing.
    """

    name: str
    target: Callable[[], None]
    process: BaseProcess | None = None
    started: float = 0.0
    due: float = 0.0
    pause: float = 0.0
    restarts: int = 0
    survivor: bool = False
    asked: bool = False
    stacks: Stacks = field(init=False)

    def __post_init__(self) -> None:
        self.stacks = Stacks(self.name)

    @property
    def pid(self) -> int | None:
        """The process id of the one that runs now."""
        return self.process.pid if self.process is not None else None

    def start(self, *, detached: bool) -> None:
        """Fork the process."""
        arguments = (self.name, self.target, os.getpid(), detached, self.survivor, self.stacks)
        process = fork.Process(target=_child_main, args=arguments, name=self.name)
        self.started = time.monotonic()
        process.start()
        self.process = process

    def replace(self) -> None:
        """End the process on purpose; `schedule_restart` then does not count its death against it."""
        if self.process is not None:
            self.asked = True
            self.process.kill()

    def schedule_restart(self) -> float:
        """Note when the next one is due and return the pause until then, in seconds."""
        now = time.monotonic()
        if self.asked or now - self.started > _SHORT_LIFE:
            self.pause = 0.0
        pause = self.pause
        self.due = now + pause
        self.restarts += 1
        self.pause = min(max(2 * pause, _FIRST_PAUSE), LONGEST_PAUSE)
        if self.asked:
            self.pause = 0.0
        self.asked = False
        self.process = None
        return pause


def _child_main(
    name: str, target: Callable[[], None], supervisor: int, detached: bool, survivor: bool, stacks: Stacks
) -> None:
    """Run in a new child: leave the supervisor's signals behind, and do not outlive it unless that is its purpose."""
    signal.set_wakeup_fd(-1)
    # They may reach the whole group (Ctrl-C, a service manager); the supervisor decides and ends the others by SIGKILL.
    for number in (*STOP_SIGNALS, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    stacks.answer_signals()
    if not survivor:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)
    if detached:
        let_go_of_standard_descriptors()
    setproctitle(name)
    try:
        target()
    except Exception:
        _log.exception("%s ends by an error nobody expected", name, extra={"once": name})
        sys.exit(1)


def end(process: BaseProcess | None) -> None:
    """End a process that has nothing left to do, or whose time is up."""
    if process is not None:
        process.kill()
        process.join(PATIENCE)
