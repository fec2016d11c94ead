"""Checks whether the source still exists and can be changed, in a separate process, because the source may hang."""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import suppress
from typing import Any

from llloop.linux import syscalls
from llloop.linux.process import Process, fork
from llloop.supervisor.event_loop import EventLoop
from llloop.supervisor.signals import ignore_signals

# How long a result stays valid, in seconds.
_FRESH = 0.5
# How long to wait for the end of the killed process, in seconds.
_KILL_TIMEOUT = 0.1
# Exit codes of the process, above every errno.
_MAX_ERRNO = 199
_DELETED, _MISSING, _REPLACED = range(200, 203)
_PROBLEMS = {
    _DELETED: "the source has been deleted",
    _MISSING: "the source is no longer at its path: it was renamed, or its file system was unmounted",
    _REPLACED: "another directory is at the path of the source: it was replaced, or something was mounted or unmounted",
}
# No file system allows names of this length, so the call always fails. But like every change, it first waits until a
# frozen file system (fsfreeze(8)) is thawed.
_NO_NAME = b"x" * 2000


class SourceCheck:
    """Checks the source on demand, with one process at a time, however long the source hangs.

    Args:
        loop: the supervisor's event loop.
        source: the path of the source.
        root: an O_PATH descriptor of the source.
        changes: whether the mount is writable, so that a frozen source is a problem.
    """

    def __init__(self, loop: EventLoop, source: str, root: int, changes: bool) -> None:
        self._loop = loop
        self._source = source
        self._root = root
        self._changes = changes
        self._process: Process | None = None
        self._begun = 0.0
        self._ended = float("-inf")
        self._code = 0

    def _note_end(self, code: int) -> None:
        self._code = code
        self._process = None
        self._ended = time.monotonic()

    def ask(self) -> dict[str, Any]:
        """Start a check, unless one is running or has just finished. Never wait.

        Returns:
            ``waiting``: for how many seconds the source has not answered, None if no check is running; ``problem``: a
            description of the last result, None if there is no problem.
        """
        now = time.monotonic()
        if self._process is None and now - self._ended > _FRESH:
            self._begun = now
            self._process = fork(self._look, "llloop-source-check")
            self._loop.watch_process(self._process, self._note_end)
        waiting = now - self._begun if self._process is not None else None
        return {"waiting": waiting, "problem": _problem(self._code)}

    def _look(self) -> int:
        """Check the source in the separate process; the exit code is the result."""
        ignore_signals()
        with suppress(OSError):
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        # Close /dev/fuse and all other descriptors: this process may hang, and must not keep the mount alive.
        os.closerange(0, self._root)
        os.closerange(self._root + 1, os.sysconf("SC_OPEN_MAX"))
        try:
            return look(self._source, self._root, self._changes)
        except OSError as error:
            return min(error.errno or errno.EIO, _MAX_ERRNO)

    def close(self) -> None:
        """Kill the process, but do not wait for its end if the source hangs."""
        if self._process is not None:
            self._loop.forget(self._process.pidfd)
            self._process.end(_KILL_TIMEOUT)
            self._process = None


def look(source: str, root: int, changes: bool) -> int:
    """Return 0 if the source is still the opened directory, else a code for the problem, or an errno. May hang.

    Args:
        source: the path of the source.
        root: a descriptor of the source.
        changes: whether to check that it can be changed.
    """
    itself = os.fstat(root)
    if itself.st_nlink == 0:
        return _DELETED
    try:
        there = os.stat(source)
    except FileNotFoundError:
        return _MISSING
    if (there.st_dev, there.st_ino) != (itself.st_dev, itself.st_ino):
        return _REPLACED
    if changes:
        with suppress(OSError):  # mostly ENAMETOOLONG
            os.rmdir(_NO_NAME, dir_fd=root)
    return 0


def _problem(code: int) -> str | None:
    if code <= 0:  # no problem, or the process was killed without a result
        return None
    return _PROBLEMS.get(code) or f"the source cannot be read: {os.strerror(code)}"
