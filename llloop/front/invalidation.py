"""Telling the kernel to drop pages it has cached, where llfuse runs the loop and keeps them at every open."""

from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import suppress

_FUSE_NOTIFY_INVAL_INODE = 2  # enum fuse_notify_code of <linux/fuse.h>
# A header with unique 0, then struct fuse_notify_inval_inode_out: inode, offset, length (0: to the end).
_NOTIFICATION = struct.Struct("=IiQQqq")
# The kernel waits for pages that are being read, whose READ this very loop may have to answer: so it is not waited
# for longer than this, in seconds. Pages that are read at the same time as the open are as new as the open is.
_PATIENCE = 0.1


class Invalidator:
    """Writes notifications from a thread of its own, for the kernel may hold the writer until a READ is answered.

    Args:
        device: the descriptor of /dev/fuse.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, "invalidation")

    def drop_pages(self, nodeid: int) -> None:
        """Have the kernel drop all cached pages of an inode; mostly it has done so on return."""
        size = _NOTIFICATION.size
        message = _NOTIFICATION.pack(size, _FUSE_NOTIFY_INVAL_INODE, 0, nodeid, 0, 0)
        with suppress(TimeoutError, FileNotFoundError):  # the kernel may have forgotten the inode
            self._thread.submit(os.write, self._device, message).result(_PATIENCE)
