"""Which notifications follow from events."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llloop.shared import notifications
from llloop.shared.watch_state import WatchState
from llloop.watch.coherence import AGAIN, Coherence
from llloop.watch.events import Event, Operation

DIRECTORY, OTHER, FILE, UNKNOWN = 100, 200, 300, 400


class EveryInode:
    """Each inode has its number as its nodeid; one is unknown."""

    def nodeids(self, device: int, number: int) -> tuple[int, ...]:
        return () if number == UNKNOWN else (number,)

    def all(self) -> list[int]:
        return [1, DIRECTORY, FILE]

    def names(self) -> list[tuple[int, bytes]]:
        return [(1, b"directory"), (DIRECTORY, b"file")]


Told = list[tuple[object, ...]]


def coherence(
    *, relays: bool = False, epochs: bool = True, waits: bool = True, most_again: int = 1000
) -> tuple[Coherence, Told, WatchState]:
    told: Told = []
    state = WatchState()

    def call(function: Callable[..., None], device: int, *arguments: object) -> None:
        told.append((function.__name__, *arguments))

    made = Coherence(
        3,
        EveryInode(),  # type: ignore[arg-type]
        state,
        call,  # type: ignore[arg-type]
        relays=relays,
        epochs=epochs,
        waits=waits,
        most_again=most_again,
    )
    return made, told, state


def event(operation: Operation, directory: int = DIRECTORY, name: bytes = b"name", number: int = FILE) -> Event:
    return Event(operation, False, 7, directory, name, 0, b"", number, 5)


def test_created_name_is_dropped_before_attributes() -> None:
    own, told, _ = coherence()
    assert own.drop([event(Operation.CREATE)]) == 3
    assert told == [
        ("drop_entry", DIRECTORY, b"name"),
        ("expire_attributes", DIRECTORY),
        ("expire_attributes", FILE),
    ]


def test_written_data_is_dropped_after_the_lock_of_the_directory() -> None:
    own, told, _ = coherence()
    own.drop([event(Operation.ATTRIB), event(Operation.MODIFY)])
    assert told == [("drop_entry", DIRECTORY, b"/"), ("drop_pages", FILE)]


def test_rename_concerns_both_names() -> None:
    own, told, _ = coherence()
    own.drop([Event(Operation.MOVED, True, 7, DIRECTORY, b"old", OTHER, b"new", FILE, 5)])
    assert told[:2] == [("expire_entry", DIRECTORY, b"old"), ("expire_entry", OTHER, b"new")], "it may have mounts"
    assert {one[1] for one in told[2:]} == {DIRECTORY, OTHER, FILE}


@pytest.mark.parametrize("relays", [False, True])
def test_name_that_is_gone_is_kept_for_the_relay(relays: bool) -> None:
    own, told, _ = coherence(relays=relays)
    own.drop([event(Operation.DELETE)])
    assert told[0][0] == ("expire_entry" if relays else "drop_entry")


def test_unknown_inodes_get_no_notification() -> None:
    own, told, _ = coherence()
    assert own.drop([event(Operation.CREATE, UNKNOWN, number=UNKNOWN)]) == 0
    assert told == []


def test_many_events_of_one_file_make_one_notification() -> None:
    own, told, _ = coherence()
    own.drop([event(Operation.MODIFY)] * 1000)
    assert len(told) == 2


def test_changes_are_counted() -> None:
    own, _, state = coherence()
    own.note([event(Operation.MODIFY), event(Operation.ATTRIB)])
    assert (state.changes[FILE], state.changes[DIRECTORY], state.changes[OTHER]) == (2, 2, 0)


@pytest.mark.parametrize(
    ("waits", "directory", "expected"), [(True, DIRECTORY, 0), (True, 0, 1), (False, DIRECTORY, 2), (False, 0, 1)]
)
def test_notifications_are_repeated_if_needed(waits: bool, directory: int, expected: int) -> None:
    own, told, _ = coherence(waits=waits)
    own.drop_again_later([event(Operation.ATTRIB, directory)], 10.0)
    own.repeat(10.0 + AGAIN / 2)
    assert told == []
    own.repeat(10.0 + AGAIN)
    assert len(told) == expected
    assert own.next_repetition() is None


def test_everything_is_dropped_if_too_much_is_to_be_repeated() -> None:
    own, told, state = coherence(waits=False, epochs=False, most_again=3)
    assert own.drop_again_later([event(Operation.ATTRIB)] * 2, 10.0)
    assert not own.drop_again_later([event(Operation.ATTRIB)] * 2, 10.1), "the caller must drop everything"
    assert own.drop_again_later([event(Operation.ATTRIB)] * 3, 10.2), "there is room again"
    own.repeat(10.15 + AGAIN)
    assert state.counts().dropped == 1
    assert ("drop_pages", 1) in told
    del told[:]
    own.repeat(10.2 + AGAIN)
    assert told
    assert own.next_repetition() is None
    assert own.drop_again_later([event(Operation.ATTRIB)] * 3, 20.0), "what was repeated takes no room"


def test_everything_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    monkeypatch.setattr(notifications, "increase_epoch", epochs.append)
    own, told, state = coherence()
    before = state.generation
    own.drop_everything()
    assert epochs == [3]
    assert told == [("drop_pages", 1), ("drop_pages", DIRECTORY), ("drop_pages", FILE)]
    assert state.generation > before
    assert state.counts().dropped == 1


def test_everything_is_dropped_by_name_before_epochs() -> None:
    own, told, _ = coherence(epochs=False)
    own.drop_everything()
    assert told[:2] == [("drop_entry", 1, b"directory"), ("drop_entry", DIRECTORY, b"file")]
