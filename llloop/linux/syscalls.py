"""The Linux system calls that llloop needs and that Python's ``os`` module lacks.

Every function raises `OSError` with the call's errno. Numbers and structs come from the Linux UAPI headers. Each
docstring names the call's man page.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

AT_SYMLINK_NOFOLLOW = 0x100  # <linux/fcntl.h>
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000

_AT_FDCWD = -100  # <linux/fcntl.h>

UTIME_NOW = (1 << 30) - 1  # <linux/stat.h>
UTIME_OMIT = (1 << 30) - 2

RENAME_NOREPLACE = 1  # <linux/fs.h>
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

# The variant with 32-bit ids; 159 in <asm-generic/unistd.h>.
_SYS_SETGROUPS = {"x86_64": 116, "ppc64le": 81, "s390x": 206, "i686": 206, "armv7l": 206}.get(os.uname().machine, 159)
_SYS_OPEN_TREE = 428
_SYS_PIDFD_GETFD = 438  # the same numbers on every architecture, <asm-generic/unistd.h>
_SYS_FACCESSAT2 = 439
_SYS_FCHMODAT2 = 452
_AT_EACCESS = 0x200  # <linux/fcntl.h>

_libc = ctypes.CDLL(None, use_errno=True)
# For calls that most requests make. Without argument types, and without releasing the GIL, a call takes a third less
# time.
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)


def last_error(path: bytes | None = None) -> OSError:
    """Return an `OSError` for the errno of the last call."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)


class Attributes(NamedTuple):
    """The result of statx(2). Times are in seconds, with their nanoseconds in a field of their own.

    `device` identifies the file system: the bytes of major and minor number as one integer, only for comparisons.
    `mount` is the ID of the mount through which the file was reached: unique since Linux 6.8, 0 before Linux 5.8.
    """

    blksize: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    atime: int
    atime_nsec: int
    btime: int
    btime_nsec: int
    ctime: int
    ctime_nsec: int
    mtime: int
    mtime_nsec: int
    rdev_major: int
    rdev_minor: int
    device: int
    mount: int


STATX_BASIC_STATS = 0x7FF  # <linux/stat.h>
STATX_BTIME = 0x800
STATX_MNT_ID = 0x1000
STATX_MNT_ID_UNIQUE = 0x4000
STATX_SIZE = 256  # sizeof(struct statx)
STATX_INO_OFFSET = 32  # offsetof(struct statx, stx_ino)
_STATX = struct.Struct("=4xI8xIIIHxxQQQ8xqI4xqI4xqI4xqI4xIIQQ")
_STATX_MASK = STATX_BASIC_STATS | STATX_BTIME | STATX_MNT_ID | STATX_MNT_ID_UNIQUE
_NAME_FLAGS = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT
_statx_buffer = ctypes.create_string_buffer(STATX_SIZE)
_statx_unpack = _STATX.unpack_from
_statx = _libc_with_gil.statx
_new = tuple.__new__


def statx(directory: int, name: bytes) -> Attributes:
    """Return the attributes of *name* in *directory*; do not follow a symlink (statx(2)).

    Args:
        directory: a descriptor of the directory; O_PATH suffices.
        name: one path component.
    """
    attributes = statx_or_none(directory, name)
    if attributes is None:
        raise last_error(name)
    return attributes


def statx_or_none(directory: int, name: bytes) -> Attributes | None:
    """Return the attributes as `statx` does, or None if *name* does not exist.

    Most lookups are of missing names, and None costs less than an exception.
    """
    if _statx(directory, name, _NAME_FLAGS, _STATX_MASK, _statx_buffer):
        if ctypes.get_errno() == errno.ENOENT:
            return None
        raise last_error(name)
    return _new(Attributes, _statx_unpack(_statx_buffer))


def fstatx(fd: int) -> Attributes:
    """Return the attributes of the open file *fd*; O_PATH suffices (statx(2), AT_EMPTY_PATH)."""
    if _statx(fd, b"", AT_EMPTY_PATH, _STATX_MASK, _statx_buffer):
        raise last_error()
    return _new(Attributes, _statx_unpack(_statx_buffer))


def cached_attributes(fd: int) -> Attributes:
    """Return the attributes of the open file *fd* as the kernel has them, without asking the file system."""
    if _statx(fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, _STATX_MASK, _statx_buffer):
        raise last_error()
    return _new(Attributes, _statx_unpack(_statx_buffer))


