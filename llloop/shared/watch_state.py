"""What the watcher and the front tell each other, in memory that all processes share (`--watch`).

Each cell has one writer, so no lock is needed:

* The watcher publishes which file systems it hears. Only what lies there may stay in the kernel's cache for long.
* The front counts the inodes that the kernel knows, by inode number. So the watcher ignores all else at the price of
  one look into memory. Numbers share a counter, so a counter may be too high, never too low.
* The watcher counts what it has heard of each inode, by inode number. An open keeps cached data only if the counter is
  what it was when the cache was filled.
* The *clock* counts the batches of events. It tells the front whether the watcher may have ignored an event of an inode
  that the front was about to count; see `llloop.front.heard`.
"""

from __future__ import annotations

import mmap
from enum import IntEnum
from typing import NamedTuple

from llloop.shared.metrics import BUCKETS, trimmed

# Counters of inode numbers; untouched ones occupy no memory. File systems give numbers in sequence.
_COUNTERS = 1 << 22
NUMBER_MASK = _COUNTERS - 1
_MOST_IN_COUNTER = 255  # a counter that has come so far stays there

MOST_DEVICES = 256


class Method(IntEnum):
    """How the source is watched."""

    OFF = 0
    STARTING = 1
    FANOTIFY = 2
    INOTIFY = 3
    TIMEOUTS = 4


class _Cell(IntEnum):
    METHOD = 0
    GENERATION = 1  # rises when all that was cached may be out of date, and when the devices change
    CLOCK = 2
    DEVICES = 3
    HEARD = 4
    OWN = 5
    IGNORED = 6
    NOTIFIED = 7
    TOLD = 8
    OVERFLOWS = 9
    DELAY = 10
    LEFT_OUT = 11  # file systems below the source that cannot be heard
    WATCHED = 12  # inotify watches of directories that the front has added and not removed
    MISSED = 13  # directories that the kernel knows and that have no watch
    ENDED = 14  # watches that ended by themselves; the watcher counts them


_DELAYS = 64  # the first cell of the histogram
_DEVICE_CELLS = 128


class WatchCounts(NamedTuple):
    """The watcher's counters since the start of the mount.

    Attributes:
        heard: events of inodes that the kernel knows, done by others than llloop.
        own: events of such inodes that llloop itself caused.
        ignored: events of inodes that the kernel does not know, or outside of the source.
        notified: messages to the kernel that made it drop something.
        told: events that were passed on to programs that watch the mount.
        dropped: how often everything was dropped, because events were lost or mounts below the source have changed.
        nanoseconds: the sum of the delays from reading an event to the end of its notifications.
        histogram: the number of delays in each bucket, as in `llloop.shared.metrics`.
    """

    heard: int
    own: int
    ignored: int
    notified: int
    told: int
    dropped: int
    nanoseconds: int
    histogram: tuple[int, ...]


NOTHING_HEARD = WatchCounts(0, 0, 0, 0, 0, 0, 0, ())


