"""The reply to the kernel's INIT request: protocol version, features and sizes.

libfuse 2.9 would negotiate protocol 7.19 of 2012, without the features of newer kernels. So the supervisor answers
INIT itself, before any other request is read. It only requests features that the kernel offers. Source:
``<linux/fuse.h>``, struct fuse_init_in and fuse_init_out; ``fs/fuse/inode.c``, process_init_reply().
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from llloop.linux import fuse

PROTOCOL_MAJOR = 7
PROTOCOL_MINOR = 45  # the newest version whose structs `llloop.linux.fuse` contains

# Bytes of data in one request. A worker splices a reply through a pipe, which an ordinary user can enlarge to 1 MiB at
# most. The header and an unaligned range take a page each.
MAX_WRITE = 512 * 1024
MAX_PAGES = MAX_WRITE // fuse.PAGE_SIZE

# The maximum number of background requests, for which no process waits (read-ahead, writeback, asynchronous I/O).
# Requests to a worker that hangs count too. Once they reach the maximum, the kernel sends no background requests to
# other workers either.
MAX_BACKGROUND = 256
# The same with a writeback cache. Most requests then bring data, which the front must copy if a worker has no slots.
MAX_BACKGROUND_COLLECTED = 64


class Feature(IntFlag):
    """The ``FUSE_`` flags of INIT that llloop uses; bits from 32 up are in the field ``flags2``."""

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
    ALLOW_IDMAP = 1 << 40


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
    """The result of the negotiation.

    Attributes:
        minor: the protocol's minor version.
        features: the features in use.
    """

    minor: int
    features: Feature

    def without(self, feature: Feature) -> Capabilities:
        """Return a copy without a feature that was agreed on but will not be used."""
        return Capabilities(self.minor, self.features & ~feature)

    def describe(self) -> str:
        """Return protocol version and feature names in lower case, for the log."""
        return f"FUSE 7.{self.minor}, " + ", ".join(self.names())

    def names(self) -> list[str]:
        """Return the features' names in lower case."""
        return [feature.name.lower() for feature in Feature if feature in self.features and feature.name]


class UnsupportedProtocol(Exception):
    """The kernel's version of the FUSE protocol is too old, or has another major number."""


def negotiate(
    request: bytes,
    *,
    posix_acl: bool,
    writeback: bool,
    passthrough: bool,
    stack_depth: int,
    readdirplus: bool = True,
    id_maps: bool = False,
) -> tuple[bytes, Capabilities]:
    """Answer an INIT request.

    Args:
        request: the request as read from /dev/fuse, including its header.
        posix_acl: whether the source has POSIX ACLs, so that the kernel enforces them.
        writeback: whether the kernel may cache writes.
        passthrough: whether the kernel may do the I/O of files itself.
        stack_depth: max_stack_depth for passthrough: how many stacked file systems are allowed, including this one.
        readdirplus: whether READDIRPLUS returns attributes with directory entries.
        id_maps: whether the mount may be id-mapped. Then only requests that create something contain the caller's ids.

    Returns:
        The reply to write to /dev/fuse, and the negotiated capabilities.

    Raises:
        UnsupportedProtocol: llloop does not support the kernel's protocol version.
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
        (Feature.ALLOW_IDMAP, id_maps),
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
