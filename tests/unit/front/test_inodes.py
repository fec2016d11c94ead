"""The inode table against a simple model, in random sequences of what a mount asks of it."""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llloop.front.inodes import ROOT, Inodes, mix
from llloop.linux.syscalls import Attributes
from llloop.shared.journal import Journal
from tests.expect import fails
from tests.unit.support import Heir, attributes, close_journal

ROOT_DEVICE, OTHER_DEVICE, THIRD_DEVICE = 0x801, 0x2A, 0x100005
ROOT_NUMBER = 2
_MASK = 2**64 - 1
CAPACITY = 1 << 12  # records


def new_table(journal: Journal) -> Inodes:
    return Inodes(attributes(ROOT_NUMBER, device=ROOT_DEVICE, mode=stat.S_IFDIR | 0o755), journal)


def state_of(table: Inodes) -> dict[str, object]:
    """All that a table knows and that must outlive its front."""
    return {
        "inodes": {
            nodeid: (inode.parent, inode.name, inode.lookups, inode.device, inode.number, inode.birth)
            for nodeid, inode in table._table.items()
        },
        "links": {nodeid: set(links) for nodeid, links in table._links.items() if links},
        "renumbered": table._renumbered,
    }


def numbers_that_collide() -> list[tuple[int, int]]:
    """Files (device, number) many of which want the same nodeid as another."""
    plain = [(device, number) for device in (OTHER_DEVICE, THIRD_DEVICE) for number in (1, 2, 100)]
    mixed = [(ROOT_DEVICE, mix(number ^ mix(device))) for device, number in plain]
    rehashed = [(ROOT_DEVICE, mix(number + 0x9E3779B97F4A7C15 & _MASK)) for _, number in [*mixed, (0, 1)]]
    own = [(ROOT_DEVICE, number) for number in (0, 1, 100, 101, _MASK)]
    return plain + mixed + rehashed + own


FILES = numbers_that_collide()


@dataclass
class File:
    """A file of the source, from its creation to the removal of its last name."""

    birth: int
    names: set[tuple[int, bytes]] = field(default_factory=set)


@dataclass
class Known:
    """What the kernel knows under one nodeid."""

    file: tuple[int, int]
    lookups: int = 0
    names: set[tuple[int, bytes]] = field(default_factory=set)


