"""Makes the kernel drop what it has cached of inodes that have changed in the source.

Why nothing stale remains. An event is queued after its change is done. So whoever reads the source after the event sees
the change, and only what the front had read before can be stale. There are four places where that can be then:

* *In the kernel's cache.* The notification drops it.
* *In a reply that the kernel has not taken in yet, of an inode that it knows.* INVAL_INODE raises the inode's version
  (fs/fuse/inode.c, fuse_reverse_inval_inode()), and the kernel ignores attributes of a request that is older. Pages
  that are being read are locked, and the notification waits for them. Two requests are not protected by the version:
  SETATTR, and LINK. With `--watch` their replies give attributes no validity.
* *In such a reply, of a name or an inode that the kernel does not know.* A LOOKUP of a name that is not cached, a
  READDIRPLUS and every request that creates hold the lock of the directory. INVAL_ENTRY waits for this lock
  (fuse_reverse_inval_entry()), even if there is no such name. So for each event the watcher first sends INVAL_ENTRY to
  its directory, and INVAL_INODE after that. A name that is looked up again although it is cached needs no lock; but
  INVAL_ENTRY has unhashed it, so that nobody finds it again. A file with several names can be looked up in another
  directory: the front gives attributes of such an inode no validity until the kernel knows it. (Names of directories,
  and with an event relay all names that are gone, are only expired: what is mounted there, works there or watches them
  must not lose them. If such a name is being looked up again while it changes twice, the answer may be in between. The
  repetition drops that.)
* *In the front, which is about to add the inode to those that the kernel knows*, so that the watcher ignores the event.
  See `llloop.front.heard`.

Two more cases remain: events that name no directory (attributes of a directory itself; the number of links), and Linux
6.19 and newer, where INVAL_ENTRY does not wait for the lock if the name is not cached. There, too, the watcher sends
each notification once more after `AGAIN` seconds, when a reply has long been taken in.

A notification can wait for a request that hangs in the source. So it is made by a call of `Leadership`: another thread
then continues with the next events. The order of notifications does not matter, since each comes after its own change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from llloop.linux import kernel
from llloop.shared import notifications
from llloop.shared.watch_state import WatchState
from llloop.watch.events import Event, Operation
from llloop.watch.known import Known

# After how many seconds each notification is repeated where INVAL_ENTRY does not wait for requests in progress.
AGAIN = 1.0
# The maximum number of events to be repeated; each takes some 200 bytes.
_MOST_AGAIN = 1 << 18
_NO_NAME = b"/"  # no directory entry has this name
_CHANGED_DATA = frozenset({Operation.MODIFY, Operation.CLOSE_WRITE})
_CHANGED_NAMES = frozenset({Operation.CREATE, Operation.DELETE, Operation.MOVED})


class _Call(Protocol):
    """`Leadership.call`."""

    def __call__(self, function: Callable[..., None], /, *arguments: object) -> None: ...


class Coherence:
    """Turns events into notifications.

    Args:
        device: a descriptor of /dev/fuse.
        known: which inodes the kernel knows.
        state: what front and watcher tell each other.
        call: makes a call that may block.
        relays: whether events are passed on, by system calls on the names that have changed.
        epochs: whether the kernel knows FUSE_NOTIFY_INC_EPOCH (protocol 7.44).
        waits: whether INVAL_ENTRY waits for requests in progress although a name is not cached.
        most_again: the maximum number of events to be repeated.
    """

    def __init__(
        self,
        device: int,
        known: Known,
        state: WatchState,
        call: _Call,
        *,
        relays: bool,
        epochs: bool,
        waits: bool | None = None,
        most_again: int = _MOST_AGAIN,
    ) -> None:
        self._device = device
        self._known = known
        self._state = state
        self._call = call
        self._relays = relays
        self._epochs = epochs
        self._waits = _waits_for_lock() if waits is None else waits
        # When to repeat what; None stands for everything.
        self._repeated: deque[tuple[float, list[Event] | None]] = deque()
        self._repeated_events = 0
        self._most_again = most_again

    def note(self, events: Iterable[Event]) -> None:
        """Note the changes for the front: an open must not keep what was cached before. Does not block."""
        note = self._state.note_change
        for event in events:
            for number in (event.number, event.directory, event.new_directory):
                if number:
                    note(number)

    def drop(self, events: Sequence[Event]) -> int:
        """Make the kernel drop what these events have changed; return the number of notifications."""
        nodeids = self._known.nodeids
        entries: dict[tuple[int, bytes], bool] = {}
        attributes: dict[int, None] = {}
        pages: dict[int, None] = {}
        for event in events:
            device = event.device
            changes_names = event.operation in _CHANGED_NAMES
            keep = self._may_expire(event)
            for directory, name in ((event.directory, event.name), (event.new_directory, event.new_name)):
                for parent in nodeids(device, directory) if directory else ():
                    entries[parent, name if changes_names else _NO_NAME] = keep
                    if changes_names:
                        attributes[parent] = None
            changed = pages if event.operation in _CHANGED_DATA else attributes
            for nodeid in nodeids(device, event.number) if event.number else ():
                changed[nodeid] = None
        call, device = self._call, self._device
        for (parent, name), keep in entries.items():
            call(notifications.expire_entry if keep else notifications.drop_entry, device, parent, name)
        for nodeid in attributes:
            if nodeid not in pages:
                call(notifications.expire_attributes, device, nodeid)
        for nodeid in pages:
            call(notifications.drop_pages, device, nodeid)
        return len(entries) + len(attributes.keys() | pages.keys())

    def _may_expire(self, event: Event) -> bool:
        """Return whether the names of an event are only expired: its object may have mounts, processes or watchers."""
        is_gone = event.operation is Operation.DELETE or event.operation is Operation.MOVED
        return is_gone and (event.is_dir or self._relays)

    def drop_again_later(self, events: Iterable[Event], now: float) -> bool:
        """Repeat the notifications for those of *events* that need it in `AGAIN` seconds.

        Returns:
            False if these are too many. Everything is then dropped in `AGAIN` seconds. The caller must do so now, too.
        """
        wanted = [event for event in events if not (self._waits and event.directory) or self._may_expire(event)]
        if not wanted:
            return True
        fits = self._repeated_events + len(wanted) <= self._most_again
        if not fits:
            self._repeated.clear()
            self._repeated_events = 0
        self._repeated.append((now + AGAIN, wanted if fits else None))
        self._repeated_events += len(wanted) if fits else 0
        return fits

    def next_repetition(self) -> float | None:
        """Return when `repeat` has something to do (monotonic clock, seconds), or None."""
        return self._repeated[0][0] if self._repeated else None

    def repeat(self, now: float) -> None:
        """Repeat the notifications that are due."""
        while self._repeated and self._repeated[0][0] <= now:
            _, events = self._repeated.popleft()
            if events is None:
                self.drop_everything()
            else:
                self._repeated_events -= len(events)
                self.drop(events)

    def drop_names(self) -> None:
        """Make the kernel look up every name again, without waiting for anything. Needs epochs."""
        if self._epochs:
            notifications.increase_epoch(self._device)

    def drop_everything(self) -> None:
        """Make the kernel drop all names, attributes and pages, because events were lost."""
        self._state.outdate()
        self._state.count_dropped()
        self.drop_names()
        call, device = self._call, self._device
        if not self._epochs:
            for parent, name in self._known.names():
                call(notifications.drop_entry, device, parent, name)
        for nodeid in self._known.all():
            call(notifications.drop_pages, device, nodeid)


def _waits_for_lock() -> bool:
    """Return whether INVAL_ENTRY waits for the lock of the directory in any case (before Linux 6.19)."""
    return kernel.release() < (6, 19)