class StatxTable:
    """A buffer for the results of statx(2) for several names.

    Attributes:
        memory: an array of ``struct statx``.

    Args:
        rows: the length of the array.
    """

    def __init__(self, rows: int) -> None:
        buffer = ctypes.create_string_buffer(rows * STATX_SIZE)
        self._rows = [ctypes.byref(buffer, row * STATX_SIZE) for row in range(rows)]
        self.memory = memoryview(buffer).cast("B")

    def __len__(self) -> int:
        return len(self._rows)

    def statx_names(self, directory: int, names: Iterable[bytes]) -> list[bool]:
        """Call statx(2) for each name in *directory*, and store each result in a row.

        Names beyond the number of rows are ignored. The row of a failed call has undefined content.

        Returns:
            For each name, whether the call succeeded.
        """
        return [
            not _statx(directory, name, _NAME_FLAGS, _STATX_MASK, row)
            for name, row in zip(names, self._rows, strict=False)
        ]

    def attributes(self, row: int) -> Attributes:
        """Return the attributes in a row."""
        return _new(Attributes, _statx_unpack(self.memory, row * STATX_SIZE))


def fstatx_raw(fd: int, mask: int, flags: int) -> bytearray:
    """Return the ``struct statx`` of the open file *fd* as bytes (statx(2)).

    Args:
        fd: the file; O_PATH suffices.
        mask: the STATX_ fields to ask for.
        flags: the AT_STATX_ synchronisation flags.
    """
    if _statx(fd, b"", AT_EMPTY_PATH | flags, mask, _statx_buffer):
        raise last_error()
    return bytearray(_statx_buffer.raw)


_STATX_MNT_ID_UNIQUE = 0x4000  # <linux/stat.h>
_STATX_MNT_ID_OFFSET = 144  # offsetof(struct statx, stx_mnt_id)
_slow_statx = _libc.statx


def unique_mount_id(place: str | int) -> int | None:
    """Return the mount ID that the kernel never reuses (statx(2), STATX_MNT_ID_UNIQUE, Linux 6.8).

    The kernel does not ask the file system. So the call also works if a FUSE server hangs or is gone.

    Args:
        place: a path, whose last component is not followed if it is a symlink, or an open file; O_PATH suffices.

    Returns:
        The ID; None if the kernel has none, or if this user may not use the FUSE mount and so gets no ID.
    """
    buffer = ctypes.create_string_buffer(STATX_SIZE)
    directory, name, flags = (
        (place, b"", AT_EMPTY_PATH) if isinstance(place, int) else (_AT_FDCWD, os.fsencode(place), _NAME_FLAGS)
    )
    if _slow_statx(directory, name, flags | AT_STATX_DONT_SYNC, _STATX_MNT_ID_UNIQUE, buffer):
        return None
    mask = int.from_bytes(buffer.raw[:4], sys.byteorder)
    end = _STATX_MNT_ID_OFFSET + 8
    return int.from_bytes(buffer.raw[_STATX_MNT_ID_OFFSET:end], sys.byteorder) if mask & _STATX_MNT_ID_UNIQUE else None


_renameat2 = _libc.renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def renameat2(old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int) -> None:
    """Rename with RENAME_ flags (renameat2(2))."""
    if _renameat2(old_directory, old, new_directory, new, flags):
        raise last_error(old)


_fallocate = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate, punch or zero a range of *fd* (fallocate(2)).

    Args:
        fd: the file.
        mode: FALLOC_FL_ flags.
        offset, length: the range in bytes.
    """
    if _fallocate(fd, mode, offset, length):
        raise last_error()


_syncfs = _libc.syncfs
_syncfs.argtypes = (ctypes.c_int,)


def syncfs(fd: int) -> None:
    """Write the file system that contains *fd* to its disk (syncfs(2))."""
    if _syncfs(fd):
        raise last_error()


_fchownat = _libc.fchownat  # releases the GIL, as does every call that may wait for a frozen file system


def chown(fd: int, uid: int, gid: int) -> None:
    """Change the owner of the open file *fd*; O_PATH suffices, also for a symlink (fchownat(2), AT_EMPTY_PATH).

    Args:
        fd: the file.
        uid: the new owner, or -1 to keep it.
        gid: the new group, or -1 to keep it.
    """
    if _fchownat(fd, b"", uid, gid, AT_EMPTY_PATH):
        raise last_error()


_TIMES = struct.Struct("@4l")  # two struct timespec
_utimensat = _libc.utimensat


def utimens(fd: int, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set access and modification time of the open file *fd*; O_PATH suffices (utimensat(2), AT_EMPTY_PATH).

    Args:
        fd: the file.
        atime: seconds and nanoseconds, or UTIME_NOW or UTIME_OMIT for the nanoseconds.
        mtime: the same for the modification time.
    """
    if _utimensat(fd, b"", _TIMES.pack(*atime, *mtime), AT_EMPTY_PATH):
        raise last_error()


