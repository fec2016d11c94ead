"""fanotify(7) with file handles: constants of <linux/fanotify.h> and the system calls."""

from __future__ import annotations

import ctypes
import os
from struct import Struct

from llloop.linux.syscalls import last_error

FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_REPORT_FID = 0x200
FAN_REPORT_DIR_FID = 0x400
FAN_REPORT_NAME = 0x800
FAN_REPORT_TARGET_FID = 0x1000  # Linux 5.17
# Each event brings the directory's handle with the name, and the object's handle.
FAN_REPORT_DFID_NAME_TARGET = FAN_REPORT_FID | FAN_REPORT_DIR_FID | FAN_REPORT_NAME | FAN_REPORT_TARGET_FID

FAN_MODIFY = 0x2
FAN_ATTRIB = 0x4
FAN_CLOSE_WRITE = 0x8
FAN_CREATE = 0x100
FAN_DELETE = 0x200
FAN_Q_OVERFLOW = 0x4000
FAN_RENAME = 0x10000000  # Linux 5.17: old and new name in one event
FAN_ONDIR = 0x40000000

_FAN_MARK_ADD = 0x1
_FAN_MARK_FILESYSTEM = 0x100
_AT_FDCWD = -100

# The types of struct fanotify_event_info_header
INFO_FID = 1
INFO_DFID_NAME = 2
INFO_DFID = 3
INFO_OLD_DFID_NAME = 10
INFO_NEW_DFID_NAME = 12

_MAX_HANDLE = 128  # MAX_HANDLE_SZ of <linux/exportfs.h>
_HANDLE = Struct("=Ii")  # struct file_handle: handle_bytes, handle_type; then the handle

_libc = ctypes.CDLL(None, use_errno=True)
_fanotify_mark = _libc.fanotify_mark
_fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)


def fanotify_init(flags: int) -> int:
    """Return the descriptor of a new group (fanotify_init(2)).

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN, EINVAL if the kernel is too old for the flags.
    """
    fd: int = _libc.fanotify_init(flags, os.O_RDONLY)
    if fd < 0:
        raise last_error()
    return fd


def mark_filesystem(group: int, mask: int, path: bytes) -> None:
    """Listen to all events of *mask* on the file system that contains *path* (fanotify_mark(2), FAN_MARK_FILESYSTEM).

    Raises:
        OSError: EOPNOTSUPP, ENODEV or EXDEV if the file system has no file handles or no identity of its own.
    """
    if _fanotify_mark(group, _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM, mask, _AT_FDCWD, path):
        raise last_error(path)


def file_handle(path: bytes) -> tuple[int, bytes]:
    """Return type and bytes of the file handle of *path* (name_to_handle_at(2)).

    Raises:
        OSError: EOPNOTSUPP if the file system has no file handles.
    """
    buffer = ctypes.create_string_buffer(_HANDLE.size + _MAX_HANDLE)
    _HANDLE.pack_into(buffer, 0, _MAX_HANDLE, 0)
    mount = ctypes.c_int()
    if _libc.name_to_handle_at(_AT_FDCWD, path, buffer, ctypes.byref(mount), 0):
        raise last_error(path)
    size, kind = _HANDLE.unpack_from(buffer)
    return kind, buffer.raw[_HANDLE.size : _HANDLE.size + size]
