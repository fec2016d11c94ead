"""The file systems that the watcher hears: that of the source, and those mounted below it."""

from __future__ import annotations

import logging
import os
import stat

from llloop.errors import HostError
from llloop.linux import fanotify, mounts, syscalls
from llloop.watch.parsing import EVENTS, FileSystem, layout_of

_log = logging.getLogger(__name__)


class CannotHear(Exception):
    """A file system cannot be heard; the text says why."""


class FileSystems:
    """Marks file systems for a fanotify group.

    Attributes:
        heard: the marked file systems, by f_fsid.
        left_out: the mount points below the source whose file systems cannot be heard.

    Args:
        group: the descriptor of the group.
        source: the absolute path of the source.
        own: st_dev of the mount itself, which may lie below the source, as (major, minor).
    """

    def __init__(self, group: int, source: str, own: tuple[int, int]) -> None:
        self._group = group
        self._source = source
        self._own = own
        self._tried: set[tuple[int, int, str]] = set()
        self.heard: dict[int, FileSystem] = {}
        self.left_out: dict[str, str] = {}

    def add_source(self) -> None:
        """Mark the file system of the source.

        Raises:
            CannotHear: it cannot be heard.
        """
        self._add(self._source)

    def add_mounts(self) -> bool:
        """Mark file systems that were mounted below the source; return whether mounts have come or gone since then.

        Raises:
            HostError: the kernel's list of mounts cannot be read.
        """
        below_source = self._source.rstrip("/") + "/"
        below = {
            (entry.mount_id, entry.device[1], entry.mountpoint)
            for entry in mounts.mounts()
            if entry.device != self._own and entry.mountpoint.startswith(below_source)
        }
        gone, new = self._tried - below, below - self._tried
        self._tried = below
        for _, _, place in gone:
            self.left_out.pop(place, None)
        for _, _, place in new:
            try:
                self._add(place)
            except CannotHear as reason:
                self.left_out[place] = str(reason)
                _log.warning("%s is watched by timeouts: %s", place, reason)
        return bool(gone or new)

    def devices(self) -> frozenset[int]:
        """Return the devices that are heard, as in `Attributes.device`."""
        return frozenset(one.device for one in self.heard.values())

    def _add(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise CannotHear(error.strerror) from None
        try:
            self._mark(f"/proc/self/fd/{fd}", fd)
        except OSError as error:
            raise CannotHear(f"its file system does not support it ({error.strerror})") from None
        finally:
            os.close(fd)

    def _mark(self, path: str, fd: int) -> None:
        attributes = syscalls.fstatx(fd)
        place = os.fsencode(path) + (b"/." if stat.S_ISDIR(attributes.mode) else b"")
        if syscalls.file_system(fd).type in syscalls.CAN_HANG:
            raise CannotHear("changes by other hosts or a server cannot be heard")
        layout = layout_of(*fanotify.file_handle(place), attributes.ino)
        if layout is None:
            raise CannotHear("the file handles of its file system are unknown to llloop")
        fanotify.mark_filesystem(self._group, EVENTS, place)
        self.heard[os.fstatvfs(fd).f_fsid] = FileSystem(attributes.device, layout)


def mounts_or_nothing(file_systems: FileSystems) -> bool:
    """Call `FileSystems.add_mounts`; return False if the list of mounts cannot be read."""
    try:
        return file_systems.add_mounts()
    except HostError as error:
        _log.warning("%s", error)
        return False
