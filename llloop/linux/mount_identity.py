"""The identity of a mount, so that a server unmounts its own mount and never a later one at the same path.

After an unmount, the kernel reuses the mount's device number and mount ID. It never reuses the unique mount ID
(statx(2), STATX_MNT_ID_UNIQUE, Linux 6.8).
"""

from __future__ import annotations

import errno
import os
import select
import time
from dataclasses import dataclass

from llloop.errors import LlloopError
from llloop.linux import mounts, syscalls

# A statfs(2) of a monitoring program makes a mount busy for a moment. How long to try to unmount, and after how long
# to check the mount's identity again, both in seconds.
BUSY_TIMEOUT = 0.5
_LOOK_AGAIN = 0.05


@dataclass(frozen=True, slots=True)
class MountIdentity:
    """One mount. It stays the same mount when it is moved, or when a directory above it is renamed.

    Attributes:
        mountpoint: where it was mounted: an absolute path without symlinks.
        device: major and minor number.
        mount_id: the mount ID in /proc/self/mountinfo.
        unique_id: the unique mount ID, or None if the kernel has none or does not tell it.
    """

    mountpoint: str
    device: tuple[int, int]
    mount_id: int
    unique_id: int | None = None

    def _entry(self) -> mounts.MountEntry | None:
        """Return the mount that has this device number and mount ID now, or None."""
        numbers = self.device, self.mount_id
        return next((one for one in mounts.mounts() if (one.device, one.mount_id) == numbers), None)

    def current_path(self, connection: int | None = None) -> str | None:
        """Return the path where this mount is now, or None if no path leads to it.

        Args:
            connection: a descriptor of the mount's /dev/fuse. If the kernel has no unique IDs, it shows whether another
                mount has taken over the numbers: the kernel ends the connection of a mount that is unmounted.
        """
        entry = self._entry()
        if entry is None or entry != mounts.find_mount(entry.mountpoint):
            return None
        unique_id = syscalls.unique_mount_id(entry.mountpoint) if self.unique_id is not None else None
        if unique_id is not None:
            ours = unique_id == self.unique_id
        else:
            # A connection that was aborted has ended too, but its mount remains and is dead.
            ours = connection is None or not _has_ended(connection) or mounts.is_dead(entry.mountpoint)
        return entry.mountpoint if ours else None

    def is_reachable(self, connection: int | None = None) -> bool:
        """Return whether a path leads to this mount now; *connection* as for `current_path`."""
        return self.current_path(connection) is not None

    def is_covered(self) -> bool:
        """Return whether another mount covers this one, so that no path leads to it."""
        entry = self._entry()
        return entry is not None and entry != mounts.find_mount(entry.mountpoint)

    def unmount(self, *, lazy: bool) -> None:
        """Unmount this mount. Do nothing if it is gone, even if another mount is at its path.

        Args:
            lazy: detach the mount immediately even if it is busy; programs keep their open files. Otherwise try again
                for `BUSY_TIMEOUT` seconds while it is busy.

        Raises:
            OSError: EBUSY if it is in use, or another error of umount2(2) (as root).
            LlloopError: an error message of fusermount (as an ordinary user).
        """
        deadline = time.monotonic() + BUSY_TIMEOUT
        while (current_path := self.current_path()) is not None:
            try:
                if lazy and os.geteuid() == 0:
                    self._detach(current_path)
                else:
                    _try_to_unmount(current_path, lazy)
                return
            except (OSError, LlloopError) as error:
                if self.current_path() != current_path:  # another process has unmounted or moved it
                    continue
                busy = isinstance(error, OSError) and error.errno == errno.EBUSY
                if not busy or time.monotonic() > deadline:
                    raise

    def _detach(self, current_path: str) -> None:
        """Detach the mount through a descriptor, so that no other mount can replace it between check and detach."""
        root = os.open(current_path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if self.unique_id is None or syscalls.unique_mount_id(root) in (None, self.unique_id):
                syscalls.umount(f"/proc/self/fd/{root}", syscalls.MNT_DETACH)
        finally:
            os.close(root)


def _try_to_unmount(current_path: str, lazy: bool) -> None:
    """Unmount what is mounted at *current_path*; try again for `_LOOK_AGAIN` seconds while it is busy.

    It tries without pause, because a program that calls statfs(2) in a loop leaves only short gaps, and because
    another mount must not take the path unnoticed meanwhile.
    """
    deadline = time.monotonic() + _LOOK_AGAIN
    while True:
        try:
            mounts.unmount(current_path, lazy=lazy)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0)  # let the process that makes the mount busy go on


def identify(mountpoint: str) -> MountIdentity | None:
    """Return the identity of the topmost mount at *mountpoint* (an absolute path without symlinks), or None."""
    entry = mounts.find_mount(mountpoint)
    return of(entry) if entry is not None else None


def of(entry: mounts.MountEntry) -> MountIdentity:
    """Return the identity of the mount *entry*, which has just been read from mountinfo."""
    unique_id = syscalls.unique_mount_id(entry.mountpoint)
    return MountIdentity(entry.mountpoint, entry.device, entry.mount_id, unique_id)


def detach_if_dead(mountpoint: str, *, lazy: bool = True) -> bool:
    """Unmount the FUSE mount at *mountpoint* if its server is gone.

    Args:
        mountpoint: an absolute path without symlinks.
        lazy: as for `MountIdentity.unmount`.

    Returns:
        Whether there was a dead mount.

    Raises:
        OSError, LlloopError: as `MountIdentity.unmount`.
    """
    identity = identify(mountpoint)
    if identity is None or not mounts.is_dead(mountpoint):
        return False
    # A dead mount cannot come back to life, so unmounting by identity unmounts a dead mount or nothing.
    identity.unmount(lazy=lazy)
    return True


def _has_ended(connection: int) -> bool:
    """Return whether a FUSE connection has ended: its mount was unmounted, or the connection aborted (fuse(4))."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))
