"""How many descriptors each user may hold, and which removed files are closed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llloop.front.descriptor_shares import DIRECTORY_WEIGHT, Shares
from llloop.front.inodes import ROOT, Inodes
from llloop.front.pins import Pins
from llloop.linux.syscalls import fstatx
from llloop.shared.leadership import Leadership
from llloop.shared.table import Table
from tests.expect import fails
from tests.unit.support import attributes, open_descriptors

ONE, TWO, THREE = 4001, 4002, 4003
CAPACITY = 1600


def take_all(shares: Shares, uid: int, weight: int = 1) -> int:
    """Take as many as a user may have, and return how many he has then."""
    while shares.has_room(uid, weight):
        shares.take(uid)
    with fails(errno.EMFILE):
        shares.ensure_room(uid, weight)
    return shares.held(uid)


def test_user_may_take_half_of_the_free_descriptors() -> None:
    shares = Shares(CAPACITY)
    usual = CAPACITY * 63 // 64
    for uid, part in ((ONE, 2), (TWO, 4), (THREE, 8)):
        assert abs(take_all(shares, uid) - usual / part) <= 1
    assert not shares.has_room(ONE)
    assert take_all(shares, 0) > CAPACITY // 64, "what is reserved for root"
    for uid in (ONE, TWO, THREE, 0):
        for _ in range(shares.held(uid)):
            shares.give_back(uid)
    assert abs(take_all(shares, THREE) - usual / 2) <= 1


def test_directories_have_a_larger_share() -> None:
    for uid in (ONE, 0):
        shares = Shares(CAPACITY)
        files = take_all(shares, uid)
        assert take_all(shares, uid, DIRECTORY_WEIGHT) > files + 20
        assert shares.has_room(TWO)


class Place:
    """The pins of a front, and what they work with."""

    def __init__(self) -> None:
        self.inodes = Inodes(attributes(2), Table(1 << 10))
        self.shares = Shares(32)
        self.closing: list[int] = []
        self.pins = Pins(self.inodes, self.shares, Leadership(), self.closing)

    def add(self, path: Path, how_many: int, uid: int) -> list[int]:
        """Pin so many new inodes of a user, and return their nodeids."""
        path.touch()
        nodeids = []
        for _ in range(how_many):
            number = 100 + len(self.inodes)
            nodeid = self.inodes.remember(ROOT, b"%d" % number, attributes(number))
            self.pins.add(nodeid, os.open(path, os.O_PATH), uid)
            nodeids.append(nodeid)
        return nodeids

    def close(self) -> None:
        for nodeid in list(self.pins):
            self.pins.drop(nodeid)
        for fd in self.closing:
            os.close(fd)


@pytest.fixture
def place() -> Place:
    return Place()


def test_oldest_removed_files_are_closed(place: Place, tmp_path: Path) -> None:
    before = open_descriptors()
    others = place.add(tmp_path / "file", 2, TWO)
    own = place.add(tmp_path / "file", 60, ONE)
    kept = [nodeid for nodeid in own if place.pins.get(nodeid) is not None]
    assert kept == own[-len(kept) :]
    assert 10 < len(kept) < 16
    assert None not in map(place.pins.get, others), "another's are left alone"
    # The oldest removed file of the user is closed for the new one.
    place.shares.ensure_room(ONE)
    place.shares.take(ONE)
    assert len([nodeid for nodeid in kept if place.pins.get(nodeid) is not None]) == len(kept) - 1
    place.close()
    assert open_descriptors() == before


def test_removed_files_are_closed_if_open_files_use_the_share(place: Place, tmp_path: Path) -> None:
    before = open_descriptors()
    take_all(place.shares, ONE)
    place.add(tmp_path / "file", 3, ONE)
    assert len(place.pins) == 0
    place.close()
    assert open_descriptors() == before


def test_next_front_takes_over_nothing_but_pins(place: Place, tmp_path: Path) -> None:
    """A descriptor of another file, one that was opened for I/O, and that of a file with a name are no pins."""
    (tmp_path / "file").touch()
    (tmp_path / "other").touch()
    pin, other = (os.open(tmp_path / name, os.O_PATH) for name in ("file", "other"))
    opened = os.open(tmp_path / "file", os.O_RDONLY)
    left = {pin, other, opened}
    named = place.inodes.remember(ROOT, b"file", fstatx(pin))
    place.inodes.set_pin(named, pin)
    place.pins.take_over(left)
    place.inodes.unlinked(named, ROOT, b"file")
    for fd in (other, opened, 1000):
        place.inodes.set_pin(named, fd)
        place.pins.take_over(left)
    assert len(place.pins) == 0 and left == {pin, other, opened}
    for fd in left:
        os.close(fd)


def test_next_front_counts_inherited_descriptors(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_PATH)
    nodeid = place.inodes.remember(ROOT, b"file", fstatx(fd))
    place.inodes.unlinked(nodeid, ROOT, b"file")
    place.inodes.set_pin(nodeid, fd)
    left = {fd}
    place.pins.take_over(left)
    assert left == set()
    assert place.shares.held(os.geteuid()) == 1
    assert place.pins.drop(nodeid)
    assert place.shares.held(os.geteuid()) == 0
    place.close()
