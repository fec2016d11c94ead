"""What llloop answers to the kernel's INIT: protocol version, features and sizes.

libfuse 2.9 would negotiate protocol 7.19 and lose what kernels learnt since 2012, so llloop
writes the reply itself (design: the supervisor does, before any other request is read). A
feature is asked for only if the kernel offered it. Source: ``<linux/fuse.h>``, struct
fuse_init_in and fuse_init_out; ``fs/fuse/inode.c``, process_init_reply().
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from llloop.linux import fuse

PROTOCOL_MAJOR = 7
PROTOCOL_MINOR = 45  # the newest whose structs wire.py knows

# Bytes in one request. A reply is spliced through a pipe of at most 1 MiB (an ordinary process
# may not have more), in which the header takes a page and an unaligned range one more.
MAX_WRITE = 512 * 1024
MAX_PAGES = MAX_WRITE // fuse.PAGE_SIZE

# Requests that may be under way without a process waiting for each (read-ahead, writeback, asynchronous I/O). Those
# that wait for a worker that hangs count too, and when all do, nobody's are sent any more, for whatever worker.
MAX_BACKGROUND = 256
# Where the kernel collects writes, most bring data along, which the front would copy if one worker had no slots left.
MAX_BACKGROUND_COLLECTED = 64


class Feature(IntFlag):
    """``FUSE_`` flags of INIT that llloop knows a use for; bits from 32 up travel in ``flags2``."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


_ALWAYS = (
    Feature.ASYNC_READ
    | Feature.ATOMIC_O_TRUNC
    | Feature.BIG_WRITES
    | Feature.DONT_MASK
    | Feature.AUTO_INVAL_DATA
    | Feature.DO_READDIRPLUS
    | Feature.READDIRPLUS_AUTO
    | Feature.ASYNC_DIO
    | Feature.PARALLEL_DIROPS
    | Feature.MAX_PAGES
    | Feature.CACHE_SYMLINKS
    | Feature.HANDLE_KILLPRIV_V2
    | Feature.SETXATTR_EXT
    | Feature.INIT_EXT
    | Feature.DIRECT_IO_ALLOW_MMAP
    | Feature.HAS_RESEND
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What kernel and llloop agreed on.

    Attributes:
        minor: the protocol's minor version.
        features: the features in force.
    """

    minor: int
    features: Feature

    def without(self, feature: Feature) -> Capabilities:
        """Return these capabilities less one that was agreed to and will not be used."""
        return Capabilities(self.minor, self.features & ~feature)

    def describe(self) -> str:
        """Return the features' names in lower case, for the line that serve prints."""
        return f"FUSE 7.{self.minor}, " + ", ".join(self.names())

    def names(self) -> list[str]:
        """Return the features' names in lower case."""
        return [feature.name.lower() for feature in Feature if feature in self.features and feature.name]


class UnsupportedProtocol(Exception):
    """The kernel speaks another major version of the protocol, or one too old."""


def negotiate(
    request: bytes,
    *,
    posix_acl: bool,
    writeback: bool,
    passthrough: bool,
    stack_depth: int,
    readdirplus: bool = True,
) -> tuple[bytes, Capabilities]:
    """Answer an INIT request.

    Args:
        request: the request as read from /dev/fuse, header included.
        posix_acl: whether the source has POSIX ACLs; the kernel then enforces them.
        writeback: whether the kernel may collect writes.
        passthrough: whether the kernel may do the I/O of files by itself.
        stack_depth: how many file systems may lie on top of each other, this one included, for that.
        readdirplus: whether listings are to bring attributes along.

    Returns:
        The reply to write to /dev/fuse, and what it agreed to.

    Raises:
        UnsupportedProtocol: llloop cannot talk to this kernel.
    """
    unique, major, minor, max_readahead, flags, flags2 = fuse.INIT_REQUEST.unpack_from(request.ljust(104, b"\0"))
    if major != PROTOCOL_MAJOR or minor < 23:
        raise UnsupportedProtocol(f"the kernel speaks FUSE {major}.{minor}, llloop needs {PROTOCOL_MAJOR}.23 or newer")
    offered = flags | (flags2 << 32 if flags & Feature.INIT_EXT else 0)
    wanted = _ALWAYS
    for feature, asked in (
        (Feature.POSIX_ACL, posix_acl),
        (Feature.WRITEBACK_CACHE, writeback),
        (Feature.PASSTHROUGH, passthrough),
    ):
        wanted |= feature if asked else Feature(0)
    if not readdirplus:
        wanted &= ~(Feature.DO_READDIRPLUS | Feature.READDIRPLUS_AUTO)
    agreed = Feature(int(wanted) & offered)
    capabilities = Capabilities(min(minor, PROTOCOL_MINOR), agreed)
    background = MAX_BACKGROUND_COLLECTED if Feature.WRITEBACK_CACHE in agreed else MAX_BACKGROUND
    payload = fuse.INIT_OUT.pack(
        PROTOCOL_MAJOR,
        capabilities.minor,
        max_readahead,
        int(agreed) & 0xFFFFFFFF,
        background,
        background * 3 // 4,
        MAX_WRITE,
        1,  # time granularity in nanoseconds
        MAX_PAGES,
        0,
        int(agreed) >> 32,
        stack_depth if Feature.PASSTHROUGH in agreed else 0,
    )
    return fuse.reply(unique, payload), capabilities