class WatchState:
    """The memory. The supervisor creates it before the first fork.

    Attributes:
        known: for each inode number (`NUMBER_MASK`) how many inodes the kernel knows; the front writes it.
        changes: for each inode number how often it has changed, modulo 2**32; the watcher writes it.
        clock: one cell, which rises with each batch of events.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096 + _COUNTERS * 5)
        view = memoryview(self._memory)
        self._cells = view[:4096].cast("Q")
        self.known = view[4096 : 4096 + _COUNTERS]
        self.changes = view[4096 + _COUNTERS :].cast("I")
        self.clock = self._cells[_Cell.CLOCK : _Cell.CLOCK + 1]

    # The front

    def count_known(self, number: int) -> None:
        """Count an inode that the kernel is about to be told of."""
        place = number & NUMBER_MASK
        count = self.known[place]
        if count < _MOST_IN_COUNTER:
            self.known[place] = count + 1

    def count_forgotten(self, number: int) -> None:
        """Take back `count_known`."""
        place = number & NUMBER_MASK
        count = self.known[place]
        if 0 < count < _MOST_IN_COUNTER:
            self.known[place] = count - 1

    @property
    def generation(self) -> int:
        """Rises whenever the devices change, or all that was cached may be out of date."""
        return self._cells[_Cell.GENERATION]

    def devices(self) -> frozenset[int]:
        """Return the devices that are heard, as in `Attributes.device`."""
        return frozenset(self._cells[_DEVICE_CELLS : _DEVICE_CELLS + self._cells[_Cell.DEVICES]])

    @property
    def directories(self) -> int:
        """The number of directories that are watched with inotify."""
        return max(self._cells[_Cell.WATCHED] - self._cells[_Cell.ENDED], 0)

    def count_directories(self, *, watched: int = 0, missed: int = 0) -> None:
        """Add to the numbers of directories that are watched with inotify, and that could not be watched."""
        for cell, change in ((_Cell.WATCHED, watched), (_Cell.MISSED, missed)):
            self._cells[cell] = max(self._cells[cell] + change, 0)

    # The watcher

    def count_ended(self) -> None:
        """Count a watch of a directory that has ended by itself."""
        self._cells[_Cell.ENDED] += 1

    @property
    def method(self) -> Method:
        """How the source is watched."""
        return Method(self._cells[_Cell.METHOD])

    def publish(self, method: Method, devices: frozenset[int], left_out: int = 0) -> None:
        """Let the front know what is heard from now on.

        Args:
            method: how.
            devices: the file systems that are heard; at most `MOST_DEVICES` count.
            left_out: the number of file systems below the source that cannot be heard.
        """
        cells = self._cells
        cells[_Cell.DEVICES] = 0
        for place, device in enumerate(sorted(devices)[:MOST_DEVICES]):
            cells[_DEVICE_CELLS + place] = device
        cells[_Cell.DEVICES] = min(len(devices), MOST_DEVICES)
        cells[_Cell.LEFT_OUT] = left_out
        cells[_Cell.METHOD] = method
        self.outdate()

    def outdate(self) -> None:
        """Note that all that was cached before may be out of date."""
        self._cells[_Cell.GENERATION] += 1

    def note_change(self, number: int) -> None:
        """Count a change of an inode."""
        place = number & NUMBER_MASK
        self.changes[place] = self.changes[place] + 1 & 0xFFFFFFFF

    def count(self, *, heard: int, own: int, ignored: int, notified: int) -> None:
        """Add to the counters."""
        cells = self._cells
        cells[_Cell.HEARD] += heard
        cells[_Cell.OWN] += own
        cells[_Cell.IGNORED] += ignored
        cells[_Cell.NOTIFIED] += notified

    def count_told(self, told: int) -> None:
        """Add to the events that were passed on."""
        self._cells[_Cell.TOLD] += told

    def count_dropped(self) -> None:
        """Count that everything was dropped."""
        self._cells[_Cell.OVERFLOWS] += 1

    def count_delay(self, nanoseconds: int, events: int) -> None:
        """Count the delay of some events."""
        cells = self._cells
        cells[_Cell.DELAY] += nanoseconds * events
        cells[_DELAYS + min((nanoseconds // 1000).bit_length(), BUCKETS - 1)] += events

    # Anybody

    def counts(self) -> WatchCounts:
        """Return the counters."""
        cells = self._cells
        return WatchCounts(
            cells[_Cell.HEARD],
            cells[_Cell.OWN],
            cells[_Cell.IGNORED],
            cells[_Cell.NOTIFIED],
            cells[_Cell.TOLD],
            cells[_Cell.OVERFLOWS],
            cells[_Cell.DELAY],
            trimmed(tuple(cells[_DELAYS : _DELAYS + BUCKETS])),
        )

    def describe(self) -> str:
        """Return in words how the source is watched."""
        left_out = self._cells[_Cell.LEFT_OUT]
        file_systems = "file system" if left_out == 1 else "file systems"
        rest = f", {left_out} {file_systems} below the source by timeouts" if left_out else ""
        return {
            Method.OFF: "off",
            Method.STARTING: "starting, by timeouts until then",
            Method.FANOTIFY: "fanotify" + rest,
            Method.INOTIFY: self._describe_inotify() + rest,
            Method.TIMEOUTS: "by timeouts, because the source cannot be heard",
        }[self.method]

    def _describe_inotify(self) -> str:
        missed = self._cells[_Cell.MISSED]
        by_timeouts = f", {missed} by timeouts" if missed else ""
        return f"inotify, {self.directories} {'directory' if self.directories == 1 else 'directories'}{by_timeouts}"
