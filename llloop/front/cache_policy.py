"""What the kernel may cache: timeouts of names and attributes, cached pages and listings across opens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from llloop.config import Cache, ServeConfig
from llloop.front.inodes import Inodes
from llloop.linux import fuse
from llloop.linux.credentials import SETID_BITS
from llloop.linux.syscalls import Attributes

# Timestamps have a granularity (4 ms on ext4): two writes within one tick leave the same timestamp. So a timestamp is
# only trusted if it was older than this, in seconds, when it was read. Clocks of file servers may differ.
_SETTLE_TIME = 1.0


_MASK = (1 << 64) - 1


def split(seconds: float) -> tuple[int, int]:
    """Return a timeout as whole seconds and nanoseconds."""
    whole = int(seconds)
    return whole, int((seconds - whole) * 1_000_000_000)


class Validity(NamedTuple):
    """The timeouts in replies.

    Attributes:
        both: entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec of struct fuse_entry_out.
        only_entry: the same with attributes that are not valid.
        attributes: attr_valid, attr_valid_nsec of struct fuse_attr_out.
        negative: struct fuse_entry_out for a missing name; empty if the kernel must not cache that.
    """

    both: tuple[int, int, int, int]
    only_entry: tuple[int, int, int, int]
    attributes: tuple[int, int]
    negative: bytes


def validity_of(entry: float, attributes: float, negative: float) -> Validity:
    """Return timeouts, given in seconds, as replies contain them."""
    (entry_s, entry_ns), (attr_s, attr_ns), (negative_s, negative_ns) = split(entry), split(attributes), split(negative)
    missing = fuse.ENTRY_HEAD.pack(0, 0, negative_s, 0, negative_ns, 0) + bytes(fuse.ATTR.size)
    return Validity(
        (entry_s, attr_s, entry_ns, attr_ns),
        (entry_s, 0, entry_ns, 0),
        (attr_s, attr_ns),
        missing if negative_s or negative_ns else b"",
    )


class CachePolicy:
    """Translates the cache options into timeouts and FOPEN_ flags.

    Attributes:
        validity: the timeouts.
        unheard: with `--watch`, the timeouts for what cannot be heard.

    Args:
        config: the mount's options.
        direct_mmap: whether the kernel can map files that bypass its page cache (FUSE_DIRECT_IO_ALLOW_MMAP).
        front: how many fronts there have been before this one. A stamp of a dead front means nothing, because the
            kernel may not have got the reply that went with it.
        epochs: whether the kernel can drop all missing names at once (FUSE_NOTIFY_INC_EPOCH).
    """

    def __init__(self, config: ServeConfig, direct_mmap: bool, front: int, *, epochs: bool = True) -> None:
        self._front = front
        timeouts = config.entry_timeout, config.attr_timeout, config.negative_timeout
        unheard = timeouts
        if config.watch:
            unheard = tuple(map(min, timeouts, config.unheard_timeouts()))  # type: ignore[assignment]
        self.unheard = validity_of(*unheard)
        # Without epochs, missing names could not be dropped after events were lost.
        self.validity = validity_of(*timeouts[:2], timeouts[2] if epochs or not config.watch else unheard[2])
        # How long both the entry and its attributes stay valid, in nanoseconds.
        self.both_ns = int(min(unheard[:2]) * 1_000_000_000)
        # Returns what changes whenever others change a file in the source; None if such changes are not heard.
        self.changes_of: Callable[[int, Attributes], tuple[int, int] | None] = _unheard
        self._always = config.cache is Cache.ALWAYS
        self._never = config.cache is Cache.NEVER
        self._direct = self._never and direct_mmap

    def open_flags(self, inodes: Inodes, nodeid: int, attributes: Attributes) -> int:
        """Return the FOPEN_ flags for an open of the file *nodeid* with its current *attributes*.

        The kernel keeps pages from earlier opens only if size and times equal the noted ones. Times are only noted if
        no later write can leave the same ones, or if the watcher has heard of no change.
        """
        if self._always:
            return fuse.FOPEN_KEEP_CACHE
        # Not for files with set-ID bits: the kernel only sends the request that clears them before cached writes.
        if self._direct and not attributes.mode & SETID_BITS:
            return fuse.FOPEN_DIRECT_IO
        if self._never:
            return 0
        changes = self.changes_of(nodeid, attributes)
        stamp = self._stamp(attributes, attributes.size, changes)
        if inodes.stamp(nodeid) == stamp:
            return fuse.FOPEN_KEEP_CACHE
        inodes.set_stamp(nodeid, stamp if changes is not None or _is_settled(attributes) else 0)
        return 0

    def directory_flags(self, inodes: Inodes, nodeid: int, attributes: Attributes) -> int:
        """Return the FOPEN_ flags for an open of the directory *nodeid* with its current *attributes*.

        The kernel caches a listing, and uses it again while the directory has not changed. But it would request
        expired attributes of entries one by one. So a listing is only kept as long as attributes are valid.
        """
        if self._never:
            return 0
        now = time.monotonic_ns()
        changes = self.changes_of(nodeid, attributes)
        stamp = self._stamp(attributes, 0, changes)
        is_known = inodes.stamp(nodeid) == stamp
        if changes is not None:
            inodes.set_stamp(nodeid, stamp)
            return fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE if is_known else fuse.FOPEN_CACHE_DIR
        if is_known and now < inodes.valid_until(nodeid):
            return fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
        inodes.set_valid_until(nodeid, now + self.both_ns)
        inodes.set_stamp(nodeid, stamp if _is_settled(attributes) else 0)
        return fuse.FOPEN_CACHE_DIR

    def _stamp(self, attributes: Attributes, size: int, changes: tuple[int, int] | None) -> int:
        """Return 64 bits, not all 0, that stand for a size, the times of *attributes*, and *changes*."""
        times = attributes.mtime, attributes.mtime_nsec, attributes.ctime, attributes.ctime_nsec
        return hash((self._front, size, *times, *(changes or ()))) & _MASK or 1


def _unheard(nodeid: int, attributes: Attributes) -> None:
    """Nobody hears of changes."""


def _is_settled(attributes: Attributes) -> bool:
    """Return whether every later change will leave other timestamps."""
    return attributes.ctime + attributes.ctime_nsec / 1_000_000_000 + _SETTLE_TIME < time.time()
