"""Counts recent lookups in each directory.

When a program reads a directory, the kernel first requests the attributes of all entries with their names. A program
that has just looked up each name (``git status``) does not need them. So lookups are counted for each directory.
"""

from __future__ import annotations

# The maximum time of counting, in nanoseconds, so that the counters stay small.
_MAX_VALIDITY = 2_000_000_000


class RecentLookups:
    """Counts lookups in each directory as long as the kernel may use their answers.

    Args:
        validity: that time in nanoseconds. Lookups that are older are not counted. Lookups younger than half of it
            always are.
    """

    def __init__(self, validity: int) -> None:
        self._half = min(validity, _MAX_VALIDITY) // 2
        self._end = 0
        self._counts: dict[int, int] = {}
        self._earlier: dict[int, int] = {}

    def note(self, directory: int, now: int) -> None:
        """Count a lookup in the inode *directory* at the time *now* (monotonic clock, nanoseconds)."""
        if now >= self._end:
            self._turn(now)
        counts = self._counts
        counts[directory] = counts.get(directory, 0) + 1

    def count(self, directory: int, now: int) -> int:
        """Return the number of recent lookups in the inode *directory* at the time *now*."""
        if now >= self._end:
            self._turn(now)
        return self._counts.get(directory, 0) + self._earlier.get(directory, 0)

    def _turn(self, now: int) -> None:
        """Drop counts that have become too old."""
        self._earlier = self._counts if now < self._end + self._half else {}
        self._counts = {}
        self._end = now + self._half
