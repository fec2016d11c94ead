"""Notifications: what the server tells the kernel unasked, written to /dev/fuse.

The kernel caches names, attributes and pages. Whoever changes an inode in another way than the kernel expects of the
request at hand tells the kernel before the request is answered: with the answer the caller goes on and may look.

What a notification waits for (fs/fuse/inode.c, fs/fuse/dir.c):

* `expire_attributes` waits for nothing, as long as the kernel is not evicting the inode at that moment. It never does
  while a request about this inode is unanswered.
* `drop_pages` waits for pages that are being read or written back, whose requests this process may have to answer.
* `expire_entry` waits for the directory's lock, which the kernel holds while a request changes that directory.
"""

from __future__ import annotations

import os
from contextlib import suppress

from llloop.linux import fuse

_ATTRIBUTES_ONLY = -1  # an offset
_TO_THE_END = 0  # a length


def expire_attributes(device: int, nodeid: int) -> None:
    """Have the kernel ask again for the attributes and ACLs of an inode before it uses them.

    Args:
        device: a descriptor of /dev/fuse.
        nodeid: the inode; nothing happens if the kernel does not know it.
    """
    _invalidate(device, nodeid, _ATTRIBUTES_ONLY, 0)


def drop_pages(device: int, nodeid: int, offset: int = 0, length: int = _TO_THE_END) -> None:
    """Have the kernel drop cached pages of an inode, after those that are dirty were written, and its attributes.

    Args:
        device: a descriptor of /dev/fuse.
        nodeid: the inode; nothing happens if the kernel does not know it.
        offset: the first byte of the range.
        length: how many bytes it has, 0 for all to the end.
    """
    _invalidate(device, nodeid, offset, length)


def expire_entry(device: int, parent: int, name: bytes) -> None:
    """Have the kernel look a name up again before it uses it.

    Args:
        device: a descriptor of /dev/fuse.
        parent: the directory; nothing happens if the kernel does not know it, or no such name in it.
        name: the name.
    """
    size = fuse.INVAL_ENTRY.size + len(name) + 1
    _tell(device, fuse.INVAL_ENTRY.pack(size, fuse.FUSE_NOTIFY_INVAL_ENTRY, 0, parent, len(name), 0) + name + b"\0")


def resend(device: int) -> None:
    """Have the kernel send again what it has sent and nobody has answered (Linux 6.9, HAS_RESEND)."""
    os.write(device, fuse.OUT_HEADER.pack(fuse.OUT_HEADER_SIZE, fuse.FUSE_NOTIFY_RESEND, 0))


def _invalidate(device: int, nodeid: int, offset: int, length: int) -> None:
    _tell(device, fuse.INVAL_INODE.pack(fuse.INVAL_INODE.size, fuse.FUSE_NOTIFY_INVAL_INODE, 0, nodeid, offset, length))


def _tell(device: int, message: bytes) -> None:
    with suppress(FileNotFoundError):  # the kernel knows no such inode, or no such name
        os.write(device, message)
