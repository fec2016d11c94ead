"""The processes below the supervisor: how one is forked, restarted and ended."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

from setproctitle import setproctitle, setthreadtitle

from llloop.linux import syscalls
from llloop.linux.stdio import redirect_standard_descriptors
from llloop.logging.escape import printable
from llloop.logging.stacks import Stacks

_log = logging.getLogger(__name__)

# Forked, not spawned: a child must inherit the mount's session, the descriptors and the shared memory.
fork = multiprocessing.get_context("fork")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# How long the kernel may take to end a killed process, in seconds; longer only if the source hangs.
PATIENCE = 5.0
# When so many in a row have lived for less than this, in seconds, the next is started after a pause, which doubles.
_SHORT_LIFE = 0.25
_SHORT_LIVES = 10
_FIRST_PAUSE = 0.05
LONGEST_PAUSE = 5.0
_JOIN_PAUSE = 0.005  # seconds between two looks


class Cloned:
    """A child that was not forked by `multiprocessing`, with what is used of its processes."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exitcode: int | None = None

    def join(self, timeout: float | None = None) -> None:
        """Wait until the process has ended, or for *timeout* seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.exitcode is None:
            pid, status = os.waitpid(self.pid, 0 if deadline is None else os.WNOHANG)
            if pid:
                self.exitcode = os.waitstatus_to_exitcode(status)
            elif deadline is not None and time.monotonic() > deadline:
                return
            else:
                time.sleep(_JOIN_PAUSE)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        if self.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)


@dataclass
class Child:
    """A process of the tree and its successors.

    Attributes:
        name: its role, also its title in ps(1).
        launch: starts one.
        process: the one that runs now, or None in the pause before the next.
        sentinel: a descriptor that is readable when it has ended, whoever else has its descriptors (pidfd_open(2)).
        started: when it was started (monotonic clock).
        due: when the next is to be started.
        short_lives: how many in a row have died young.
        restarts: how many have been started after the first.
        asked: whether this one is being ended on purpose, to be replaced.
        stacks: where it tells what it is doing.
    """

    name: str
    launch: Callable[[Stacks], BaseProcess | Cloned]
    process: BaseProcess | Cloned | None = None
    sentinel: int = -1
    started: float = 0.0
    due: float = 0.0
    short_lives: int = 0
    restarts: int = 0
    asked: bool = False
    stacks: Stacks = field(init=False)

    def __post_init__(self) -> None:
        self.stacks = Stacks(self.name)

    @property
    def pid(self) -> int | None:
        """The process id of the one that runs now; None if it has ended, for the number may be another's then."""
        return self.process.pid if self.process is not None and not syscalls.is_readable(self.sentinel) else None

    def start(self) -> None:
        """Start the process.

        Raises:
            OSError: there are no processes or descriptors left. None was started.
        """
        self.started = time.monotonic()
        process = self.launch(self.stacks)
        assert process.pid is not None
        try:
            self.sentinel = os.pidfd_open(process.pid)
        except OSError:  # it must not run beside the one that is started next
            end(process)
            raise
        self.process = process

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process that runs now, if one does, and to no other that may have got its number."""
        if self.process is not None:
            with suppress(ProcessLookupError):  # it has ended
                signal.pidfd_send_signal(self.sentinel, number)

    def replace(self) -> None:
        """End the process on purpose; `schedule_restart` then does not count its death against it."""
        if self.process is not None:
            self.asked = True
            self.signal(signal.SIGKILL)

    def gone(self) -> int:
        """Take leave of a process that has ended, and return its exit code."""
        assert self.process is not None
        self.process.join()
        os.close(self.sentinel)
        code = self.process.exitcode
        self.process, self.sentinel = None, -1
        return code or 0

    def end(self) -> None:
        """End a process that has nothing left to do, or whose time is up."""
        if self.process is not None:
            if not end(self.process):
                _log.warning("%s waits for the source and ends only when the source answers", self.name)
            os.close(self.sentinel)
            self.process, self.sentinel = None, -1

    def close(self) -> None:
        """End the process, and let no other follow."""
        self.end()
        self.stacks.close()

    def schedule_restart(self) -> float:
        """Note when the next one is due and return the pause until then, in seconds."""
        now = time.monotonic()
        young = now - self.started < _SHORT_LIFE and not self.asked
        self.short_lives = self.short_lives + 1 if young else 0
        excess = self.short_lives - _SHORT_LIVES
        pause = min(_FIRST_PAUSE * 2 ** min(excess, 10), LONGEST_PAUSE) if excess >= 0 else 0.0
        self.due = now + pause
        self.restarts += 1
        self.asked = False
        return pause


def end(process: BaseProcess | Cloned) -> bool:
    """Kill a process; return whether it has ended. One that waits for a source that hangs does so when that answers."""
    process.kill()
    process.join(PATIENCE)
    if process.exitcode is None:
        # Nobody is to wait for it at exit, either, which multiprocessing offers no other way to say.
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    return process.exitcode is not None


def show_title(name: str, mountpoint: str) -> None:
    """Have ps(1) show the role of this process and the mount that it serves; top(1) and pgrep(1) the role alone."""
    setproctitle(f"{name} {printable(mountpoint)}".rstrip())
    setthreadtitle(name)


def forked(
    name: str,
    target: Callable[[], None],
    stacks: Stacks,
    *,
    detached: bool,
    outlives: bool = False,
    mountpoint: str = "",
) -> BaseProcess:
    """Fork a process that runs *target*; for the other arguments see `child_main`."""
    arguments = (name, target, os.getpid(), detached, stacks, outlives, mountpoint)
    process = fork.Process(target=child_main, args=arguments, name=name)
    process.start()
    return process


def child_main(
    name: str,
    target: Callable[[], None],
    supervisor: int,
    detached: bool,
    stacks: Stacks,
    outlives: bool = False,
    mountpoint: str = "",
) -> None:
    """Run in a new child: leave the supervisor's signals behind, and mostly do not outlive it.

    Args:
        name: its role.
        target: what it runs.
        supervisor: the process id of its parent.
        detached: whether it lets go of the standard descriptors.
        stacks: where it tells what it is doing.
        outlives: whether it goes on when the supervisor has ended.
        mountpoint: the mount that it serves, for its title.
    """
    signal.set_wakeup_fd(-1)
    # They may reach the whole group (Ctrl-C, a service manager); the supervisor decides and ends the others by SIGKILL.
    for number in (*STOP_SIGNALS, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
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
