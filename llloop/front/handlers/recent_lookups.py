"""Which directories' entries the kernel has just looked up one by one.

When a directory is read, the kernel first asks for the attributes of all entries along with their names. Who has asked
for each of them just before (``git status``) has no use for that. So it is counted which directories are looked at.
"""

from __future__ import annotations

# For so long at most, in nanoseconds, so that what is counted stays little.
_LONGEST = 2_000_000_000


class RecentLookups:
    """Counts lookups for each directory, for as long as the kernel may use their answers.

    Args:
        validity: how long that is, in nanoseconds. What is older is not counted; of what is younger than half of it,
            all is.
    """

    def __init__(self, validity: int) -> None:
        self._half = min(validity, _LONGEST) // 2
        self._end = 0
        self._counts: dict[int, int] = {}
        self._earlier: dict[int, int] = {}

    def note(self, directory: int, now: int) -> None:
        """Count a lookup in the directory numbered *directory*, done at *now* (monotonic clock, nanoseconds)."""
        if now >= self._end:
            self._turn(now)
        counts = self._counts
        counts[directory] = counts.get(directory, 0) + 1

    def count(self, directory: int, now: int) -> int:
        """Return how many there were in the directory numbered *directory* up to *now*."""
        if now >= self._end:
            self._turn(now)
        return self._counts.get(directory, 0) + self._earlier.get(directory, 0)

    def _turn(self, now: int) -> None:
        """Leave out what has become too old."""
        self._earlier = self._counts if now < self._end + self._half else {}
        self._counts = {}
        self._end = now + self._half