class TableMachine(RuleBasedStateMachine):
    """Everything is done through the mount, so the table is told of every name that comes and goes."""

    @initialize()
    def start(self) -> None:
        self.journal = Journal(CAPACITY)
        self.table = new_table(self.journal)
        self.source: dict[tuple[int, int], File] = {}
        self.known: dict[int, Known] = {}
        self.births = 0
        self.last_name = 0

    def new_name(self) -> tuple[int, bytes]:
        self.last_name += 1
        # Some lie in a record, some need one or two more.
        return self.last_name % 7 + 1, b"name-%d" % self.last_name + b"x" * (self.last_name * 37 % 240)

    def look_up(self, key: tuple[int, int], name: tuple[int, bytes]) -> None:
        file = self.source[key]
        found = attributes(key[1], device=key[0], birth=file.birth, nlink=len(file.names))
        nodeid = self.table.remember(*name, found)
        self.table.count(nodeid)
        assert nodeid > ROOT
        known = self.known.setdefault(nodeid, Known(key))
        assert known.file == key, "two files have the same number"
        known.lookups += 1
        known.names.add(name)
        assert self.table.get(nodeid).is_same(found)

    def look_up_unless_cached(self, key: tuple[int, int], name: tuple[int, bytes]) -> None:
        """As the kernel does before it changes something about a name."""
        known = self.known.get(self.nodeid(key))
        if known is None or name not in known.names:
            self.look_up(key, name)

    def nodeid(self, key: tuple[int, int]) -> int:
        return self.table.nodeid(*key)

    @rule(key=st.sampled_from(FILES))
    def create(self, key: tuple[int, int]) -> None:
        """A new file; its number may be that of one which is removed and still known."""
        if key in self.source:
            return
        self.births += 1
        name = self.new_name()
        self.source[key] = File(self.births * (1, -1)[self.births % 2], {name})  # before 1970 as well
        if self.nodeid(key) in self.known:
            self.known[self.nodeid(key)].names.clear()
        self.look_up(key, name)

    @precondition(lambda self: self.source)
    @rule(data=st.data())
    def link(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.source)))
        name = self.new_name()
        self.source[key].names.add(name)
        self.look_up(key, name)

    @precondition(lambda self: self.source)
    @rule(data=st.data())
    def look_up_again(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.source)))
        self.look_up(key, data.draw(st.sampled_from(sorted(self.source[key].names))))

    @precondition(lambda self: self.source)
    @rule(data=st.data())
    def rename(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.source)))
        old = data.draw(st.sampled_from(sorted(self.source[key].names)))
        self.look_up_unless_cached(key, old)
        new = self.new_name()
        self.table.renamed(self.nodeid(key), old, new)
        for names in (self.source[key].names, self.known[self.nodeid(key)].names):
            names.remove(old)
            names.add(new)

    @precondition(lambda self: self.source)
    @rule(data=st.data())
    def unlink(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.source)))
        name = data.draw(st.sampled_from(sorted(self.source[key].names)))
        self.look_up_unless_cached(key, name)
        known = self.known[self.nodeid(key)]
        known.names.remove(name)
        assert self.table.unlinked(self.nodeid(key), *name) is bool(known.names)
        self.source[key].names.remove(name)
        if not self.source[key].names:
            del self.source[key]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        nodeid = data.draw(st.sampled_from(sorted(self.known)))
        known = self.known[nodeid]
        count = data.draw(st.integers(1, known.lookups))
        known.lookups -= count
        assert self.table.forget(nodeid, count) is (known.lookups == 0)
        if known.lookups == 0:
            del self.known[nodeid]

    @rule()
    def a_new_front(self) -> None:
        """The front is killed, and the next one makes the table again from what is left of it."""
        successor = Heir(self.journal)
        records = successor.recover()
        table = new_table(successor)
        assert table.recover(records) == {}
        assert state_of(table) == state_of(self.table)
        linked = sum(len(links) for links in table._links.values())
        assert len(records) == len(table) - 1 + linked, "something is recorded that is not there"
        self.journal, self.table = successor, table

    @precondition(lambda self: self.known)
    @rule(data=st.data(), fd=st.integers(-1, 9))
    def pin(self, data: st.DataObject, fd: int) -> None:
        """What keeps an inode without names goes along, whatever happens to its names."""
        nodeid = data.draw(st.sampled_from(sorted(self.known)))
        self.table.note_pin(nodeid, fd)
        successor = Heir(self.journal)
        pins = new_table(successor).recover(successor.recover())
        assert pins.get(nodeid, -1) == fd
        self.table.note_pin(nodeid, -1)

    @rule(nodeid=st.sampled_from([2, 77, _MASK]), count=st.integers(1, 5))
    def forget_what_is_not_known(self, nodeid: int, count: int) -> None:
        if nodeid not in self.known:
            assert self.table.forget(nodeid, count) is False

    @rule(count=st.integers(1, 10))
    def forget_the_root(self, count: int) -> None:
        assert self.table.forget(ROOT, count) is False

    @invariant()
    def as_the_model(self) -> None:
        table = self.table
        assert len(table) == 1 + len(self.known)
        assert ROOT in table
        for nodeid, known in self.known.items():
            inode = table.get(nodeid)
            assert (inode.device, inode.number, inode.lookups) == (*known.file, known.lookups)
            others = table.other_names(nodeid)
            names = ([(inode.parent, inode.name)] if inode.parent else []) + others
            assert len(names) == len(set(names)), "a name is kept twice"
            assert set(names) == known.names

    def teardown(self) -> None:
        if not hasattr(self, "table"):
            return
        for nodeid, known in self.known.items():
            assert self.table.forget(nodeid, known.lookups)
            assert self.table.other_names(nodeid) == []
        assert len(self.table) == 1
        assert not self.table._links and not self.table._renumbered
        assert Heir(self.journal).recover() == [], "a record outlives what it stands for"
        close_journal(self.journal)


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def table() -> Inodes:
    return new_table(Journal(CAPACITY))


def test_an_inode_keeps_its_own_number(table: Inodes) -> None:
    assert table.remember(ROOT, b"a", attributes(4711, device=ROOT_DEVICE)) == 4711


def test_the_source_itself_is_the_root(table: Inodes) -> None:
    root = attributes(ROOT_NUMBER, device=ROOT_DEVICE, mode=stat.S_IFDIR | 0o755)
    assert table.nodeid(ROOT_DEVICE, ROOT_NUMBER) == ROOT
    listing = [(ROOT_NUMBER, 4, b"."), (7, 8, b"file")]
    assert table.with_shown_numbers(ROOT_DEVICE, listing) == [(ROOT, 4, b"."), (7, 8, b"file")]
    # ".." of a directory below is the root by another way; that must not give it a parent.
    assert table.remember(700, b"x", root) == ROOT
    assert table.get(ROOT).parent == 0


