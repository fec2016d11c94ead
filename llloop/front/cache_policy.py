"""What the kernel may cache: timeouts of names and attributes, cached pages and listings across opens."""

from __future__ import annotations

import time

from llloop.config import Cache, ServeConfig
from llloop.front.inodes import Inode
from llloop.linux import fuse
from llloop.linux.credentials import SETID_BITS
from llloop.linux.syscalls import Attributes

# Timestamps have a granularity (4 ms on ext4): two writes within one tick leave the same timestamp. So a timestamp is
# only trusted if it was older than this, in seconds, when it was read. Clocks of file servers may differ.
_SETTLE_TIME = 1.0


def split(seconds: float) -> tuple[int, int]:
    """Return a timeout as whole seconds and nanoseconds."""
    whole = int(seconds)
    return whole, int((seconds - whole) * 1_000_000_000)


class CachePolicy:
    """Translates the cache options into timeouts and FOPEN_ flags.

    Args:
        config: the mount's options.
        direct_mmap: whether the kernel can map files that bypass its page cache (FUSE_DIRECT_IO_ALLOW_MMAP).
    """

    def __init__(self, config: ServeConfig, direct_mmap: bool) -> None:
        self.entry = split(config.entry_timeout)
        self.attributes = split(config.attr_timeout)
        self.negative = split(config.negative_timeout)
        # How long both the entry and its attributes stay valid, in nanoseconds.
        self.both_ns = int(min(config.entry_timeout, config.attr_timeout) * 1_000_000_000)
        self._always = config.cache is Cache.ALWAYS
        self._never = config.cache is Cache.NEVER
        self._direct = self._never and direct_mmap

    def open_flags(self, inode: Inode, attributes: Attributes) -> int:
        """Return the FOPEN_ flags for an open of the file *inode* with its current *attributes*.

        The kernel keeps pages from earlier opens only if size and times equal the noted ones. Times are only noted if
        no later write can leave the same ones.
        """
        if self._always:
            return fuse.FOPEN_KEEP_CACHE
        # Not for files with set-ID bits: the kernel only sends the request that clears them before cached writes.
        if self._direct and not attributes.mode & SETID_BITS:
            return fuse.FOPEN_DIRECT_IO
        if self._never:
            return 0
        stamp = (
            attributes.size,
            attributes.mtime,
            attributes.mtime_nsec,
            attributes.ctime,
            attributes.ctime_nsec,
        )
        if inode.stamp == stamp:
            return fuse.FOPEN_KEEP_CACHE
        inode.stamp = stamp if _is_settled(attributes) else None
        return 0

    def directory_flags(self, inode: Inode, attributes: Attributes) -> int:
        """Return the FOPEN_ flags for an open of the directory *inode* with its current *attributes*.

        The kernel caches a listing, and uses it again while the directory has not changed. But it would request
        expired attributes of entries one by one. So a listing is only kept as long as attributes are valid.
        """
        if self._never:
            return 0
        now = time.monotonic_ns()
        stamp = inode.stamp
        times = (attributes.mtime, attributes.mtime_nsec, attributes.ctime, attributes.ctime_nsec)
        if stamp is not None and stamp[1:] == times and now < stamp[0]:
            return fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
        inode.stamp = (now + self.both_ns, *times) if _is_settled(attributes) else None
        return fuse.FOPEN_CACHE_DIR


def _is_settled(attributes: Attributes) -> bool:
    """Return whether every later change will leave other timestamps."""
    return attributes.ctime + attributes.ctime_nsec / 1_000_000_000 + _SETTLE_TIME < time.time()
