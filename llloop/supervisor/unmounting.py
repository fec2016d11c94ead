"""Unmounting in a separate process, because the kernel then writes back cached data through the mount."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from llloop.errors import LlloopError
from llloop.linux import syscalls
from llloop.linux.mount_identity import MountIdentity
from llloop.linux.process import Process, fork
from llloop.logging.escape import printable
from llloop.supervisor.child import TIMEOUT
from llloop.supervisor.event_loop import EventLoop
from llloop.supervisor.signals import ignore_signals

_log = logging.getLogger(__name__)

# How long programs may still use the mount after a lazy unmount, in seconds.
GRACE = 5.0


class Unmounting:
    """Unmounts on request. If the mount is busy, detaches it and waits for `GRACE` seconds.

    When no program uses the mount any more, the front ends, and so does the supervisor.

    Args:
        loop: the supervisor's event loop.
        mount: the mount; another one at the same path is not touched.
        device: the descriptor of /dev/fuse.
        finish: ends the supervisor although the front still serves; takes whether unmounting failed.
    """

    def __init__(self, loop: EventLoop, mount: MountIdentity, device: int, finish: Callable[[bool], None]) -> None:
        self._loop = loop
        self._mount = mount
        self._device = device
        self._finish = finish
        self._deadline = loop.deadline(self._time_is_up)
        self._process: Process | None = None
        self._lazy = False
        self.begun = False

    def request(self) -> None:
        """Start unmounting. A second request ends the supervisor immediately.

        Raises:
            OSError: no process can be started.
        """
        if self.begun:
            self._finish(False)
        else:
            self.begun = True
            self._start(lazy=False)

    def _start(self, lazy: bool) -> None:
        self._lazy = lazy
        if lazy:  # it accesses the mount, and so hangs if the source does
            self._deadline.set_in(2 * GRACE)
        self._process = fork(lambda: _unmount(self._mount, self._device, lazy), "llloop-unmount")
        self._loop.watch_process(self._process, self._ended)

    def _ended(self, code: int) -> None:
        self._process = None
        place = self._mount.mountpoint
        if code == errno.EBUSY and not self._lazy:
            _log.warning("%s is busy: detaching it lazily; programs that use it may go on for %g seconds", place, GRACE)
            print(f"llloop: {printable(place)} is busy, detaching it lazily", file=sys.stderr, flush=True)
            self._start(lazy=True)
        elif code != 0 and (self._mount.is_reachable(self._device) or self._mount.is_covered()):
            _log.error("%s could not be unmounted", place)
            self._finish(True)
        else:
            self._deadline.set_in(GRACE)

    def _time_is_up(self) -> None:
        _log.warning("%s is still in use after %g seconds; the server ends anyway", self._mount.mountpoint, GRACE)
        self._finish(False)

    def close(self) -> None:
        """End the unmounting process."""
        process, self._process = self._process, None  # with it go its descriptors
        if process is not None:
            if not self._mount.is_reachable(self._device):
                process.wait(TIMEOUT)  # it is about to end; if it were killed, its fusermount would remain
            process.end(TIMEOUT)


def detach(mount: MountIdentity, device: int) -> None:
    """Detach a mount if it still exists; *device* is its descriptor of /dev/fuse."""
    try:
        if mount.is_reachable(device):
            mount.unmount(lazy=True)
    except (OSError, LlloopError) as error:
        _log.error("%s could not be detached: %s", mount.mountpoint, error)


def _unmount(mount: MountIdentity, device: int, lazy: bool) -> int:
    """Unmount, in a separate process; return its exit code, 0 or an errno.

    Args:
        mount: the mount.
        device: the descriptor of /dev/fuse.
        lazy: detach the mount immediately even if it is busy.
    """
    ignore_signals()
    place = mount.current_path(device)
    # While this process has /dev/fuse open, its own access to a mount without a server would hang.
    os.close(device)
    if place is None and mount.is_covered():
        _log.error("%s cannot be unmounted: another mount covers it; unmount that one first", mount.mountpoint)
        return 1
    if place is None:
        return 0
    if lazy:
        _start_writing_back(place)
    try:
        mount.unmount(lazy=lazy)
    except OSError as error:
        return error.errno or 1
    except LlloopError as error:
        _log.error("%s", error)
        return 1
    return 0


def _start_writing_back(mountpoint: str) -> None:
    """Make the kernel start writing back cached data of open files (--writeback), while the front still serves."""

    def sync() -> None:
        with suppress(OSError):
            fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            syscalls.syncfs(fd)

    thread = threading.Thread(target=sync, daemon=True)
    thread.start()
    thread.join(GRACE)  # a front that hangs must not prevent the detaching
