"""The keeper: a process that does nothing but share the front's descriptors, so that they outlive the front.

Fronts are cloned from it with CLONE_FILES (clone(2)): keeper and front have one descriptor table. When a
front is killed, all that it had open stays open under the same numbers, files without names among
them, and the next front, cloned from the same keeper, has it all. If the keeper dies, another
fetches the descriptors from the front (pidfd_getfd(2)) and the front is replaced by one that is cloned from it.

The keeper is also the last to see the supervisor end, and cleans up after it.
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
from llloop.supervisor.child import Cloned, fork

_CLONE_FILES = 0x00000400  # <linux/sched.h>
_CLONE_PARENT = 0x00008000
_SYS_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220, "loongarch64": 220, "ppc64le": 120}.get(platform.machine())

# What is to be done, the number of the command, and for FETCH the front's process id and start time.
_COMMAND = struct.Struct("=cIiQ")
# The number of the command, and what came of it.
_ANSWER = struct.Struct("=Ii")
_START, _FETCH = b"s", b"f"
# How long the supervisor waits for the keeper to do what it is told, in seconds.
_PATIENCE = 10.0
_NOBODY = -1
_PAUSE = 0.001  # seconds between two looks


def _clone(flags: int) -> int:
    """Fork with further clone(2) *flags*, as `os.fork` does it, and return the same."""
    python = ctypes.pythonapi
    libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock, as a fork must
    zero = ctypes.c_long(0)
    python.PyOS_BeforeFork()
    pid: int = libc.syscall(
        ctypes.c_long(_SYS_CLONE or 0), ctypes.c_ulong(flags | signal.SIGCHLD), zero, zero, zero, zero
    )
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    if pid < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return pid


def _fetch(pid: int, started: int) -> int:
    """Take over all descriptors of the process of that id and start time; return 0 or a negative errno."""
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
    """The supervisor's side: starts keepers and has them start fronts.

    Args:
        front: runs in each front, with the descriptors that are not a front's own; does not return.
        farewell: runs in the keeper when the supervisor has ended without ending it.
        sentinel: returns a descriptor that is readable when the keeper has ended, or -1 if none runs. Without it,
            nobody notices the end of a keeper that is asked for something.
    """

    def __init__(
        self,
        front: Callable[[Collection[int]], None],
        farewell: Callable[[], None],
        sentinel: Callable[[], int] | None = None,
    ) -> None:
        self._supervisor = os.getpid()
        self._front = front
        self._farewell = farewell
        self._command_reader, self._command_writer = os.pipe2(os.O_CLOEXEC)
        self._answer_reader, self._answer_writer = os.pipe2(os.O_CLOEXEC)
        self._told = 0  # the number of the last command
        self.descriptors = (self._command_reader, self._command_writer, self._answer_reader, self._answer_writer)
        self.sentinel = sentinel
        # What every front starts with. A later keeper inherits more, under numbers that are the front's files by then.
        self.own: Collection[int] = ()
        # The front that may serve. One whose keeper died before it told of it is nobody's, and must not.
        self._admitted = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")

    def close(self) -> None:
        """Let go of the keeper's pipes, when it has ended; a front that still waits for admission ends."""
        self._admitted[0] = _NOBODY
        for fd in self.descriptors:
            os.close(fd)

    def run(self) -> None:
        """Be the keeper, until the supervisor is gone."""
        os.close(self._command_writer)  # so that the supervisor's end is the last
        os.close(self._answer_reader)
        own = syscalls.open_descriptors()  # some of what is inherited is closed in a child
        if self.own:
            own &= set(self.own)
        while True:
            command = os.read(self._command_reader, _COMMAND.size)
            if not command:
                break
            what, number, pid, started = _COMMAND.unpack(command)
            answer = self._start(own) if what == _START else _fetch(pid, started)
            with suppress(BrokenPipeError):  # the supervisor has ended, as the next read will say
                os.write(self._answer_writer, _ANSWER.pack(number, answer))
        self._farewell()

    def _start(self, own: Collection[int]) -> int:
        try:
            pid = _clone(_CLONE_FILES | _CLONE_PARENT) if _SYS_CLONE else -1
        except OSError as error:
            return -(error.errno or 1)
        if pid == 0:
            self._wait_for_admission()
            process = fork.Process(target=self._front, args=(own,), name="llloop-front")
            os._exit(process._bootstrap())  # type: ignore[attr-defined]
        return pid

    @property
    def can_share(self) -> bool:
        """Whether fronts can be cloned on this kind of machine; elsewhere they have to be forked, and share nothing."""
        return _SYS_CLONE is not None

    def _wait_for_admission(self) -> None:
        pid = os.getpid()
        deadline = time.monotonic() + _PATIENCE
        while self._admitted[0] != pid:
            if time.monotonic() > deadline or self._admitted[0] == _NOBODY or os.getppid() != self._supervisor:
                os._exit(1)
            time.sleep(_PAUSE)

    def start_front(self) -> Cloned:
        """Have the keeper start a front, a child of this process.

        Raises:
            OSError: it could not, or does not answer.
        """
        front = Cloned(self._tell(_START))
        self._admitted[0] = front.pid
        return front

    def fetch(self, front: int) -> None:
        """Have a new keeper take over the descriptors of the front with that process id, which must stand still.

        Raises:
            OSError: it could not, or does not answer.
        """
        self._tell(_FETCH, front, start_time(front))

    def _tell(self, what: bytes, pid: int = 0, started: int = 0) -> int:
        poll = select.poll()
        poll.register(self._answer_reader, select.POLLIN)
        if self.sentinel is not None:
            sentinel = self.sentinel()
            if sentinel < 0:
                raise ProcessLookupError(errno.ESRCH, "there is no keeper")
            poll.register(sentinel, select.POLLIN)
        self._told += 1
        os.write(self._command_writer, _COMMAND.pack(what, self._told, pid, started))
        deadline = time.monotonic() + _PATIENCE
        while True:
            ready = [fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
            if not ready:
                raise TimeoutError(errno.ETIMEDOUT, "the keeper does not answer")
            if self._answer_reader not in ready and not syscalls.is_readable(self._answer_reader):
                if syscalls.is_readable(self._command_reader):  # the next one must not do it
                    os.read(self._command_reader, _COMMAND.size)
                raise ProcessLookupError(errno.ESRCH, "the keeper has died")
            number, answer = _ANSWER.unpack(os.read(self._answer_reader, _ANSWER.size))
            if number == self._told:  # else nobody waits any more for what it answers
                break
        if answer < 0:
            raise OSError(-answer, os.strerror(-answer))
        return int(answer)
