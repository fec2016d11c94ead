"""The structs and constants of the FUSE protocol that llloop reads or writes.

Names, layouts and numbers are those of ``<linux/fuse.h>``. Each struct has the name of its C struct. llloop decodes a
request directly from the receive buffer: a ``..._REQUEST`` struct begins with ``struct fuse_in_header`` and skips
(``x``) the fields that llloop does not use.
"""

from __future__ import annotations

import errno
import mmap
from enum import IntEnum
from operator import itemgetter
from struct import Struct

from llloop.linux.syscalls import Attributes

IN_HEADER_SIZE = 40  # struct fuse_in_header
OUT_HEADER_SIZE = 16  # struct fuse_out_header
WRITE_HEADER_SIZE = IN_HEADER_SIZE + 40  # with struct fuse_write_in; the payload follows
PAGE_SIZE = mmap.PAGESIZE
NO_ID = 0xFFFFFFFF  # uid or gid of a request that contains none (FUSE_ALLOW_IDMAP)


class Opcode(IntEnum):
    """``enum fuse_opcode``: every opcode up to protocol version 7.45."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


# Requests whose reply adds a lookup of an inode in the kernel.
MAKES_ENTRIES = frozenset(
    {
        Opcode.LOOKUP,
        Opcode.READDIRPLUS,
        Opcode.CREATE,
        Opcode.TMPFILE,
        Opcode.MKNOD,
        Opcode.MKDIR,
        Opcode.SYMLINK,
        Opcode.LINK,
    }
)

# FOPEN_ flags of the OPEN and OPENDIR replies
FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_CACHE_DIR = 1 << 3
FOPEN_NOFLUSH = 1 << 5
FOPEN_PASSTHROUGH = 1 << 7

# FATTR_ bits of struct fuse_setattr_in.valid
FATTR_MODE = 1 << 0
FATTR_UID = 1 << 1
FATTR_GID = 1 << 2
FATTR_SIZE = 1 << 3
FATTR_ATIME = 1 << 4
FATTR_MTIME = 1 << 5
FATTR_FH = 1 << 6
FATTR_ATIME_NOW = 1 << 7
FATTR_MTIME_NOW = 1 << 8
FATTR_CTIME = 1 << 10
FATTR_KILL_SUIDGID = 1 << 11

FUSE_UNIQUE_RESEND = 1 << 63  # set in the `unique` of a request that the kernel sends again

FUSE_OPEN_KILL_SUIDGID = 1 << 0  # struct fuse_open_in.open_flags
FUSE_WRITE_CACHE = 1 << 0  # struct fuse_write_in.write_flags
FUSE_WRITE_KILL_SUIDGID = 1 << 2
FUSE_FSYNC_FDATASYNC = 1 << 0  # struct fuse_fsync_in.fsync_flags
FUSE_GETATTR_FH = 1 << 0  # struct fuse_getattr_in.getattr_flags
FUSE_SETXATTR_ACL_KILL_SGID = 1 << 0  # struct fuse_setxattr_in.setxattr_flags

# enum fuse_notify_code: stands in the error field of a notification
FUSE_NOTIFY_INVAL_INODE = 2
FUSE_NOTIFY_INVAL_ENTRY = 3
FUSE_NOTIFY_DELETE = 6
FUSE_NOTIFY_RESEND = 7
FUSE_NOTIFY_INC_EPOCH = 8
FUSE_EXPIRE_ONLY = 1  # flag of INVAL_ENTRY since Linux 6.2; older kernels ignore it
EPOCH_SINCE = 44  # the protocol's minor version

# What any request begins with, struct fuse_in_header
IN_HEADER = Struct("=IIQQIII4x")  # length, opcode, unique, nodeid, uid, gid, pid
REQUEST_HEAD = Struct("=IIQQ")  # length, opcode, unique, nodeid
OPCODE = Struct("=II")  # length, opcode
UNIQUE = Struct("=8xQ")
CALLER = Struct("=24xIII")  # uid, gid, pid
PID = Struct("=32xI")
UID_OFFSET = 24
UNIQUE_AND_PID = Struct("=8xQ16xI")

# Requests, each unpacked from the start of its header. Offsets are signed, so that the source refuses offsets beyond
# 2^63.
FORGET_REQUEST = Struct("=16xQ16xQ")  # nodeid, nlookup
BATCH_FORGET_REQUEST = Struct("=40xI4x")  # count; then struct fuse_forget_one
FORGET_ONE = Struct("=QQ")  # nodeid, nlookup
GETATTR_REQUEST = Struct("=40xI4xQ")  # getattr_flags, fh
INTERRUPT_REQUEST = Struct("=40xQ")  # unique of the interrupted request
INIT_REQUEST = Struct("=8xQ24xIIIII")  # unique, major, minor, max_readahead, flags, flags2
OPEN_REQUEST = Struct("=40xII")  # flags, open_flags
CREATE_REQUEST = Struct("=40xIIII")  # flags, mode, umask, open_flags; then the name
READ_REQUEST = Struct("=40xQqI12xI")  # fh, offset, size, flags
WRITE_REQUEST = Struct("=24xII8xQqII8xI")  # uid, gid, fh, offset, size, write_flags, flags
RELEASE_REQUEST = Struct("=40xQ")  # fh
FSYNC_REQUEST = Struct("=40xQI")  # fh, fsync_flags
FLUSH_REQUEST = RELEASE_REQUEST
IOCTL_REQUEST = Struct("=40xQ4xI8xII")  # fh, cmd, in_size, out_size; then the input
READDIR_REQUEST = Struct("=40xQQI")  # fh, offset, size
FALLOCATE_REQUEST = Struct("=24xII8xQqqI")  # uid, gid, fh, offset, length, mode
LSEEK_REQUEST = Struct("=40xQqI")  # fh, offset, whence
COPY_FILE_RANGE_REQUEST = Struct("=24xII8xQq8xQqQ8x")  # uid, gid, fh_in, off_in, fh_out, off_out, len
COPY_TARGET = Struct("=56xQ")  # nodeid_out
MKNOD_REQUEST = Struct("=40xIII4x")  # mode, rdev, umask; then the name
MKDIR_REQUEST = Struct("=40xII")  # mode, umask; then the name
LINK_REQUEST = Struct("=40xQ")  # oldnodeid; then the name
RENAME_REQUEST = Struct("=40xQ")  # newdir; then both names
RENAME2_REQUEST = Struct("=40xQI4x")  # newdir, flags; then both names
GETXATTR_REQUEST = Struct("=40xI4x")  # size; then GETXATTR's name
STATX_REQUEST = Struct("=40xI4xQII")  # getattr_flags, fh, sx_flags, sx_mask
# valid, fh, size, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, uid, gid
SETATTR_REQUEST = Struct("=40xI4xQq8xqqqIIII4xII")
SETXATTR_REQUEST = Struct("=40xIIII")  # size, flags, setxattr_flags, padding; then name, value
SHORT_SETXATTR_REQUEST = Struct("=40xII")  # kernels before 5.14, which lack FUSE_SETXATTR_EXT: size, flags

# Where the name, or the first of two, begins in requests on a name in a directory.
NAME_OFFSETS = {
    Opcode.LOOKUP: IN_HEADER_SIZE,
    Opcode.UNLINK: IN_HEADER_SIZE,
    Opcode.RMDIR: IN_HEADER_SIZE,
    Opcode.SYMLINK: IN_HEADER_SIZE,
    Opcode.MKNOD: MKNOD_REQUEST.size,
    Opcode.MKDIR: MKDIR_REQUEST.size,
    Opcode.CREATE: CREATE_REQUEST.size,
    Opcode.LINK: LINK_REQUEST.size,
    Opcode.RENAME: RENAME_REQUEST.size,
    Opcode.RENAME2: RENAME2_REQUEST.size,
}

_NAME = 2  # bytes of the shortest name with its NUL
# The minimum size of each request in bytes. In a shorter one, the end would be read from an older request's bytes.
_MIN_SIZES: dict[Opcode, int] = {
    Opcode.LOOKUP: IN_HEADER_SIZE + _NAME,
    Opcode.FORGET: FORGET_REQUEST.size,
    Opcode.BATCH_FORGET: BATCH_FORGET_REQUEST.size,
    Opcode.GETATTR: GETATTR_REQUEST.size,
    Opcode.SETATTR: SETATTR_REQUEST.size,
    Opcode.SYMLINK: IN_HEADER_SIZE + 2 * _NAME,
    Opcode.MKNOD: IN_HEADER_SIZE + 16 + _NAME,
    Opcode.MKDIR: IN_HEADER_SIZE + 8 + _NAME,
    Opcode.UNLINK: IN_HEADER_SIZE + _NAME,
    Opcode.RMDIR: IN_HEADER_SIZE + _NAME,
    Opcode.RENAME: IN_HEADER_SIZE + 8 + 2 * _NAME,
    Opcode.RENAME2: RENAME2_REQUEST.size + 2 * _NAME,
    Opcode.LINK: IN_HEADER_SIZE + 8 + _NAME,
    Opcode.OPEN: OPEN_REQUEST.size,
    Opcode.OPENDIR: OPEN_REQUEST.size,
    Opcode.CREATE: CREATE_REQUEST.size + _NAME,
    Opcode.TMPFILE: CREATE_REQUEST.size,
    Opcode.READ: READ_REQUEST.size,
    Opcode.WRITE: WRITE_REQUEST.size,
    Opcode.RELEASE: RELEASE_REQUEST.size,
    Opcode.RELEASEDIR: RELEASE_REQUEST.size,
    Opcode.FSYNC: FSYNC_REQUEST.size,
    Opcode.FSYNCDIR: FSYNC_REQUEST.size,
    Opcode.FLUSH: FLUSH_REQUEST.size,
    Opcode.READDIR: READDIR_REQUEST.size,
    Opcode.READDIRPLUS: READDIR_REQUEST.size,
    Opcode.SETXATTR: IN_HEADER_SIZE + 8 + _NAME,
    Opcode.GETXATTR: IN_HEADER_SIZE + 8 + _NAME,
    Opcode.LISTXATTR: IN_HEADER_SIZE + 8,
    Opcode.REMOVEXATTR: IN_HEADER_SIZE + _NAME,
    Opcode.ACCESS: IN_HEADER_SIZE + 8,
    Opcode.FALLOCATE: FALLOCATE_REQUEST.size,
    Opcode.LSEEK: LSEEK_REQUEST.size,
    Opcode.COPY_FILE_RANGE: COPY_FILE_RANGE_REQUEST.size,
    Opcode.STATX: STATX_REQUEST.size,
    Opcode.IOCTL: IOCTL_REQUEST.size,
    Opcode.INTERRUPT: INTERRUPT_REQUEST.size,
}
# Indexed by opcode. Of an opcode without an entry above, llloop only reads the header.
MIN_REQUEST_SIZES = [_MIN_SIZES.get(number, IN_HEADER_SIZE) for number in range(max(Opcode) + 1)]  # type: ignore[call-overload]

# Replies, including struct fuse_out_header
OUT_HEADER = Struct("=IiQ")  # length, error (negative errno), unique
INIT_OUT = Struct("=IIIIHHIIHHII24x")
# struct fuse_attr: ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize,
# flags
ATTR = Struct("=QQQqqqIIIIIIIIII")
ENTRY_HEAD = Struct("=QqQQII")  # nodeid, generation, entry_valid, attr_valid, their nanoseconds; then struct fuse_attr
ENTRY = Struct("=QqQQIIQQQqqqIIIIIIIIII")  # struct fuse_entry_out: ENTRY_HEAD and ATTR
ATTR_HEAD = Struct("=QI4x")  # attr_valid, attr_valid_nsec; then struct fuse_attr
ENTRY_REPLY = Struct("=IiQQqQQIIQQQqqqIIIIIIIIII")  # header, struct fuse_entry_out
ATTR_REPLY = Struct("=IiQQI4xQQQqqqIIIIIIIIII")  # header, attr_valid, attr_valid_nsec, struct fuse_attr
OPEN_REPLY = Struct("=IiQQIi")  # header, fh, open_flags, backing_id
OPEN_OUT = Struct("=QIi")  # fh, open_flags, backing_id, as in the CREATE reply
WRITE_REPLY = Struct("=IiQI4x")  # header, size
IOCTL_OUT = Struct("=iIII")  # result, flags, in_iovs, out_iovs; then the output
GETXATTR_OUT = Struct("=I4x")  # size
LSEEK_REPLY = Struct("=IiQQ")  # header, offset
# struct fuse_kstatfs: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize
STATFS_OUT = Struct("=QQQQQIII28x")
STATX_OUT = Struct("=QII16x")  # attr_valid, attr_valid_nsec, flags; then struct fuse_statx
STATX_SIZE_AND_BLOCKS = Struct("=40xQQ")  # of struct fuse_statx
STATX_BLOCKS_OFFSET = 48
DIRENT = Struct("=QQII")  # struct fuse_dirent: ino, off, namelen, type; then the name, padded to 8 bytes

# Notifications, including struct fuse_out_header
INVAL_INODE = Struct("=IiQQqq")  # header, ino, off, len
INVAL_ENTRY = Struct("=IiQQII")  # header, parent, namelen, flags; then the name with its NUL
DELETE = Struct("=IiQQQI4x")  # header, parent, child, namelen; then the name with its NUL


def known_errno(number: int) -> int:
    """Return *number* if a reply may carry it as its error, else EIO.

    The kernel refuses replies with kernel-internal error numbers (512 and above). Network file systems return some.
    """
    return number if 0 <= number < 512 else errno.EIO


def error_reply(unique: int, number: int) -> bytes:
    """Return a reply without payload.

    Args:
        unique: the request's `unique`.
        number: an errno, or 0 for success.
    """
    return OUT_HEADER.pack(OUT_HEADER_SIZE, -known_errno(number), unique)


def reply(unique: int, payload: bytes) -> bytes:
    """Return a successful reply with *payload*."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(payload), 0, unique) + payload


def decode_device(number: int) -> tuple[int, int]:
    """Return major and minor of a device number in FUSE's encoding (``new_decode_dev`` of <linux/kdev_t.h>)."""
    return number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00


def encode_device(major: int, minor: int) -> int:
    """Return a device number in FUSE's encoding (``new_encode_dev`` of <linux/kdev_t.h>)."""
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


# The fields of struct fuse_attr between ino and rdev, in order.
_ATTR_FIELDS = itemgetter(
    *map(
        Attributes._fields.index,
        (
            "size",
            "blocks",
            "atime",
            "mtime",
            "ctime",
            "atime_nsec",
            "mtime_nsec",
            "ctime_nsec",
            "mode",
            "nlink",
            "uid",
            "gid",
        ),
    )
)


def attribute_fields(number: int, attributes: Attributes) -> tuple[int, ...]:
    """Return the fields of struct fuse_attr; *number* is the inode number in the mount."""
    device = 0
    if attributes.rdev_major or attributes.rdev_minor:
        device = encode_device(attributes.rdev_major, attributes.rdev_minor)
    return number, *_ATTR_FIELDS(attributes), device, attributes.blksize, 0
