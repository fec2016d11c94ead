"""Whether the source is still there and can be changed, found out by a process of its own, since it may hang."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any

from llloop.linux import syscalls
from llloop.supervisor.child import fork
from llloop.supervisor.event_loop import EventLoop

# An answer is given again to those who ask within this time, in seconds.
_FRESH = 0.5
# Exit codes of the process, above every errno.
_DELETED, _MISSING, _REPLACED = range(200, 203)
_PROBLEMS = {
    _DELETED: "the source has been deleted",
    _MISSING: "the source is no longer at its path: it was renamed, or its file system was unmounted",
    _REPLACED: "another directory is at the path of the source: it was replaced, or something was mounted or unmounted",
}
# No file system has names of this length, so nothing can have it: the call fails, but only after it has waited for a
# frozen file system (fsfreeze(8)) to be thawed, as every change has to.
_NO_NAME = b"x" * 2000


class SourceCheck:
    """Looks at the source on demand. At most one process looks at a time, however long the source hangs.

    Args:
        loop: the supervisor's.
        source: its path.
        root: an O_PATH descriptor of it.
        changes: whether the mount can change it; if not, that it is frozen does not matter.
    """

    def __init__(self, loop: EventLoop, source: str, root: int, changes: bool) -> None:
        self._loop = loop
        self._source = source
        self._root = root
        self._changes = changes
        self._process: BaseProcess | None = None
        self._pidfd = -1
        self._begun = 0.0
        self._ended = float("-inf")
        self._code = 0

    def _note_end(self, process: BaseProcess) -> None:
        process.join()
        self._code = process.exitcode or 0
        self._process = None
        self._ended = time.monotonic()

    def ask(self) -> dict[str, Any]:
        """Begin to look, unless that has been done a moment ago or is being done. Never waits.

        Returns:
            ``waiting``: for how many seconds the source has not answered, None if there is an answer; ``problem``: the
            last answer, a text for people, None if all is well.
        """
        now = time.monotonic()
        if self._process is None and now - self._ended > _FRESH:
            self._begun = now
            process = fork.Process(target=self._look, name="llloop-source-check")
            process.start()
            try:
                self._pidfd = self._loop.watch_process(process, lambda: self._note_end(process))
            except OSError:
                process.kill()
                raise
            self._process = process
        waiting = now - self._begun if self._process is not None else None
        return {"waiting": waiting, "problem": _problem(self._code)}

    def _look(self) -> None:
        """Look at the source, in a process of its own, and tell by the exit code."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        # Whoever holds /dev/fuse keeps the mount alive, and this process may hang.
        os.closerange(0, self._root)
        os.closerange(self._root + 1, os.sysconf("SC_OPEN_MAX"))
        try:
            os._exit(look(self._source, self._root, self._changes))
        except OSError as error:
            os._exit(min(error.errno or errno.EIO, 199))

    def close(self) -> None:
        """End the process, and do not wait for it where the source hangs."""
        if self._process is not None:
            self._process.kill()
            if syscalls.is_readable(self._pidfd, 0.1):
                self._process.join()
            self._loop.close(self._pidfd)
            # At its exit this process is not to wait for it, either, which multiprocessing has no other way to say.
            multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]
            self._process = None


def look(source: str, root: int, changes: bool) -> int:
    """Return 0 if the directory is as it was opened, a code for what is wrong, or an errno. May hang.

    Args:
        source: its path.
        root: a descriptor of it.
        changes: whether to find out if it can be changed.
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
    if code <= 0:  # a process that was killed knows nothing
        return None
    return _PROBLEMS.get(code) or f"the source cannot be read: {os.strerror(code)}"
