"""Child processes of the supervisor: forking, restarting and ending them."""

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
from llloop.supervisor.signals import ignore_signals

_log = logging.getLogger(__name__)

# Fork, not spawn: a child must inherit llfuse's session, descriptors and shared memory.
fork = multiprocessing.get_context("fork")

# How long to wait for the end of a killed process, in seconds. It takes longer only if the source hangs.
TIMEOUT = 5.0
# If so many successive processes lived for less than _SHORT_LIFE seconds, the next one starts after a pause, which
# doubles each time.
_SHORT_LIFE = 0.25
_SHORT_LIVES = 10
_FIRST_PAUSE = 0.05
LONGEST_PAUSE = 5.0
_JOIN_PAUSE = 0.005  # seconds between two checks


class ClonedProcess:
    """A child that was not forked by `multiprocessing`, with a part of the interface of its processes."""

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
    """A process and its successors.

    Attributes:
        name: its role, which is also its title in ps(1).
        launch: starts the process.
        process: the running process; None in the pause before the next.
        sentinel: a pidfd of the process.
        started: when it was started (monotonic clock, seconds).
        due: when to start the next one (monotonic clock, seconds).
        short_lives: how many successive processes had a short life.
        restarts: how many processes were started after the first.
        ending_on_purpose: whether this process is being ended on purpose, to be replaced.
        stacks: its stack dumps.
    """

    name: str
    launch: Callable[[Stacks], BaseProcess | ClonedProcess]
    process: BaseProcess | ClonedProcess | None = None
    sentinel: int = -1
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
        return self.process.pid if self.process is not None and not syscalls.is_readable(self.sentinel) else None

    def start(self) -> None:
        """Start the process.

        Raises:
            OSError: there are no free processes or descriptors. No process was started.
        """
        self.started = time.monotonic()
        process = self.launch(self.stacks)
        assert process.pid is not None
        try:
            self.sentinel = os.pidfd_open(process.pid)
        except OSError:  # it must not run beside its successor
            end(process)
            raise
        self.process = process

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process if it is running."""
        if self.process is not None:
            with suppress(ProcessLookupError):  # it has ended
                signal.pidfd_send_signal(self.sentinel, number)

    def replace(self) -> None:
        """Kill the process on purpose; `schedule_restart` does not count this as a short life."""
        if self.process is not None:
            self.ending_on_purpose = True
            self.signal(signal.SIGKILL)

    def reap(self) -> int:
        """Clean up after a process that has ended, and return its exit code."""
        assert self.process is not None
        self.process.join()
        os.close(self.sentinel)
        code = self.process.exitcode
        self.process, self.sentinel = None, -1
        return code or 0

    def end(self) -> None:
        """Kill the process and wait for its end."""
        if self.process is not None:
            if not end(self.process):
                _log.warning("%s waits for the source and ends only when the source answers", self.name)
            os.close(self.sentinel)
            self.process, self.sentinel = None, -1

    def close(self) -> None:
        """End the process for good."""
        self.end()
        self.stacks.close()

    def schedule_restart(self) -> float:
        """Set when to start the next process; return the pause until then in seconds."""
        now = time.monotonic()
        young = now - self.started < _SHORT_LIFE and not self.ending_on_purpose
        self.short_lives = self.short_lives + 1 if young else 0
        excess = self.short_lives - _SHORT_LIVES
        pause = min(_FIRST_PAUSE * 2 ** min(excess, 10), LONGEST_PAUSE) if excess >= 0 else 0.0
        self.due = now + pause
        self.restarts += 1
        self.ending_on_purpose = False
        return pause


def end(process: BaseProcess | ClonedProcess) -> bool:
    """Kill a process; return whether it has ended. If the source hangs, the process ends when the source answers."""
    process.kill()
    process.join(TIMEOUT)
    if process.exitcode is None:
        do_not_wait_for(process)
    return process.exitcode is not None


def do_not_wait_for(process: BaseProcess | ClonedProcess) -> None:
    """Prevent that this process waits for *process* when it exits; multiprocessing has no public way to do so."""
    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]  # noqa: SLF001


def show_title(name: str, mountpoint: str) -> None:
    """Set the title of this process: ps(1) shows role and mount point, top(1) and pgrep(1) only the role."""
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
