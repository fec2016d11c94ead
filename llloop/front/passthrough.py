"""Kernel passthrough: files whose reads and writes the kernel does on the source by itself.

A file is registered with the kernel (FUSE_DEV_IOC_BACKING_OPEN) and the reply to its open names
the registration. The kernel demands that all opens of an inode at a time are of one kind and
share one registration (fs/fuse/iomode.c, fs/fuse/passthrough.c), so both are kept per inode.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import struct
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
    """Register an open regular file with the kernel and return the registration.

    Args:
        device: the descriptor of /dev/fuse.
        descriptor: the file; open in any mode, it may be closed afterwards.

    Raises:
        OSError: the kernel, or the file's file system, does not allow it (EPERM, EOPNOTSUPP, ELOOP).
    """
    backing: int = fcntl.ioctl(device, _BACKING_OPEN, bytearray(_BACKING_MAP.pack(descriptor, 0, 0)))
    return backing


def close_backing(device: int, backing: int) -> None:
    """Take a registration back; opens that use it go on."""
    fcntl.ioctl(device, _BACKING_CLOSE, bytearray(_BACKING_ID.pack(backing)))


def refusal(device: int) -> str | None:
    """Return why the kernel does not let this process register files, or None if it does."""
    descriptor = os.memfd_create("llloop-passthrough")
    try:
        close_backing(device, open_backing(device, descriptor))
    except OSError as error:
        return error.strerror
    finally:
        os.close(descriptor)
    return None


def _is_privileged(handle: Handle, attributes: Attributes, is_new: bool) -> bool:
    """Whether a write by an ordinary user takes something from the file: set-ID bits, or capabilities.

    No file is made with capabilities.
    """
    return bool(attributes.mode & SETID_BITS) or (not is_new and has_capability(handle.descriptor))


def _note_mappings(handle: Handle) -> None:
    """Note that the file may be mapped for writing: the kernel tells nobody of stores through such a mapping."""
    if handle.pages is not None and handle.flags & os.O_ACCMODE == os.O_RDWR:
        handle.pages.passthrough = True


class Passthrough:
    """The registrations of open files.

    Args:
        device: the descriptor of /dev/fuse.
        handles: the open files.
        caller: gives a registration the identity with which the kernel writes.
        setid: has the source clear set-ID bits at such a write, should the file get some while it is open.
        wanted: whether files are to be passed through at all.
    """

    def __init__(self, device: int, handles: Handles, caller: Caller, setid: SetidGuard, wanted: bool) -> None:
        self._device = device
        self._handles = handles
        self._caller = caller
        self._setid = setid
        self._wanted = wanted
        # The registration of an inode, and how many open files use it.
        self._registered: dict[int, tuple[int, int]] = {}
        self._refused: set[int] = set()
        # Whether a file system is a file server's, by device.
        self._remote: dict[int, bool] = {}

    def back(self, handle: Handle, attributes: Attributes, note: Note, *, is_new: bool) -> int:
        """Have the kernel do the I/O of a file just opened, if it can.

        Args:
            handle: the open file.
            attributes: its attributes.
            note: where a registration is noted until the handle has it.
            is_new: whether it has just been made.

        Returns:
            The registration, or 0 if the workers are to do it.
        """
        if handle.backing or not self._wanted:
            return handle.backing
        nodeid = handle.nodeid
        registered = self._registered.get(nodeid)
        if registered is None:
            if handle.unsized:
                return 0
            if any(other is not handle for other in self._handles.of_inode(nodeid)):
                return 0  # opened the other way before, and so must this one be
            identity = self._identity(handle, attributes)
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
        """Return the uid and gid with which the kernel is to write to a file, or None if there is no right one.

        All opens share the registration of the first. So root's identity, for which file systems reserve blocks, is
        taken only where nobody else can open the file for writing; file servers decide by it about every access.
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
        """Whether a file is a file server's."""
        known = self._remote.get(handle.mount)
        if known is None:
            known = self._remote[handle.mount] = file_system_type(handle.descriptor) in CAN_HANG
        return known

    def take_over(self, handle: Handle, backing: int) -> None:
        """Take in a file of a front that is gone, whose I/O the kernel does by the registration *backing*."""
        handle.backing = backing
        _note_mappings(handle)
        _, users = self._registered.get(handle.nodeid, (backing, 0))
        self._registered[handle.nodeid] = (backing, users + 1)

    def drop(self, backing: int) -> None:
        """Take a registration back that a front made for no file that it noted."""
        if backing and backing not in (known for known, _ in self._registered.values()):
            with suppress(OSError):
                close_backing(self._device, backing)

    def _note_refusal(self, handle: Handle, error: OSError) -> None:
        """Say once for each file system that the workers do what the kernel does not."""
        if handle.mount not in self._refused:
            self._refused.add(handle.mount)
            _log.info(
                "the kernel refuses passthrough for one file system (%s); workers move the data of its files",
                error.strerror,
            )

    def release(self, handle: Handle) -> None:
        """Note that a file passed through was closed."""
        backing, users = self._registered[handle.nodeid]
        if users > 1:
            self._registered[handle.nodeid] = (backing, users - 1)
        else:
            del self._registered[handle.nodeid]
            close_backing(self._device, backing)
