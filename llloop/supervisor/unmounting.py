"""The process that unmounts: that writes cached data back through the mount, so the supervisor must not wait for it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.process import BaseProcess

from llloop.errors import LlloopError
from llloop.linux import syscalls
from llloop.linux.mount_identity import MountIdentity
from llloop.supervisor.child import STOP_SIGNALS, fork

_log = logging.getLogger(__name__)

# After a lazy unmount, how long in seconds those who still use the mount may go on.
GRACE = 5.0


def start(mount: MountIdentity, device: int, *, lazy: bool) -> BaseProcess:
    """Start a process that unmounts *mount* and says by its exit code, an errno, how that went.

    Args:
        mount: the mount; another one in its place is left alone.
        device: the descriptor of /dev/fuse.
        lazy: detach it now even if it is busy.

    Raises:
        OSError: no process can be started.
    """
    process = fork.Process(target=_unmount, args=(mount, device, lazy), name="llloop-unmount")
    process.start()
    return process


def _unmount(mount: MountIdentity, device: int, lazy: bool) -> None:
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    place = mount.current_path(device)
    # As long as this process held it, what it asks of a mount that nobody serves would wait for itself.
    os.close(device)
    if place is None and mount.is_covered():
        _log.error("%s cannot be unmounted: another mount covers it; unmount that one first", mount.mountpoint)
        sys.exit(1)
    if place is None:
        sys.exit(0)
    if lazy:
        _start_writing_back(place)
    try:
        mount.unmount(lazy=lazy)
    except OSError as error:
        os._exit(error.errno or 1)
    except LlloopError as error:
        _log.error("%s", error)
        sys.exit(1)


def _start_writing_back(mountpoint: str) -> None:
    """Have the kernel begin to send what it has collected for open files (--writeback), while they can be served."""

    def sync() -> None:
        with suppress(OSError):
            fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            syscalls.syncfs(fd)

    thread = threading.Thread(target=sync, daemon=True)
    thread.start()
    thread.join(GRACE)  # a front that hangs must not keep the mount from being detached
