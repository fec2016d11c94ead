"""Mounting by descriptors (fsopen(2), fsmount(2), mount_setattr(2), move_mount(2)).

A new mount is detached: no path leads to it until `attach` puts it somewhere. So it can be changed before any program
can reach it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import suppress

from llloop.linux.syscalls import last_error

# The same numbers on every architecture, <asm-generic/unistd.h>.
_SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT, _SYS_MOUNT_SETATTR = 429, 430, 431, 432, 442
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1  # <linux/mount.h>
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_MOVE_MOUNT_F_EMPTY_PATH = 4
_AT_FDCWD = -100  # <linux/fcntl.h>
_AT_EMPTY_PATH = 0x1000
_MOUNT_ATTR_IDMAP = 0x00100000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
MOUNT_ATTR_NOATIME = 0x10
_LARGEST_MESSAGE = 4096

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    """``struct mount_attr``."""

    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise last_error()
    return result


def detached_mount(kind: str, parameters: Mapping[str, str | None], attributes: int) -> int:
    """Make a mount that is not attached anywhere, and return its descriptor. It ends with its last descriptor.

    Args:
        kind: the file system type.
        parameters: the parameters of the file system; None for one without a value.
        attributes: MOUNT_ATTR_ flags of the mount.

    Raises:
        OSError: the kernel refuses; the text has its reason if it gave one.
    """
    context = _call(_SYS_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
    try:
        for name, value in parameters.items():
            command, given = (_FSCONFIG_SET_FLAG, None) if value is None else (_FSCONFIG_SET_STRING, os.fsencode(value))
            _call(_SYS_FSCONFIG, context, command, name.encode(), given, 0)
        _call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
    except OSError as error:
        raise OSError(error.errno, _message(context) or error.strerror) from None
    finally:
        os.close(context)


def _message(context: int) -> str:
    """Return what the kernel has to say about a failed call; empty if nothing (fsopen(2))."""
    with suppress(OSError):
        return os.read(context, _LARGEST_MESSAGE).decode(errors="replace").strip().removeprefix("e ")
    return ""


def map_ids(mount: int, user_namespace: int) -> None:
    """Map the ids of a detached mount as *user_namespace* does, a descriptor (mount_setattr(2))."""
    attr = _MountAttr(_MOUNT_ATTR_IDMAP, 0, 0, user_namespace)
    _call(_SYS_MOUNT_SETATTR, mount, b"", _AT_EMPTY_PATH, ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr)))


def attach(mount: int, path: str) -> None:
    """Attach a detached mount at *path* (move_mount(2))."""
    _call(_SYS_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH)
