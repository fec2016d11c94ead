"""Kills a process at a chosen system call, before or after it (ptrace(2)); needs root."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_CONTINUE, _SYSCALL, _DETACH, _SEIZE, _INTERRUPT = 7, 24, 17, 0x4206, 0x4207  # <linux/ptrace.h>
_O_TRACESYSGOOD = 1
_WALL = 0x40000000  # <linux/wait.h>
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_TIMEOUT = 30.0  # seconds
_PAUSE = 0.0002
# The system calls in which the serving thread waits for a request, on x86-64. Another thread of the front waits in read
# until somebody traces requests. All others wait in futex or sleep.
_READ, _POLL, _READV, _PPOLL, _SPLICE = "0", "7", "19", "271", "275"
_WAITS_FOR_REQUESTS = {
    "front": frozenset({_POLL, _READV, _PPOLL, _SPLICE}),
    "worker": frozenset({_READ, _POLL, _PPOLL}),
}

_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_ptrace.restype = ctypes.c_long


def _do(request: int, pid: int, data: int = 0) -> None:
    if _ptrace(request, pid, None, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Traced:
    """A process whose serving thread stops at the beginning and at the end of each of its system calls.

    Its other threads stand still meanwhile: they would take over the work of a thread that is as slow as a traced one.
    `passed` is how many of these stops there were.
    """

    def __init__(self, pid: int, role: str) -> None:
        self._pid = pid
        self._waits_for_requests = _WAITS_FOR_REQUESTS[role]
        self.passed = 0
        self._tid = self._serving()
        self._others = [tid for name in os.listdir(f"/proc/{pid}/task") if (tid := int(name)) != self._tid]
        for tid in self._others:
            self._freeze(tid)
        _do(_SEIZE, self._tid, _O_TRACESYSGOOD)
        _do(_INTERRUPT, self._tid)
        self._next_stop(lambda: False)

    def _serving(self) -> int:
        """Return the serving thread, once it waits for a request."""
        deadline = time.monotonic() + _TIMEOUT
        while True:
            for name in os.listdir(f"/proc/{self._pid}/task"):
                with suppress(OSError):  # it has ended
                    if self._system_call(int(name)) in self._waits_for_requests:
                        return int(name)
            assert time.monotonic() < deadline, "no thread waits for requests"
            time.sleep(_PAUSE)

    def _system_call(self, tid: int) -> str:
        """Return the number of the system call that the thread waits in, otherwise "running" or "-1"."""
        return Path(f"/proc/{self._pid}/task/{tid}/syscall").read_text().split()[0]

    def _freeze(self, tid: int) -> None:
        """Stop a thread while it waits in a system call: elsewhere it may hold the interpreter's lock."""
        _do(_SEIZE, tid)
        while True:
            _do(_INTERRUPT, tid)
            os.waitpid(tid, _WALL)
            if self._system_call(tid).isdigit():
                return
            _do(_CONTINUE, tid)
            time.sleep(_PAUSE)

    def kill_at(self, stop: int, done: Callable[[], bool]) -> bool:
        """Kill the process at the stop with that number, counted from 1; return False if all was *done* before."""
        while True:
            _do(_SYSCALL, self._tid)
            status = self._next_stop(done)
            if status is None:
                break
            self.passed += os.WSTOPSIG(status) == _SYSCALL_STOP
            if self.passed == stop:
                os.kill(self._pid, signal.SIGKILL)
                # Handle the first thread last: its parent gets SIGCHLD only after the tracer.
                for tid in sorted({*self._others, self._tid}, key=lambda one: one == self._pid):
                    os.waitpid(tid, _WALL)
                return True
        self._let_go()
        return False

    def _let_go(self) -> None:
        with suppress(OSError):
            _do(_INTERRUPT, self._tid)
            self._next_stop(lambda: False)
        for tid in (*self._others, self._tid):
            _do(_DETACH, tid)

    def _next_stop(self, done: Callable[[], bool]) -> int | None:
        deadline = time.monotonic() + _TIMEOUT
        while True:
            pid, status = os.waitpid(self._tid, os.WNOHANG | _WALL)
            if pid:
                assert os.WIFSTOPPED(status), f"the traced process has ended: {status:#x}"
                return status
            if done():
                return None
            assert time.monotonic() < deadline, "the traced process does not come to its next system call"
            time.sleep(_PAUSE)
