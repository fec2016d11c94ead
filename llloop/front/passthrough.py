"""FUSE passthrough: the kernel reads and writes files of the source itself.

llloop registers a file with the kernel (FUSE_DEV_IOC_BACKING_OPEN), and the reply to OPEN contains the backing id.
The kernel requires that all concurrent opens of an inode use passthrough or none, and with the same backing id
(fs/fuse/iomode.c, fs/fuse/passthrough.c). So this module keeps the backing id of each inode.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import struct
from collections.abc import Callable
from contextlib import suppress

from llloop.front.killpriv import has_capability
from llloop.front.open_files import Handle, Handles
from llloop.front.recovery.intents import Note
from llloop.linux.credentials import SETID_BITS, Caller, SetidGuard
from llloop.linux.syscalls import CAN_HANG, Attributes, file_system_type

_log = logging.getLogger(__name__)

_BACKING_OPEN = 0x4010E501  # FUSE_DEV_IOC_BACKING_OPEN of <linux/fuse.h>
_BACKING_CLOSE = 0x4004E502
_BACKING_MAP = struct.Struct("=iIQ")  # struct fuse_backing_map: fd, flags, padding
_BACKING_ID = struct.Struct("=I")


def open_backing(device: int, descriptor: int) -> int:
    """Register an open regular file with the kernel and return its backing id.

    Args:
        device: a descriptor of /dev/fuse.
        descriptor: the file, open in any mode; it may be closed afterwards.

    Raises:
        OSError: the kernel or the file system does not allow it (EPERM, EOPNOTSUPP, ELOOP).
    """
    backing: int = fcntl.ioctl(device, _BACKING_OPEN, bytearray(_BACKING_MAP.pack(descriptor, 0, 0)))
    return backing


def close_backing(device: int, backing: int) -> None:
    """Unregister a backing file; opens that use it are not affected."""
    fcntl.ioctl(device, _BACKING_CLOSE, bytearray(_BACKING_ID.pack(backing)))


def refusal(device: int) -> str | None:
    """Return why the kernel does not let this process register files, as text, or None if it does."""
    descriptor = os.memfd_create("llloop-passthrough")
    try:
        close_backing(device, open_backing(device, descriptor))
    except OSError as error:
        return error.strerror
    finally:
        os.close(descriptor)
    return None


def _is_privileged(handle: Handle, attributes: Attributes, is_new: bool) -> bool:
    """Return whether a write by an ordinary user clears set-ID bits or capabilities of the file.

    A new file has no capabilities.
    """
    return bool(attributes.mode & SETID_BITS) or (not is_new and has_capability(handle.descriptor))


def _note_mappings(handle: Handle) -> None:
    """Note that the file may be mapped for writing: the kernel sends no request for stores into such a mapping."""
    if handle.pages is not None and handle.flags & os.O_ACCMODE == os.O_RDWR:
        handle.pages.passthrough = True


class Passthrough:
    """The backing ids of open files.

    Args:
        device: a descriptor of /dev/fuse.
        handles: the open files.
        caller: sets the credentials with which the kernel will write to a registered file.
        setid: makes the kernel clear set-ID bits with such a write, if the file gets some while it is open.
        wanted: whether to use passthrough at all.
        shown: returns the attributes that the mount shows, which decide who can open a file; None if it shows those of
            the source.
    """

    def __init__(
        self,
        device: int,
        handles: Handles,
        caller: Caller,
        setid: SetidGuard,
        wanted: bool,
        shown: Callable[[Attributes], Attributes] | None,
    ) -> None:
        self._device = device
        self._handles = handles
        self._caller = caller
        self._setid = setid
        self._wanted = wanted
        self._shown = shown
        # By inode: the backing id, and the number of open files that use it.
        self._registered: dict[int, tuple[int, int]] = {}
        self._refused: set[int] = set()
        # By mount: whether the file system is on a server.
        self._remote: dict[int, bool] = {}

    def back(self, handle: Handle, attributes: Attributes, note: Note, *, is_new: bool) -> int:
        """Make the kernel do the I/O of a file that was just opened, if possible.

        Args:
            handle: the open file.
            attributes: its attributes.
            note: where to note a new backing id until the handle contains it.
            is_new: whether the open has created the file.

        Returns:
            The backing id, or 0 if the workers do the I/O.
        """
        if handle.backing or not self._wanted:
            return handle.backing
        nodeid = handle.nodeid
        registered = self._registered.get(nodeid)
        if registered is None:
            if handle.unsized:
                return 0
            if any(other is not handle for other in self._handles.of_inode(nodeid)):
                return 0  # earlier opens of this inode do not use passthrough, so this one must not either
            identity = self._identity(handle, attributes if self._shown is None else self._shown(attributes))
            if identity is None or _is_privileged(handle, attributes, is_new):
                return 0
            self._setid.clear(identity[0] != 0)
            try:
                with self._caller(*identity):
                    registered = (open_backing(self._device, handle.descriptor), 0)
            except OSError as error:
                self._note_refusal(handle, error)
                return 0
            note.made_backing(registered[0])
        backing, users = registered
        self._registered[nodeid] = (backing, users + 1)
        self._handles.note_backing(handle, backing)
        _note_mappings(handle)
        return backing

    def _identity(self, handle: Handle, attributes: Attributes) -> tuple[int, int] | None:
        """Return the uid and gid with which the kernel should write to a file, or None if none is right.

        All opens share the credentials of the first registration. File systems reserve blocks for root. So root's ids
        are only used if no other user can open the file for writing. File servers check every access by these ids, so
        there root's ids are used.
        """
        uid, gid = handle.opener
        if uid:
            own = uid, gid
        elif attributes.uid:
            own = attributes.uid, attributes.gid
        elif attributes.mode & (stat.S_IWGRP | stat.S_IWOTH):
            own = None
        else:
            own = 0, 0
        if own != (0, 0) and self._is_remote(handle):
            return 0, 0
        return own

    def _is_remote(self, handle: Handle) -> bool:
        """Return whether a file is on a file server."""
        known = self._remote.get(handle.mount)
        if known is None:
            known = self._remote[handle.mount] = file_system_type(handle.descriptor) in CAN_HANG
        return known

    def take_over(self, handle: Handle, backing: int) -> None:
        """Take over an open file of a dead front, which has the backing id *backing*."""
        handle.backing = backing
        _note_mappings(handle)
        _, users = self._registered.get(handle.nodeid, (backing, 0))
        self._registered[handle.nodeid] = (backing, users + 1)

    def drop(self, backing: int) -> None:
        """Unregister a backing id that a dead front had not yet noted in a handle."""
        if backing and backing not in (known for known, _ in self._registered.values()):
            with suppress(OSError):
                close_backing(self._device, backing)

    def _note_refusal(self, handle: Handle, error: OSError) -> None:
        """Log once for each file system that the workers do the I/O instead of the kernel."""
        if handle.mount not in self._refused:
            self._refused.add(handle.mount)
            _log.info(
                "the kernel refuses passthrough for one file system (%s); workers move the data of its files",
                error.strerror,
            )

    def release(self, handle: Handle) -> None:
        """Note that a file with passthrough was closed."""
        backing, users = self._registered[handle.nodeid]
        if users > 1:
            self._registered[handle.nodeid] = (backing, users - 1)
        else:
            del self._registered[handle.nodeid]
            close_backing(self._device, backing)