_chmod_by_descriptor = True
_syscall = _libc.syscall


def chmod(fd: int, mode: int) -> None:
    """Change the permissions of the open file *fd*; O_PATH suffices (fchmodat2(2), AT_EMPTY_PATH, Linux 6.6).

    Args:
        fd: the file.
        mode: the new permissions, including set-ID and sticky bits.
    """
    global _chmod_by_descriptor
    if _chmod_by_descriptor:
        if not _syscall(_SYS_FCHMODAT2, fd, b"", mode, AT_EMPTY_PATH):
            return
        if ctypes.get_errno() == errno.ENOSYS:
            _chmod_by_descriptor = False
    # Also after any other error: a seccomp filter that does not know the call returns EPERM.
    os.chmod(f"/proc/self/fd/{fd}", mode)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Return a duplicate of descriptor *fd* of the process behind *pidfd* (pidfd_getfd(2), Linux 5.6)."""
    result: int = _syscall(ctypes.c_long(_SYS_PIDFD_GETFD), ctypes.c_long(pidfd), ctypes.c_long(fd), ctypes.c_long(0))
    if result < 0:
        raise last_error()
    return result


# One entry of getdents64(2): inode number, type (DT_ of <dirent.h>), name.
DirectoryEntry = tuple[int, int, bytes]


_DIRENT = struct.Struct("=QqHB")
_getdents64 = _libc.getdents64
_getdents64.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_getdents64.restype = ctypes.c_ssize_t
# Bytes that are converted at a time. Other requests wait meanwhile.
_DIRENT_BUFFER_SIZE = 64 * 1024


class _ThreadBuffer(threading.local):
    """A buffer for each thread."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(_DIRENT_BUFFER_SIZE)


_thread_buffer = _ThreadBuffer()


def _call(function: Callable[..., int], *arguments: object) -> int:
    return function(*arguments)


class DirectoryBlocks:
    """Iterator over an open directory. Each item is one buffer of ``struct linux_dirent64`` (getdents64(2)).

    Args:
        fd: the directory.
        position: the cookie (d_off) of the entry after which to begin, 0 for the start.
        call: makes the system call.
    """

    def __init__(self, fd: int, position: int = 0, call: Callable[..., int] = _call) -> None:
        self._fd = fd
        self._call = call
        os.lseek(fd, position, os.SEEK_SET)

    def __iter__(self) -> DirectoryBlocks:
        return self

    def __next__(self) -> bytes:
        length = self._call(_getdents64, self._fd, _thread_buffer.buffer, _DIRENT_BUFFER_SIZE)
        if length < 0:
            raise last_error()
        if length == 0:
            raise StopIteration
        return ctypes.string_at(_thread_buffer.buffer, length)


def read_directory(fd: int) -> list[DirectoryEntry]:
    """Return the entries of the open directory *fd*, including "." and ".." (getdents64(2))."""
    entries: list[DirectoryEntry] = []
    append = entries.append
    unpack = _DIRENT.unpack_from
    header = _DIRENT.size
    for data in DirectoryBlocks(fd):
        position = 0
        while position < len(data):
            ino, _, record_length, kind = unpack(data, position)
            start = position + header
            position += record_length
            append((ino, kind, data[start : data.index(b"\0", start)]))
    return entries


class _Statfs(ctypes.Structure):
    """The beginning of ``struct statfs`` (statfs(2)); llloop does not use the rest."""

    _fields_ = (
        ("type", ctypes.c_long),
        ("block_size", ctypes.c_long),
        ("blocks", ctypes.c_uint64),
        ("rest", ctypes.c_long * 32),
    )


class FileSystem(NamedTuple):
    """A part of the result of statfs(2): the magic number (<linux/magic.h>) and the number of blocks."""

    type: int
    blocks: int


_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)

# Magic numbers of <linux/magic.h>. tmpfs and ramfs, where no read or write waits for a disk:
RAM_FILE_SYSTEMS = frozenset({0x01021994, 0x858458F6})
# File systems whose close(2) can return an error of an earlier write: NFS, SMB, CIFS, SMB2, FUSE, AFS, Ceph, Coda, 9p.
CLOSE_CAN_FAIL = frozenset(
    {0x6969, 0x517B, 0xFF534D42, 0xFE534D42, 0x65735546, 0x5346414F, 0x00C36400, 0x73757245, 0x01021997}
)
# The same file systems depend on a server, so any call can hang.
CAN_HANG = CLOSE_CAN_FAIL
# File systems on top of another one: overlayfs, ecryptfs.
STACKED = frozenset({0x794C7630, 0xF15F})


