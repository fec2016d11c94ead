"""Makes the kernel forget what it knows of one mount, and of no other.

/proc/sys/vm/drop_caches would do it to the whole machine: to the mounts of tests that run at the same time, and that
rely on what the kernel has cached there.
"""

import ctypes
import os
from pathlib import Path

_MS_REMOUNT = 32
# ST_RDONLY, ST_NOSUID, ST_NODEV and ST_NOEXEC of statvfs(3) are the same bits in mount(2).
_COMMON_FLAGS = 15

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def forget_unused(mountpoint: Path) -> None:
    """Makes the kernel drop unused names and inodes, so that it sends FORGET; needs root."""
    flags = os.statvfs(mountpoint).f_flag & _COMMON_FLAGS
    if _libc.mount(None, os.fsencode(mountpoint), None, _MS_REMOUNT | flags, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(mountpoint))
