"""Which mount is which: a server must end its own mount, and never one that has come to its place since.

The kernel gives a mount's device number and its mount ID to the next mount as soon as they are free. The unique mount
ID is never given again (statx(2), STATX_MNT_ID_UNIQUE, Linux 6.8).
"""

from __future__ import annotations

import errno
import os
import select
import time
from dataclasses import dataclass

from llloop.errors import LlloopError
from llloop.linux import mounts, syscalls

# Somebody who looks at a mount (statfs(2) of a monitor) makes it busy for a moment: how long to wait for that, in
# seconds, and how long until the mount's identity is looked at again.
BUSY_PATIENCE = 0.5
_LOOK_AGAIN = 0.05


@dataclass(frozen=True, slots=True)
class MountIdentity:
    """One mount, wherever it is now: it can be moved, and a directory above it renamed.

    Attributes:
        mountpoint: where it was made: an absolute path without symlinks.
        device: major and minor number.
        mount_id: the kernel's number of the mount in /proc/self/mountinfo.
        unique_id: its unique ID, or None where the kernel has none or does not tell.
    """

    mountpoint: str
    device: tuple[int, int]
    mount_id: int
    unique_id: int | None = None

    def _entry(self) -> mounts.MountEntry | None:
        """Return the mount that has its numbers now, None if there is none."""
        numbers = self.device, self.mount_id
        return next((one for one in mounts.mounts() if (one.device, one.mount_id) == numbers), None)

    def place(self, connection: int | None = None) -> str | None:
        """Return the path at which this very mount is now, None if it cannot be reached by a path.

        Args:
            connection: a descriptor of /dev/fuse that belongs to it. Without unique IDs it tells whether the mount's
                numbers have become another's: the connection of a mount that was unmounted has ended.
        """
        entry = self._entry()
        if entry is None or entry != mounts.find_mount(entry.mountpoint):
            return None
        unique_id = syscalls.unique_mount_id(entry.mountpoint) if self.unique_id is not None else None
        if unique_id is not None:
            ours = unique_id == self.unique_id
        else:
            # A connection also ends if it is aborted, and leaves the mount behind: that one is dead.
            ours = connection is None or not _has_ended(connection) or mounts.is_dead(entry.mountpoint)
        return entry.mountpoint if ours else None

    def is_there(self, connection: int | None = None) -> bool:
        """Whether this very mount can be reached by a path now; *connection* as for `place`."""
        return self.place(connection) is not None

    def is_covered(self) -> bool:
        """Whether another mount lies over it, and it cannot be reached."""
        entry = self._entry()
        return entry is not None and entry != mounts.find_mount(entry.mountpoint)

    def unmount(self, *, lazy: bool) -> None:
        """Unmount it, unless it has gone already; another mount in its place is left alone.

        Args:
            lazy: detach it now even if it is busy; what has files open there keeps them. Otherwise a mount that is
                busy is tried again for `BUSY_PATIENCE`.

        Raises:
            OSError: EBUSY if it is in use, or what umount2(2) says (as root).
            LlloopError: what fusermount says (as an ordinary user).
        """
        deadline = time.monotonic() + BUSY_PATIENCE
        while (place := self.place()) is not None:
            try:
                if lazy and os.geteuid() == 0:
                    self._detach(place)
                else:
                    _try_to_unmount(place, lazy)
                return
            except (OSError, LlloopError) as error:
                if self.place() != place:  # somebody else was faster, or has moved it
                    continue
                busy = isinstance(error, OSError) and error.errno == errno.EBUSY
                if not busy or time.monotonic() > deadline:
                    raise

    def _detach(self, place: str) -> None:
        """Detach the mount by a descriptor, so that no other can come to its place between the look and the deed."""
        root = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if self.unique_id is None or syscalls.unique_mount_id(root) in (None, self.unique_id):
                syscalls.umount(f"/proc/self/fd/{root}", syscalls.MNT_DETACH)
        finally:
            os.close(root)


def _try_to_unmount(place: str, lazy: bool) -> None:
    """Unmount what is mounted at *place*; try again for a moment while it is busy.

    The tries follow each other closely: who looks at it again and again leaves little time in between. And so
    no other mount can come to its place unnoticed.
    """
    deadline = time.monotonic() + _LOOK_AGAIN
    while True:
        try:
            mounts.unmount(place, lazy=lazy)
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0)  # let who looks go on


def identify(mountpoint: str) -> MountIdentity | None:
    """Return which mount is at *mountpoint*, an absolute path without symlinks; the topmost if several are."""
    entry = mounts.find_mount(mountpoint)
    return of(entry) if entry is not None else None


def of(entry: mounts.MountEntry) -> MountIdentity:
    """Return which mount *entry* is, which was found a moment ago."""
    unique_id = syscalls.unique_mount_id(entry.mountpoint)
    return MountIdentity(entry.mountpoint, entry.device, entry.mount_id, unique_id)


def detach_if_dead(mountpoint: str, *, lazy: bool = True) -> bool:
    """Unmount the FUSE mount at *mountpoint* if its server is gone, and nothing else.

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
    # What is dead stays so: if the mount is still the same one, it is the dead one.
    identity.unmount(lazy=lazy)
    return True


def _has_ended(connection: int) -> bool:
    """Whether a FUSE connection has ended, because its mount was unmounted or it was aborted (fuse(4))."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))
