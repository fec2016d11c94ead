"""Passes what the watcher hears on to the event relay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llloop.shared.relay import Kind, Place, RelayEvent, RelayPipe
from llloop.shared.watch_state import WatchState
from llloop.watch.events import Event, Operation
from llloop.watch.known import Known

_KINDS = {
    Operation.CREATE: Kind.CREATE,
    Operation.DELETE: Kind.DELETE,
    Operation.MODIFY: Kind.MODIFY,
    Operation.ATTRIB: Kind.ATTRIB,
    Operation.CLOSE_WRITE: Kind.CLOSE_WRITE,
}
_DATA = frozenset({Operation.MODIFY, Operation.CLOSE_WRITE})


class Telling:
    """Translates events for the relay. The relay uses nodeids.

    Attributes:
        active: True, see `llloop.watch.process.Relay`.

    Args:
        pipe: the pipe to the relay.
        state: counts the events that are told.
        known: the nodeids of the inodes that the kernel knows.
        data: whether to tell of writes. With `--io kernel`, the kernel writes to the source in the name of the program
            that writes to the mount, and has told of that itself.
    """

    active = True

    def __init__(self, pipe: RelayPipe, state: WatchState, known: Known, *, data: bool) -> None:
        self._pipe = pipe
        self._state = state
        self._known = known
        self._data = data

    def tell(self, events: Sequence[Event]) -> None:
        """Pass events on. Those for which the pipe has no room are lost."""
        told = 0
        following = [*events[1:], None]
        for event, after in zip(events, following, strict=True):
            if self._data or event.operation not in _DATA:
                for relayed in self._translated(event, after):
                    told += self._pipe.tell(relayed)
        self._state.count_told(told)

    def _translated(self, event: Event, after: Event | None) -> Iterator[RelayEvent]:
        """Return what the relay is to do for an event; *after* is the following one."""
        target = self._target(event.device, event.number)
        if event.operation is Operation.MOVED:
            yield from self._moved(event, target, after)
        elif event.name:
            for parent in self._nodeids(event.device, event.directory):
                yield RelayEvent(_KINDS[event.operation], event.is_dir, Place(parent, event.name), target)
        elif event.is_dir and event.operation is Operation.ATTRIB and target:
            yield RelayEvent(Kind.ATTRIB, True, Place(target, b""))
        # Other events without a name are of the number of links. The removal or rename that has changed it tells them.

    def _moved(self, event: Event, target: int, after: Event | None) -> Iterator[RelayEvent]:
        """Return a rename, or a removal or creation if the kernel knows only one of the directories."""
        old = [Place(parent, event.name) for parent in self._nodeids(event.device, event.directory)]
        new = [Place(parent, event.new_name) for parent in self._nodeids(event.device, event.new_directory)]
        if old and new:
            victim = 0
            if after is not None and not after.directory and after.operation is Operation.ATTRIB:
                victim = self._target(after.device, after.number)  # it has lost a link; the front checks which
            yield RelayEvent(Kind.RENAME, event.is_dir, old[0], target, new[0], victim)
        elif old:  # without the target: it still exists
            yield RelayEvent(Kind.DELETE, event.is_dir, old[0])
        elif new:
            yield RelayEvent(Kind.CREATE, event.is_dir, new[0], target)

    def _nodeids(self, device: int, number: int) -> tuple[int, ...]:
        return self._known.nodeids(device, number) if number else ()

    def _target(self, device: int, number: int) -> int:
        return next(iter(self._nodeids(device, number)), 0)
