"""What the kernel's page cache may contain of a file that is open for writing.

A server must compensate for two properties of the kernel (fs/fuse/file.c of Linux 6.18):

* SEEK_DATA and SEEK_HOLE do not see dirty pages: stores into shared mappings, and cached writes with --writeback.
* write(2) copies its data into a page of the cache, and unlocks the page before it sends the WRITE. The page may be
  dropped in between, because another process has seen a new mtime or opened the file. A READ that is served before the
  WRITE then brings old data into the cache, where it stays.
"""

from __future__ import annotations

from llloop.linux.fuse import PAGE_SIZE

# The longest time from the first page that write(2) fills to its WRITE, in nanoseconds.
_LONGEST_WRITE = 2_000_000_000


class PageCache:
    """The state of one inode's pages.

    Attributes:
        is_clean: whether there is certainly no dirty page: the kernel has dropped all pages, and has neither read nor
            written any since.
        passthrough: whether the kernel does the file's I/O itself, so that stores into mappings change the source.
        write: the last WRITE that was sent to a worker, as in `Router.last`; None if there was none.
        invalidation: the last request for which the kernel must drop pages, likewise.
    """

    __slots__ = ("_others", "_reader", "_recent", "invalidation", "is_clean", "passthrough", "write")

    def __init__(self) -> None:
        self.is_clean = False
        self.passthrough = False
        self.write: tuple[int, int] | None = None
        self.invalidation: tuple[int, int] | None = None
        # The ranges of recent reads (start, end, time): by the thread that read last, and by all others before it.
        self._reader = 0
        self._recent = (0, 0, 0)
        self._others = (0, 0, 0)

    def note_read(self, reader: int, offset: int, size: int, now: int) -> None:
        """Note a READ.

        Args:
            reader: the id of the requesting thread, 0 if it is unknown.
            offset, size: the range in bytes.
            now: when the front took the request (monotonic clock, nanoseconds).
        """
        self.is_clean = False
        if reader != self._reader:
            self._others = _hull(self._others, self._recent, now)
            self._reader, self._recent = reader, (offset, offset + size, now)
        else:
            self._recent = _hull(self._recent, (offset, offset + size, now), now)

    def may_be_stale(self, writer: int, offset: int, size: int, now: int) -> bool:
        """Return whether the page cache may contain older data than a WRITE that the front has just taken.

        Only another thread can have read a page while *writer* was in write(2).

        Args:
            writer: the id of the writing thread, 0 if it is unknown.
            offset, size, now: as for `note_read`.
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
    """Return the smallest range that contains both; only *new* if *old* is too old."""
    if now - old[2] >= _LONGEST_WRITE or old[0] == old[1]:
        return new
    if new[0] == new[1]:
        return old
    return min(old[0], new[0]), max(old[1], new[1]), max(old[2], new[2])