def file_system(fd: int) -> FileSystem:
    """Return type and size of the file system that contains *fd* (fstatfs(2))."""
    result = _Statfs()
    if _fstatfs(fd, ctypes.byref(result)):
        raise last_error()
    return FileSystem(int(result.type) & 0xFFFFFFFF, int(result.blocks))


def file_system_type(fd: int) -> int:
    """Return the magic number of the file system that contains *fd*."""
    return file_system(fd).type


_MLOCK_ONFAULT = 1  # <asm-generic/mman-common.h>
_mlock2 = _libc.mlock2
_mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)


def lock_on_fault(address: int, length: int) -> None:
    """Lock each page of a memory range when it is first touched (mlock2(2), MLOCK_ONFAULT).

    Args:
        address: the start of the range.
        length: its size in bytes.
    """
    if _mlock2(address, length, _MLOCK_ONFAULT):
        raise last_error()


_unshare = _libc.unshare


def unshare(flags: int) -> None:
    """Give the calling thread its own copy of what the CLONE_ *flags* name (unshare(2))."""
    if _unshare(flags):
        raise last_error()


_OPEN_TREE_CLONE = 1  # <linux/mount.h>


def clone_mount(path: str) -> int:
    """Return a descriptor of a copy of the mount at *path*, which is attached nowhere (open_tree(2)).

    The mount is not busy because of the copy. The file system lives until the descriptor is closed.
    """
    encoded = ctypes.c_char_p(os.fsencode(path))
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    fd: int = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, encoded, ctypes.c_uint(flags))
    if fd < 0:
        raise last_error(os.fsencode(path))
    return fd


_FILE_HANDLE = struct.Struct("=Ii")  # struct file_handle: handle_bytes, handle_type; then the handle
_open_by_handle_at = _libc.open_by_handle_at
_open_by_handle_at.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int)


def open_by_handle(kind: int, handle: bytes, flags: int) -> int:
    """Open a file by its handle, on the file system of the current directory (open_by_handle_at(2)).

    Args:
        kind: the type of the handle.
        handle: the handle.
        flags: the open(2) flags.

    Raises:
        OSError: ESTALE, if the file system does not know the handle; EPERM without CAP_DAC_READ_SEARCH.
    """
    fd: int = _open_by_handle_at(_AT_FDCWD, _FILE_HANDLE.pack(len(handle), kind) + handle, flags | os.O_CLOEXEC)
    if fd < 0:
        raise last_error()
    return fd


MNT_DETACH = 2
MNT_EXPIRE = 4
UMOUNT_NOFOLLOW = 8
_umount2 = _libc.umount2
_umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def umount(mountpoint: str, flags: int) -> None:
    """Unmount *mountpoint* (umount2(2))."""
    if _umount2(os.fsencode(mountpoint), flags):
        raise last_error(os.fsencode(mountpoint))


PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PR_SET_DUMPABLE = 4
PR_GET_NO_NEW_PRIVS = 39
PR_CAPBSET_DROP = 24
PR_GET_SECUREBITS = 27
PR_SET_SECUREBITS = 28
PR_SET_NO_NEW_PRIVS = 38
PR_SET_PTRACER = 0x59616D61
_prctl = _libc_with_gil.prctl
_NOTHING = ctypes.c_ulong(0)


def prctl(option: int, argument: int = 0) -> int:
    """Call prctl(2) with one argument and return its result."""
    result: int = _prctl(option, ctypes.c_ulong(argument), _NOTHING, _NOTHING, _NOTHING)
    if result < 0:
        raise last_error()
    return result


setfsuid = _libc_with_gil.setfsuid
setfsgid = _libc_with_gil.setfsgid

# <linux/fs.h>: _IOR('f', 1, long), _IOW('f', 2, long), _IOR('X', 31, struct fsxattr), _IOW('X', 32, struct fsxattr).
# The numbers name a long; what is read and written are 4 bytes.
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_FSGETXATTR = 0x801C581F
FS_IOC_FSSETXATTR = 0x401C5820
FSXATTR_SIZE = 28

