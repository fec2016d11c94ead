"""System calls that Python's os module lacks, or lacks arguments of."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_COLLAPSE_RANGE = 0x08
FALLOC_FL_ZERO_RANGE = 0x10
FALLOC_FL_INSERT_RANGE = 0x20
FALLOC_FL_UNSHARE_RANGE = 0x40

UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

CLONE_NEWUSER = 0x10000000

STATX_MODE = 0x2
STATX_BASIC_STATS = 0x7FF
STATX_BTIME = 0x800

PathOrFd = Path | bytes | str | int

_libc = ctypes.CDLL(None, use_errno=True)
_c_off = ctypes.c_int64


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _bytes(path: Path | bytes | str) -> bytes:
    return os.fsencode(path)


def renameat2(old: Path | bytes | str, new: Path | bytes | str, flags: int) -> None:
    _check(_libc.renameat2(AT_FDCWD, _bytes(old), AT_FDCWD, _bytes(new), ctypes.c_uint(flags)))


def linkat(old: Path | bytes | str, new: Path | bytes | str, flags: int = 0, old_dir: int = AT_FDCWD) -> None:
    _check(_libc.linkat(old_dir, _bytes(old), AT_FDCWD, _bytes(new), flags))


def link_descriptor(descriptor: int, new: Path) -> None:
    """Gives a name to an open file, as open(2) describes for O_TMPFILE."""
    linkat(f"/proc/self/fd/{descriptor}", new, AT_SYMLINK_FOLLOW)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    _check(_libc.fallocate(descriptor, mode, _c_off(offset), _c_off(length)))


def unshare_user() -> None:
    """Enter a new user namespace."""
    _check(_libc.unshare(CLONE_NEWUSER))


def syncfs(descriptor: int) -> None:
    # A signal may interrupt it, like every call that waits for a FUSE server.
    while True:
        with contextlib.suppress(InterruptedError):
            _check(_libc.syncfs(descriptor))
            return


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_int64), ("nsec", ctypes.c_long))


def utimensat(target: Path | int, atime: tuple[int, int] | int, mtime: tuple[int, int] | int, flags: int = 0) -> None:
    """Each time is (seconds, nanoseconds), UTIME_NOW or UTIME_OMIT; a descriptor makes it futimens."""
    times = (_Timespec * 2)(
        *(_Timespec(*(value if isinstance(value, tuple) else (0, value))) for value in (atime, mtime))
    )
    if isinstance(target, int):
        _check(_libc.futimens(target, times))
    else:
        _check(_libc.utimensat(AT_FDCWD, _bytes(target), times, flags))


class _StatxTimestamp(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_int64), ("nsec", ctypes.c_uint32), ("reserved", ctypes.c_int32))

    @property
    def ns(self) -> int:
        return int(self.sec) * 1_000_000_000 + int(self.nsec)


class Statx(ctypes.Structure):
    _fields_ = (
        ("stx_mask", ctypes.c_uint32),
        ("stx_blksize", ctypes.c_uint32),
        ("stx_attributes", ctypes.c_uint64),
        ("stx_nlink", ctypes.c_uint32),
        ("stx_uid", ctypes.c_uint32),
        ("stx_gid", ctypes.c_uint32),
        ("stx_mode", ctypes.c_uint16),
        ("spare0", ctypes.c_uint16),
        ("stx_ino", ctypes.c_uint64),
        ("stx_size", ctypes.c_uint64),
        ("stx_blocks", ctypes.c_uint64),
        ("stx_attributes_mask", ctypes.c_uint64),
        ("stx_atime", _StatxTimestamp),
        ("stx_btime", _StatxTimestamp),
        ("stx_ctime", _StatxTimestamp),
        ("stx_mtime", _StatxTimestamp),
        ("stx_rdev_major", ctypes.c_uint32),
        ("stx_rdev_minor", ctypes.c_uint32),
        ("stx_dev_major", ctypes.c_uint32),
        ("stx_dev_minor", ctypes.c_uint32),
        ("spare", ctypes.c_uint64 * 14),
    )


def statx(target: Path | int, mask: int = STATX_BASIC_STATS | STATX_BTIME, flags: int = AT_SYMLINK_NOFOLLOW) -> Statx:
    result = Statx()
    if isinstance(target, int):
        _check(_libc.statx(target, b"", flags | AT_EMPTY_PATH, ctypes.c_uint(mask), ctypes.byref(result)))
    else:
        _check(_libc.statx(AT_FDCWD, _bytes(target), flags, ctypes.c_uint(mask), ctypes.byref(result)))
    return result


def getxattr_into(path: Path, name: bytes, size: int) -> int:
    """Calls getxattr(2) with a buffer of this size; os.getxattr hides ERANGE and size 0."""
    buffer = ctypes.create_string_buffer(size) if size else None
    _libc.getxattr.restype = ctypes.c_ssize_t
    return _check(_libc.getxattr(_bytes(path), name, buffer, ctypes.c_size_t(size)))


def listxattr_into(path: Path, size: int) -> int:
    buffer = ctypes.create_string_buffer(size) if size else None
    _libc.listxattr.restype = ctypes.c_ssize_t
    return _check(_libc.listxattr(_bytes(path), buffer, ctypes.c_size_t(size)))


class _Dirent(ctypes.Structure):
    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_uint16),
        ("d_type", ctypes.c_uint8),
        ("d_name", ctypes.c_char * 256),
    )


_libc.opendir.restype = ctypes.c_void_p
_libc.readdir64.restype = ctypes.POINTER(_Dirent)
_libc.telldir.restype = ctypes.c_long


@dataclass(frozen=True)
class Entry:
    name: bytes
    inode: int
    kind: int


class DirectoryStream:
    """opendir, readdir, telldir, seekdir and rewinddir of the C library."""

    def __init__(self, path: Path) -> None:
        self._stream = ctypes.c_void_p(_libc.opendir(_bytes(path)))
        if not self._stream:
            _check(-1)

    def read(self) -> Entry | None:
        ctypes.set_errno(0)
        found = _libc.readdir64(self._stream)
        if not found:
            if ctypes.get_errno():
                _check(-1)
            return None
        entry = found.contents
        return Entry(bytes(entry.d_name), int(entry.d_ino), int(entry.d_type))

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self.read()) is not None:
            yield entry

    def names(self) -> list[bytes]:
        """The names from the current position on, without . and .."""
        return [entry.name for entry in self if entry.name not in (b".", b"..")]

    def tell(self) -> int:
        return int(_libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        _libc.seekdir(self._stream, ctypes.c_long(position))

    def rewind(self) -> None:
        _libc.rewinddir(self._stream)

    def fileno(self) -> int:
        return _check(_libc.dirfd(self._stream))

    def close(self) -> None:
        _check(_libc.closedir(self._stream))


@contextmanager
def directory_stream(path: Path) -> Iterator[DirectoryStream]:
    stream = DirectoryStream(path)
    try:
        yield stream
    finally:
        stream.close()


@contextmanager
def opened(path: Path | bytes | str, flags: int, mode: int = 0o666, dir_fd: int | None = None) -> Iterator[int]:
    """Opens a file like os.open, and closes it at the end of the block."""
    descriptor = os.open(path, flags, mode, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
