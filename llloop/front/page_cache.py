"""What the kernel's page cache may hold of a file that is open for writing.

The kernel has two habits that a server must make up for (fs/fuse/file.c of Linux 6.18):

* SEEK_DATA and SEEK_HOLE do not see dirty pages: stores through a shared mapping, and writes that it collects.
* A write(2) enters its data into a page of the cache and unlocks the page before it sends the WRITE. If the page is
  dropped in between (because another process has seen a new mtime, or opened the file), a READ that is served before
  the WRITE brings old data into the cache, which then stays.
"""

from __future__ import annotations

from llloop.linux.fuse import PAGE_SIZE

# How long, in nanoseconds, a write(2) may take from the first page it enters to its WRITE.
_LONGEST_WRITE = 2_000_000_000


class PageCache:
    """The state of one inode's pages.

    Attributes:
        is_clean: whether there can be no dirty page, because the kernel was asked to drop all pages and has neither
            read nor written any since.
        passthrough: whether the kernel does the file's I/O itself and stores through mappings change the source.
        write: the last WRITE that was given to a worker, as `Router.last` says; None if there was none.
        invalidation: the same of the last request for which the kernel is to drop pages.
    """

    __slots__ = ("_others", "_reader", "_recent", "invalidation", "is_clean", "passthrough", "write")

    def __init__(self) -> None:
        self.is_clean = False
        self.passthrough = False
        self.write: tuple[int, int] | None = None
        self.invalidation: tuple[int, int] | None = None
        # Where pages were read lately: by the thread that did so last, and by all before it. First byte, end, time.
        self._reader = 0
        self._recent = (0, 0, 0)
        self._others = (0, 0, 0)

    def note_read(self, reader: int, offset: int, size: int, now: int) -> None:
        """Note a READ.

        Args:
            reader: the thread that asks for it, 0 if it is unknown.
            offset, size: the range in bytes.
            now: when it was taken (monotonic clock, nanoseconds).
        """
        self.is_clean = False
        if reader != self._reader:
            self._others = _hull(self._others, self._recent, now)
            self._reader, self._recent = reader, (offset, offset + size, now)
        else:
            self._recent = _hull(self._recent, (offset, offset + size, now), now)

    def may_be_stale(self, writer: int, offset: int, size: int, now: int) -> bool:
        """Whether the page cache may have older data than a WRITE that was just taken.

        Only another thread can have read a page while *writer* was in write(2).

        Args:
            writer, offset, size, now: as for `note_read`.
        """
        self.is_clean = False
        first = offset // PAGE_SIZE * PAGE_SIZE
        end = (offset + size + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
        return _overlap(self._others, first, end, now) or (
            (writer != self._reader or not writer) and _overlap(self._recent, first, end, now)
        )


def _overlap(ranges: tuple[int, int, int], first: int, end: int, now: int) -> bool:
    return ranges[0] < end and first < ranges[1] and now - ranges[2] < _LONGEST_WRITE


def _hull(old: tuple[int, int, int], new: tuple[int, int, int], now: int) -> tuple[int, int, int]:
    """Return the range from the first to the last byte of two, but for the old one if it is too old."""
    if now - old[2] >= _LONGEST_WRITE or old[0] == old[1]:
        return new
    if new[0] == new[1]:
        return old
    return min(old[0], new[0]), max(old[1], new[1]), max(old[2], new[2])