_CAPABILITY_VERSION_3 = 0x20080522  # <linux/capability.h>
_CAPABILITY_HEADER = struct.Struct("=Ii")
_CAPABILITIES = struct.Struct("=IIIIII")
CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_FOWNER = 3
CAP_FSETID = 4
CAP_SETGID = 6
CAP_SETUID = 7
CAP_LINUX_IMMUTABLE = 9
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21
CAP_MKNOD = 27
CAP_SETFCAP = 31
_capget = _libc_with_gil.capget
_capset = _libc_with_gil.capset
_capability_header = ctypes.create_string_buffer(_CAPABILITY_HEADER.size)
_capability_sets = ctypes.create_string_buffer(_CAPABILITIES.size)


def get_capabilities(pid: int = 0) -> tuple[int, int, int]:
    """Return a thread's effective, permitted and inheritable capabilities as bit sets (capget(2)).

    Args:
        pid: the thread's id, 0 for the calling thread.
    """
    _CAPABILITY_HEADER.pack_into(_capability_header, 0, _CAPABILITY_VERSION_3, pid)
    if _capget(_capability_header, _capability_sets):
        raise last_error()
    low = _CAPABILITIES.unpack(_capability_sets)
    return low[0] | low[3] << 32, low[1] | low[4] << 32, low[2] | low[5] << 32


def set_capabilities(effective: int, permitted: int, inheritable: int) -> None:
    """Set the calling thread's capabilities from three bit sets (capset(2))."""
    _CAPABILITY_HEADER.pack_into(_capability_header, 0, _CAPABILITY_VERSION_3, 0)
    mask = 0xFFFFFFFF
    _CAPABILITIES.pack_into(
        _capability_sets,
        0,
        effective & mask,
        permitted & mask,
        inheritable & mask,
        effective >> 32,
        permitted >> 32,
        inheritable >> 32,
    )
    if _capset(_capability_header, _capability_sets):
        raise last_error()


# The open(2) flags that need each combination of R_OK and W_OK. No flag needs the execute permission.
_ACCESS_FLAGS = {0: os.O_PATH, os.R_OK: os.O_RDONLY, os.W_OK: os.O_WRONLY, os.R_OK | os.W_OK: os.O_RDWR}


def setgroups(groups: tuple[int, ...]) -> None:
    """Set the calling thread's supplementary groups (setgroups(2)). The C library's function changes all threads."""
    if _libc_with_gil.syscall(_SYS_SETGROUPS, len(groups), (ctypes.c_uint * len(groups))(*groups)):
        raise last_error()


def may_access(fd: int, mode: int) -> bool:
    """Return whether the calling thread's file system ids may access the open file *fd* (faccessat2(2), Linux 5.8).

    Args:
        fd: the file; O_PATH suffices.
        mode: R_OK, W_OK and X_OK of access(2), combined.
    """
    if not _libc.syscall(_SYS_FACCESSAT2, fd, b"", mode, AT_EMPTY_PATH | _AT_EACCESS):
        return True
    number = ctypes.get_errno()
    if number in (errno.EACCES, errno.EPERM):
        return False
    if number != errno.ENOSYS:
        raise last_error()
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", _ACCESS_FLAGS[mode & (os.R_OK | os.W_OK)] | os.O_NONBLOCK))
    except PermissionError:
        return False
    return True


def is_readable(fd: int, timeout: float = 0.0) -> bool:
    """Wait up to *timeout* seconds until *fd* is readable; return whether it is.

    A pidfd is readable once its process has ended, even before its parent waits for it (pidfd_open(2)).
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def is_writable(fd: int) -> bool:
    """Return whether a write would not wait."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def open_descriptors() -> set[int]:
    """Return the descriptors that this process has open."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself is closed by now
            os.fstat(int(entry))
            found.add(int(entry))
    return found


_SYS_MEMBARRIER = {"x86_64": 324, "ppc64le": 365, "s390x": 356, "i686": 375, "armv7l": 389}.get(os.uname().machine, 283)
_MEMBARRIER_GLOBAL_EXPEDITED, _MEMBARRIER_REGISTER_GLOBAL_EXPEDITED = 1 << 1, 1 << 2  # <linux/membarrier.h>


def synchronise() -> None:
    """Make every thread of the processes that called `be_synchronised` execute a memory barrier (membarrier(2)).

    What this process has stored is then visible to them, and what they have stored before is visible to it.
    """
    _syscall(ctypes.c_long(_SYS_MEMBARRIER), ctypes.c_long(_MEMBARRIER_GLOBAL_EXPEDITED), ctypes.c_long(0))


def be_synchronised() -> None:
    """Let `synchronise` of other processes apply to this process."""
    _syscall(ctypes.c_long(_SYS_MEMBARRIER), ctypes.c_long(_MEMBARRIER_REGISTER_GLOBAL_EXPEDITED), ctypes.c_long(0))
