"""What the kernel may keep, and for how long: timeouts, and the page cache across opens."""

from __future__ import annotations

import time

from llloop.config import Cache, ServeConfig
from llloop.front.inodes import Inode
from llloop.linux import fuse
from llloop.linux.credentials import SETID_BITS
from llloop.linux.syscalls import Attributes

# Time stamps tick: two writes within one tick leave the same one. A stamp is trusted only when it was
# already older than this, in seconds, at the moment it was looked at (4 ms on ext4, but clocks of servers differ).
_SETTLED = 1.0


def split(seconds: float) -> tuple[int, int]:
    """Return a timeout as whole seconds and nanoseconds."""
    whole = int(seconds)
    return whole, int((seconds - whole) * 1_000_000_000)


class CachePolicy:
    """The cache options in the kernel's terms.

    Args:
        config: what the user asked for.
        direct_mmap: whether the kernel can map files that bypass its page cache (DIRECT_IO_ALLOW_MMAP).
    """

    def __init__(self, config: ServeConfig, direct_mmap: bool) -> None:
        self.entry = split(config.entry_timeout)
        self.attributes = split(config.attr_timeout)
        self.negative = split(config.negative_timeout)
        # How long the kernel keeps both what a name leads to and its attributes, in nanoseconds.
        self.both_ns = int(min(config.entry_timeout, config.attr_timeout) * 1_000_000_000)
        self._always = config.cache is Cache.ALWAYS
        self._never = config.cache is Cache.NEVER
        self._direct = self._never and direct_mmap

    def open_flags(self, inode: Inode, attributes: Attributes) -> int:
        """Return the FOPEN_ flags for an open of *inode*, whose attributes are now *attributes*.

        The pages cached from earlier opens are kept only if size and times are what they were when
        they were last known to be right; never on the word of a stamp that could still stand for a later write.
        """
        if self._always:
            return fuse.FOPEN_KEEP_CACHE
        # Only before a write through its page cache the kernel asks for set-ID bits to be cleared, and knows it then.
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
        inode.stamp = stamp if _settled(attributes) else None
        return 0

    def directory_flags(self, inode: Inode, attributes: Attributes) -> int:
        """Return the FOPEN_ flags for an open of the directory *inode*, whose attributes are now *attributes*.

        The kernel keeps a listing, and shows it again if the directory has not changed. But it would ask for what it
        then lacks of the entries' attributes one by one, so a listing is kept only as long as attributes are.
        """
        if self._never:
            return 0
        now = time.monotonic_ns()
        stamp = inode.stamp
        times = (attributes.mtime, attributes.mtime_nsec, attributes.ctime, attributes.ctime_nsec)
        if stamp is not None and stamp[1:] == times and now < stamp[0]:
            return fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
        inode.stamp = (now + self.both_ns, *times) if _settled(attributes) else None
        return fuse.FOPEN_CACHE_DIR


def _settled(attributes: Attributes) -> bool:
    """Whether no later change could leave the same time stamps."""
    return attributes.ctime + attributes.ctime_nsec / 1_000_000_000 + _SETTLED < time.time()
