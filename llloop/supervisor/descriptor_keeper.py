"""The descriptor keeper: a process that shares the front's descriptor table, so that descriptors survive the front.

The keeper clones fronts with CLONE_FILES (clone(2)), so keeper and front have one descriptor table. When a front is
killed, its descriptors stay open with the same numbers, including those of unlinked files. The next front is cloned
from the same keeper and has them all. If the keeper dies, a new keeper fetches the descriptors from the front
(pidfd_getfd(2)), and a front that is cloned from the new keeper replaces the old front.

The keeper also outlives the supervisor. If the supervisor is killed, the keeper detaches the mount.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import select
import signal
import struct
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from llloop.linux import syscalls
from llloop.linux.pidfds import open_process, start_time
from llloop.linux.process import Process, run_as_child

_CLONE_FILES = 0x00000400  # <linux/sched.h>
_CLONE_PARENT = 0x00008000
SYS_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220, "loongarch64": 220, "ppc64le": 120}.get(platform.machine())

# The command, its number, and for FETCH the front's process id and start time.
_COMMAND = struct.Struct("=cIiQ")
# The number of the command, and its result.
_ANSWER = struct.Struct("=Ii")
_START, _FETCH = b"s", b"f"
# How long the supervisor waits for the keeper's answer, in seconds.
TIMEOUT = 10.0
_NO_FRONT = -1
_PAUSE = 0.001  # seconds between two checks


def _clone(flags: int) -> int:
    """Fork with additional clone(2) *flags*; the rest and the result are those of `os.fork`."""
    python = ctypes.pythonapi
    libc = ctypes.PyDLL(None, use_errno=True)  # keeps the GIL, as a fork must
    zero = ctypes.c_long(0)
    python.PyOS_BeforeFork()
    pid: int = libc.syscall(
        ctypes.c_long(SYS_CLONE or 0), ctypes.c_ulong(flags | signal.SIGCHLD), zero, zero, zero, zero
    )
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise syscalls.last_error()
    return pid


def _fetch(pid: int, started: int) -> int:
    """Duplicate all descriptors of the process with that id and start time; return 0 or a negative errno."""
    try:
        low = open_process(pid, started)
        numbers = sorted(int(entry) for entry in os.listdir(f"/proc/{pid}/fd"))
        if not numbers or syscalls.is_readable(low):  # it has ended
            os.close(low)
            return -errno.ESRCH
        pidfd = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, numbers[-1] + 1)
        os.close(low)
        for number in numbers:
            fd = syscalls.pidfd_getfd(pidfd, number)
            if fd != number:
                os.dup2(fd, number, inheritable=False)
                os.close(fd)
        os.close(pidfd)
    except OSError as error:
        return -(error.errno or errno.ESRCH)
    return 0


class DescriptorKeeper:
    """The supervisor's interface to the keeper, and the keeper's main function.

    Args:
        front: runs in each front; takes the descriptors that every front starts with; does not return.
        on_supervisor_death: runs in the keeper after the supervisor has died.
        keeper: returns the keeper process, None if there is none. Without it, the supervisor does not notice that the
            keeper dies during a command.
    """

    def __init__(
        self,
        front: Callable[[Collection[int]], None],
        on_supervisor_death: Callable[[], None],
        keeper: Callable[[], Process | None] | None = None,
    ) -> None:
        self._supervisor = os.getpid()
        self._front = front
        self._on_supervisor_death = on_supervisor_death
        self._command_reader, self._command_writer = os.pipe2(os.O_CLOEXEC)
        self._answer_reader, self._answer_writer = os.pipe2(os.O_CLOEXEC)
        self._last_command = 0  # the number of the last command
        self.descriptors = (self._command_reader, self._command_writer, self._answer_reader, self._answer_writer)
        self.keeper = keeper
        # The descriptors that every front starts with. A later keeper inherits more, but their numbers may be those of
        # the front's files by then.
        self.initial_descriptors: Collection[int] = ()
        # The process id of the front that may serve. A front whose keeper died before it reported the front must not.
        self._admitted = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    def close(self) -> None:
        """Close the keeper's pipes after it has ended; a front that still waits for admission ends."""
        self._admitted[0] = _NO_FRONT
        for fd in self.descriptors:
            os.close(fd)

    def run(self) -> None:
        """Run as the keeper until the supervisor has ended."""
        os.close(self._command_writer)  # so that the pipe ends with the supervisor
        os.close(self._answer_reader)
        own = syscalls.open_descriptors()  # a child closes some of the inherited descriptors
        if self.initial_descriptors:
            own &= set(self.initial_descriptors)
        while True:
            command = os.read(self._command_reader, _COMMAND.size)
            if not command:
                break
            what, number, pid, started = _COMMAND.unpack(command)
            answer = self._start(own) if what == _START else _fetch(pid, started)
            with suppress(BrokenPipeError):  # the supervisor has ended; the next read shows that
                os.write(self._answer_writer, _ANSWER.pack(number, answer))
        self._on_supervisor_death()

    def _start(self, own: Collection[int]) -> int:
        try:
            pid = _clone(_CLONE_FILES | _CLONE_PARENT) if SYS_CLONE else -1
        except OSError as error:
            return -(error.errno or 1)
        if pid == 0:
            run_as_child(lambda: self._run_front(own), "llloop-front")
        return pid

    @property
    def can_share(self) -> bool:
        """Whether fronts can be cloned on this architecture. Otherwise they are forked and share no descriptors."""
        return SYS_CLONE is not None

    def _run_front(self, own: Collection[int]) -> None:
        self._wait_for_admission()
        self._front(own)

    def _wait_for_admission(self) -> None:
        pid = os.getpid()
        deadline = time.monotonic() + TIMEOUT
        while self._admitted[0] != pid:
            if time.monotonic() > deadline or self._admitted[0] == _NO_FRONT or os.getppid() != self._supervisor:
                os._exit(1)
            time.sleep(_PAUSE)

    def start_front(self) -> Process:
        """Make the keeper start a front, which is a child of this process.

        Raises:
            OSError: the keeper failed, has died, or does not answer, or there are no free descriptors.
        """
        front = Process(self._send_command(_START))
        self._admitted[0] = front.pid
        return front

    def fetch(self, front: int) -> None:
        """Make a new keeper fetch the descriptors of the front with that process id, which must be stopped.

        Raises:
            OSError: the keeper failed, has died, or does not answer.
        """
        self._send_command(_FETCH, front, start_time(front))

    def _send_command(self, what: bytes, pid: int = 0, started: int = 0) -> int:
        poll = select.poll()
        poll.register(self._answer_reader, select.POLLIN)
        if self.keeper is not None:
            keeper = self.keeper()
            if keeper is None or not keeper.is_alive():
                raise ProcessLookupError(errno.ESRCH, "there is no keeper")
            poll.register(keeper.pidfd, select.POLLIN)
        self._last_command += 1
        os.write(self._command_writer, _COMMAND.pack(what, self._last_command, pid, started))
        deadline = time.monotonic() + TIMEOUT
        while True:
            ready = [fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
            if not ready:
                raise TimeoutError(errno.ETIMEDOUT, "the keeper does not answer")
            if self._answer_reader not in ready and not syscalls.is_readable(self._answer_reader):
                if syscalls.is_readable(self._command_reader):  # the next keeper must not run this command
                    os.read(self._command_reader, _COMMAND.size)
                raise ProcessLookupError(errno.ESRCH, "the keeper has died")
            number, answer = _ANSWER.unpack(os.read(self._answer_reader, _ANSWER.size))
            if number == self._last_command:  # otherwise it is a late answer to an earlier command
                break
        if answer < 0:
            raise OSError(-answer, os.strerror(-answer))
        return int(answer)
