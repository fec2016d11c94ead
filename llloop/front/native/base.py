"""What all of llloop's own request handlers share: where requests lie, and how replies are sent."""

from __future__ import annotations

import errno
import os

from ... import wire
from ...syscalls import Attributes
from ..inodes import birth_of
from ..mirror import Mirror


class Responder:
    """The base of the handlers. Each gets the position of a request in `_memory`, and its length.

    Args:
        mirror: what they work on.
        device: the descriptor of /dev/fuse.
    """

    def __init__(self, mirror: Mirror, device: int) -> None:
        self._mirror = mirror
        self._device = device
        self._memory = mirror.router.arena.memory
        self._tree = mirror.tree
        self._handles = mirror.handles
        self._files = mirror.files
        # entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec of struct fuse_entry_out
        (entry, entry_nsec), (valid, valid_nsec) = mirror.policy.entry, mirror.policy.attributes
        self._validity = (entry, valid, entry_nsec, valid_nsec)

    def _send(self, reply: bytes | bytearray | memoryview) -> bool:
        """Write a reply; return False if the kernel no longer waits for it."""
        try:
            os.write(self._device, reply)
        except FileNotFoundError:
            return False
        return True

    def _string(self, start: int, limit: int) -> bytes:
        """Return the NUL-terminated string at *start*."""
        end = self._memory.find(b"\0", start, limit)
        if end < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._memory[start:end]

    def _entry(self, nodeid: int, a: Attributes) -> bytes:
        """Return ``struct fuse_entry_out``."""
        return wire.ENTRY.pack(
            nodeid,
            birth_of(a),
            *self._validity,
            nodeid,
            a.size,
            a.blocks,
            a.atime,
            a.mtime,
            a.ctime,
            a.atime_nsec,
            a.mtime_nsec,
            a.ctime_nsec,
            a.mode,
            a.nlink,
            a.uid,
            a.gid,
            wire.encode_device(a.rdev_major, a.rdev_minor),
            a.blksize,
            0,
        )
