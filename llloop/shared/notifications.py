"""FUSE notifications: messages from the server to the kernel that answer no request, written to /dev/fuse.

The kernel caches names, attributes and pages. If a request changes an inode in a way that the kernel does not expect,
the server must notify the kernel before it answers the request. After the answer, the caller could see old values.

What a notification waits for (fs/fuse/inode.c, fs/fuse/dir.c):

* `expire_attributes` only waits if the kernel is evicting the inode. While a request for the inode is unanswered, the
  kernel does not evict it.
* `drop_pages` waits for pages that are being read or written back. This process may have to answer those requests.
* `drop_entry` and `expire_entry` wait for the directory's lock. The kernel holds it while a request changes that
  directory, or looks up a name in it that is not cached.
"""

from __future__ import annotations

import os
from contextlib import suppress

from llloop.linux import fuse

_ATTRIBUTES_ONLY = -1  # as offset
_TO_THE_END = 0  # as length


def expire_attributes(device: int, nodeid: int) -> None:
    """Make the kernel drop the cached attributes and ACLs of an inode.

    Args:
        device: a descriptor of /dev/fuse.
        nodeid: the inode; if the kernel does not know it, nothing happens.
    """
    _invalidate(device, nodeid, _ATTRIBUTES_ONLY, 0)


def drop_pages(device: int, nodeid: int, offset: int = 0, length: int = _TO_THE_END) -> None:
    """Make the kernel write dirty pages of an inode, then drop its cached pages in a range and its attributes.

    Args:
        device: a descriptor of /dev/fuse.
        nodeid: the inode; if the kernel does not know it, nothing happens.
        offset: the start of the range in bytes.
        length: the length of the range in bytes, 0 for everything to the end.
    """
    _invalidate(device, nodeid, offset, length)


def drop_entry(device: int, parent: int, name: bytes) -> None:
    """Make the kernel forget which file a name leads to. This detaches mounts below the name.

    Args:
        device: a descriptor of /dev/fuse.
        parent: the directory; if the kernel does not know it or the name, nothing happens.
        name: the name.
    """
    _invalidate_entry(device, parent, name, 0)


def expire_entry(device: int, parent: int, name: bytes) -> None:
    """Make the kernel look up a name again before it uses it; for the arguments see `drop_entry`.

    If the name is just being looked up again, the answer to that counts.
    """
    _invalidate_entry(device, parent, name, fuse.FUSE_EXPIRE_ONLY)


def _invalidate_entry(device: int, parent: int, name: bytes, flags: int) -> None:
    size = fuse.INVAL_ENTRY.size + len(name) + 1
    head = fuse.INVAL_ENTRY.pack(size, fuse.FUSE_NOTIFY_INVAL_ENTRY, 0, parent, len(name), flags)
    _tell(device, head + name + b"\0")


def drop_entry_of(device: int, parent: int, name: bytes, nodeid: int) -> None:
    """Like `drop_entry`, but only if the name leads to the inode *nodeid*."""
    size = fuse.DELETE.size + len(name) + 1
    _tell(device, fuse.DELETE.pack(size, fuse.FUSE_NOTIFY_DELETE, 0, parent, nodeid, len(name)) + name + b"\0")


def increase_epoch(device: int) -> None:
    """Make the kernel look up every name again before it uses it (Linux 6.16, FUSE 7.44). This never waits."""
    os.write(device, fuse.OUT_HEADER.pack(fuse.OUT_HEADER_SIZE, fuse.FUSE_NOTIFY_INC_EPOCH, 0))


def expire_all_entries(device: int) -> None:
    """Do `increase_epoch` if the kernel can. On older kernels, and after the unmount, nothing happens."""
    with suppress(OSError):
        increase_epoch(device)


def resend(device: int) -> None:
    """Make the kernel send every unanswered request again (Linux 6.9, FUSE_HAS_RESEND)."""
    os.write(device, fuse.OUT_HEADER.pack(fuse.OUT_HEADER_SIZE, fuse.FUSE_NOTIFY_RESEND, 0))


def _invalidate(device: int, nodeid: int, offset: int, length: int) -> None:
    _tell(device, fuse.INVAL_INODE.pack(fuse.INVAL_INODE.size, fuse.FUSE_NOTIFY_INVAL_INODE, 0, nodeid, offset, length))


def _tell(device: int, message: bytes) -> None:
    # The kernel knows no such inode, or no such name; or a number of a directory is that of another file now.
    with suppress(FileNotFoundError, NotADirectoryError):
        os.write(device, message)