@pytest.mark.parametrize("device", [ROOT_DEVICE, OTHER_DEVICE])
def test_an_inode_numbered_one_is_not_the_root(table: Inodes, device: int) -> None:
    nodeid = table.remember(ROOT, b"one", attributes(1, device=device))
    assert nodeid > ROOT
    assert table.get(nodeid).number == 1


def test_the_roots_number_on_another_device_is_not_the_root(table: Inodes) -> None:
    assert table.remember(ROOT, b"other", attributes(ROOT_NUMBER, device=OTHER_DEVICE)) != ROOT


def test_equal_numbers_on_several_devices_are_several_inodes(table: Inodes) -> None:
    devices = (ROOT_DEVICE, OTHER_DEVICE, THIRD_DEVICE)
    numbers = {table.remember(ROOT, b"%d" % device, attributes(100, device=device)) for device in devices}
    assert len(numbers) == 3
    [(number, _, _)] = table.with_shown_numbers(OTHER_DEVICE, [(100, 8, b"file")])
    assert number in numbers


def test_what_the_kernel_does_not_know_is_stale(table: Inodes) -> None:
    assert 5 not in table
    with fails(errno.ESTALE):
        table.get(5)


def test_a_number_given_to_another_file_starts_afresh(table: Inodes) -> None:
    first = attributes(100, birth=1, nlink=2)
    nodeid = table.remember(ROOT, b"a", first)
    table.remember(ROOT, b"b", first)
    table.count(nodeid)
    table.count(nodeid)
    table.get(nodeid).stamp = (1, 2, 3)
    second = attributes(100, birth=2)
    assert table.remember(ROOT, b"c", second) == nodeid
    table.count(nodeid)
    inode = table.get(nodeid)
    assert inode.is_same(second) and not inode.is_same(first)
    assert (inode.parent, inode.name, inode.stamp, inode.lookups) == (ROOT, b"c", None, 3)
    assert table.other_names(nodeid) == []


def test_a_directory_has_one_name(table: Inodes) -> None:
    """Its links are its subdirectories, and a second place means that it was moved behind the mount's back."""
    directory = attributes(300, nlink=5, mode=stat.S_IFDIR | 0o755)
    table.remember(ROOT, b"old", directory)
    table.remember(ROOT, b"new", directory)
    assert table.get(300).name == b"new"
    assert table.other_names(300) == []


def test_a_file_made_without_a_name_gets_one(table: Inodes) -> None:
    nodeid = table.remember(0, b"", attributes(100, nlink=0))
    assert table.remember(ROOT, b"named", attributes(100)) == nodeid
    assert (table.get(nodeid).parent, table.get(nodeid).name) == (ROOT, b"named")
    assert table.other_names(nodeid) == []
    assert table.unlinked(nodeid, ROOT, b"named") is False


def test_names_of_what_is_not_known_change_nothing(table: Inodes) -> None:
    table.renamed(5, (ROOT, b"a"), (ROOT, b"b"))
    assert table.unlinked(5, ROOT, b"a") is False
    assert len(table) == 1


def test_a_file_that_lost_its_last_name_gets_the_next_one(table: Inodes) -> None:
    """linkat(2) by way of /proc/self/fd."""
    nodeid = table.remember(ROOT, b"a", attributes(100))
    assert table.unlinked(nodeid, ROOT, b"a") is False
    table.renamed(nodeid, (ROOT, b"?"), (ROOT, b"b"))
    assert table.get(nodeid).name == b"b"


def test_more_lookups_are_taken_back_than_were_counted(table: Inodes) -> None:
    """A front that died between an answer and its count has counted one too few; the kernel takes back them all."""
    nodeid = table.remember(ROOT, b"a", attributes(100))
    table.count(nodeid)
    assert table.forget(nodeid, 2) is True
    assert nodeid not in table


