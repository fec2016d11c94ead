"""The inotify watches that front and watcher share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llloop.linux import inotify
from llloop.shared.table import Table, hash_of
from llloop.shared.watch_state import Method, WatchState
from llloop.shared.watches import Watches


class Made:
    """A table with directories of a temporary directory, and watches of them."""

    def __init__(self) -> None:
        self.state = WatchState()
        self.table = Table(1 << 10)
        self.watches = Watches(self.state, self.table)

    def inode(self, number: int, name: bytes = b"name") -> int:
        return self.table.add(hash_of(number, 7), number, 7, 1, 0, 1, name)

    def watch(self, nodeid: int, path: Path) -> bool:
        fd = os.open(path, os.O_PATH)
        try:
            return self.watches.add(nodeid, fd)
        finally:
            os.close(fd)

    def events(self) -> list[tuple[int, int]]:
        """The number of the watch and the mask of each event."""
        try:
            data = os.read(self.watches.fd, 1 << 16)
        except BlockingIOError:
            return []
        found, position = [], 0
        while position < len(data):
            number, mask, _, length = inotify.EVENT.unpack_from(data, position)
            found.append((number, mask))
            position += inotify.EVENT.size + length
        return found


@pytest.fixture
def made() -> Iterator[Made]:
    one = Made()
    yield one
    os.close(one.watches.fd)


def test_watch_leads_to_its_directory_until_it_is_removed(made: Made, tmp_path: Path) -> None:
    nodeid = made.inode(5)
    assert not made.watches.is_watched(nodeid)
    assert made.watch(nodeid, tmp_path)
    assert made.watches.is_watched(nodeid)
    (tmp_path / "new").touch()
    assert {made.watches.directory(number) for number, _ in made.events()} == {nodeid}
    made.watches.remove(nodeid)
    assert not made.watches.is_watched(nodeid)
    (tmp_path / "another").touch()
    assert [mask for _, mask in made.events()] == [inotify.IN_IGNORED]


def test_watch_that_ended_by_itself_is_not_counted(made: Made, tmp_path: Path) -> None:
    nodeid = made.inode(5)
    (tmp_path / "sub").mkdir()
    made.watch(nodeid, tmp_path / "sub")
    assert made.state.directories == 1
    (tmp_path / "sub").rmdir()
    for number, mask in made.events():
        if mask & inotify.IN_IGNORED:
            made.watches.ended(number)
    assert not made.watches.is_watched(nodeid)
    assert made.state.directories == 0


def test_inode_with_the_place_of_another_one_is_not_watched(made: Made, tmp_path: Path) -> None:
    old = made.inode(5)
    made.watch(old, tmp_path)
    made.table.remove(old & made.table.mask)
    new = made.inode(6)
    assert new & made.table.mask == old & made.table.mask
    assert not made.watches.is_watched(new)


def test_same_directory_by_another_mount_is_not_watched_twice(made: Made, tmp_path: Path) -> None:
    one, other = made.inode(5), made.inode(5, b"other")
    assert made.watch(one, tmp_path)
    assert not made.watch(other, tmp_path)
    assert made.watches.is_watched(one)
    made.watches.remove(other)
    assert made.watches.is_watched(one)


@pytest.mark.parametrize("limit", [1, 7, 8])
def test_half_of_the_users_watches_are_for_others(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inotify, "max_user_watches", lambda: limit)
    made = Made()
    for number in range(10):
        (tmp_path / f"{number}").mkdir()
        if not made.watches.is_full:
            made.watch(made.inode(10 + number), tmp_path / f"{number}")
    assert made.state.directories == (limit + 1) // 2
    os.close(made.watches.fd)


def test_directories_without_a_watch_are_counted(made: Made) -> None:
    nodeid = made.inode(5)
    made.watches.miss(nodeid)
    made.watches.miss(nodeid)
    assert made.state.describe() == "off"
    made.state.publish(Method.INOTIFY, frozenset())
    assert made.state.describe() == "inotify, 0 directories, 1 by timeouts"
    made.watches.remove(nodeid)
    assert made.state.describe() == "inotify, 0 directories"


def test_name_leads_to_its_inodes_until_it_changes(made: Made) -> None:
    nodeid = made.inode(5)
    watches = made.watches
    assert not watches.has_name(1, b"name", nodeid)
    assert watches.note_name(1, b"name", nodeid)
    assert watches.has_name(1, b"name", nodeid)
    assert nodeid in watches.inodes(1, b"name", changed=False)
    assert nodeid in watches.inodes(1, b"name", changed=True)
    assert watches.inodes(1, b"name", changed=False) == []
    assert not watches.has_name(1, b"name", nodeid)


def test_name_without_room_is_not_noted(made: Made) -> None:
    inodes = [made.inode(number) for number in range(5, 10)]
    assert [made.watches.note_name(1, b"name", nodeid) for nodeid in inodes] == [True] * 4 + [False]
    made.table.remove(inodes[0] & made.table.mask)
    assert made.watches.note_name(1, b"name", inodes[4]), "an inode that is gone leaves room"


def test_lost_events_forget_all_names(made: Made) -> None:
    nodeid = made.inode(5)
    made.watches.note_name(1, b"name", nodeid)
    made.watches.forget_names()
    assert not made.watches.has_name(1, b"name", nodeid)