def test_what_finds_no_room_in_the_ledger_works_and_is_looked_up_again_afterwards() -> None:
    journal = Journal(3)
    table = new_table(journal)
    first, second = (table.remember(ROOT, b"%d" % number, attributes(number)) for number in (100, 200))
    for nodeid in (first, second):
        table.count(nodeid)
    table.note_pin(second, 5)
    table.renamed(second, (ROOT, b"200"), (ROOT, b"new"))
    assert table.get(second).name == b"new"
    successor = Heir(journal)
    recovered = new_table(successor)
    assert recovered.recover(successor.recover()) == {}
    assert first in recovered and second not in recovered
    assert table.forget(second, 1) and table.forget(first, 1)
    assert Heir(journal).recover() == []


# Mounts below the source: the root's is 50

DIRECTORY = stat.S_IFDIR | 0o755


def on_mount(mount: int, ino: int, mode: int = DIRECTORY, **more: int) -> Attributes:
    return attributes(ino, device=ROOT_DEVICE, mode=mode, **more)._replace(mount=mount)  # type: ignore[arg-type]


@pytest.fixture
def mounts() -> tuple[Inodes, Journal]:
    journal = Journal(CAPACITY)
    return Inodes(on_mount(50, ROOT_NUMBER), journal), journal


def test_a_directory_is_another_inode_by_each_mount(mounts: tuple[Inodes, Journal]) -> None:
    table, _ = mounts
    one = table.remember(ROOT, b"one", on_mount(50, 100))
    two = table.remember(ROOT, b"two", on_mount(51, 100))
    again = table.remember(ROOT, b"again", on_mount(50, ROOT_NUMBER + 1))
    itself = table.remember(ROOT, b"itself", on_mount(52, ROOT_NUMBER))
    assert len({one, two, again, itself, ROOT}) == 5
    for _ in range(2):
        assert table.remember(ROOT, b"two", on_mount(51, 100)) == two
        assert table.remember(ROOT, b"one", on_mount(50, 100)) == one
    assert (table.get(one).name, table.get(two).name, table.get(ROOT).name) == (b"one", b"two", b"")
    assert table.known(ROOT, b"two", on_mount(51, 100)) == two
    assert table.known(ROOT, b"two", on_mount(53, 100)) is None
    assert not table.get(one).is_same(on_mount(51, 100))
    assert table.shown(ROOT_DEVICE, 100) == 100


def test_a_file_is_one_inode_by_all_mounts_that_allow_the_same(mounts: tuple[Inodes, Journal]) -> None:
    table, _ = mounts
    table.is_alike = lambda directory, name: name != b"read-only"
    directories = [table.remember(ROOT, b"d%d" % mount, on_mount(mount, 100)) for mount in (50, 51)]
    files = {
        table.remember(directory, b"file", on_mount(mount, 200, stat.S_IFREG))
        for directory, mount in zip(directories, (50, 51), strict=True)
    }
    assert files == {200}
    assert set(table.other_names(200)) == {(directories[0], b"file")}, "one link, but a name on each mount"
    assert table.remember(ROOT, b"read-only", on_mount(52, 200, stat.S_IFREG)) != 200
    assert table.known(ROOT, b"read-only", on_mount(52, 200, stat.S_IFREG)) not in (200, None)


def test_a_mount_that_comes_to_forbid_more_is_noticed(
    mounts: tuple[Inodes, Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, _ = mounts
    now, alike = 1000.0, True
    monkeypatch.setattr("llloop.front.inodes.time.monotonic", lambda: now)
    table.is_alike = lambda directory, name: alike
    file = on_mount(51, 200, stat.S_IFREG)
    first = table.remember(ROOT, b"file", file)
    alike, now = False, now + 1.5
    assert table.known(ROOT, b"file", file) is None
    assert table.remember(ROOT, b"other", file) != first


def test_mounts_are_known_to_the_next_front(mounts: tuple[Inodes, Journal]) -> None:
    table, journal = mounts
    table.is_alike = lambda directory, name: False
    found = [
        (b"one", on_mount(50, 100)),
        (b"two", on_mount(2**63 + 5, 100)),
        (b"file", on_mount(53, 100, stat.S_IFREG)),
    ]
    nodeids = [table.remember(ROOT, name, one) for name, one in found]
    successor = Inodes(on_mount(50, ROOT_NUMBER), Heir(journal))
    successor.is_alike = table.is_alike
    successor.recover(successor._journal.recover())
    assert [successor.remember(ROOT, name, one) for name, one in found] == nodeids
    assert len(set(nodeids)) == 3
    for nodeid in nodeids:
        assert successor.forget(nodeid, 1)
    assert successor._renumbered == {}
