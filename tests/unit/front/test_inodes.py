"""The inode table against a simple model, in random sequences of what a mount asks of it."""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llloop.front.inodes import ROOT, Inodes
from llloop.linux.syscalls import Attributes
from llloop.shared.table import MOST_NAMES, Table
from tests.expect import fails
from tests.unit.support import attributes, heir_of_table

ROOT_DEVICE, OTHER_DEVICE, THIRD_DEVICE = 0x801, 0x2A, 0x100005
ROOT_NUMBER = 2
_MASK = 2**64 - 1
CAPACITY = 1 << 12  # rows


def new_table(table: Table) -> Inodes:
    return Inodes(attributes(ROOT_NUMBER, device=ROOT_DEVICE, mode=stat.S_IFDIR | 0o755), table)


def state_of(inodes: Inodes) -> dict[int, object]:
    """All that a table knows and that must outlive its front."""
    found: dict[int, object] = {}
    for nodeid in inodes:
        inode = inodes.get(nodeid)
        found[nodeid] = inode, inodes.names(inode), inodes.lookups(nodeid)
    return found


FILES = [(device, number) for device in (ROOT_DEVICE, OTHER_DEVICE, THIRD_DEVICE) for number in (0, 1, 2, 100, _MASK)]
FILES.remove((ROOT_DEVICE, ROOT_NUMBER))


@dataclass
class File:
    """A file of the source, from its creation to the removal of its last name."""

    birth: int
    nodeid: int = 0
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
        self.memory = Table(CAPACITY)
        self.table = new_table(self.memory)
        self.directories = [ROOT]
        for number in range(1, 7):
            found = attributes(1000 + number, device=ROOT_DEVICE, mode=stat.S_IFDIR | 0o755)
            self.directories.append(self.table.remember(ROOT, b"directory-%d" % number, found))
            self.table.count(self.directories[-1])
        self.source: dict[tuple[int, int], File] = {}
        self.known: dict[int, Known] = {}
        self.gone: set[int] = set()
        self.births = 0
        self.last_name = 0

    def new_name(self) -> tuple[int, bytes]:
        self.last_name += 1
        # Some lie in an inode's row, some need one or more of their own.
        return self.directories[self.last_name % 7], b"name-%d" % self.last_name + b"x" * (self.last_name * 37 % 240)

    def look_up(self, key: tuple[int, int], name: tuple[int, bytes]) -> None:
        file = self.source[key]
        found = attributes(key[1], device=key[0], birth=file.birth, nlink=len(file.names))
        nodeid = self.table.remember(*name, found)
        self.table.count(nodeid)
        assert nodeid > ROOT and nodeid not in self.gone, "a nodeid is used again"
        assert (nodeid == file.nodeid) is (file.nodeid in self.known)
        file.nodeid = nodeid
        known = self.known.setdefault(nodeid, Known(key))
        assert known.file == key, "two files have the same nodeid"
        known.lookups += 1
        known.names.add(name)
        assert self.table.get(nodeid).is_same(found)
        assert self.table.known(*name, found) == nodeid

    def look_up_unless_cached(self, key: tuple[int, int], name: tuple[int, bytes]) -> int:
        """As the kernel does before it changes something about a name; return the nodeid."""
        known = self.known.get(self.source[key].nodeid)
        if known is None or name not in known.names:
            self.look_up(key, name)
        return self.source[key].nodeid

    @rule(key=st.sampled_from(FILES))
    def create(self, key: tuple[int, int]) -> None:
        """A new file; its number may be that of one which is removed and still known."""
        if key in self.source:
            return
        self.births += 1
        name = self.new_name()
        self.source[key] = File(self.births * (1, -1)[self.births % 2], 0, {name})  # before 1970 as well
        self.look_up(key, name)

    @precondition(lambda self: self.source)
    @rule(data=st.data())
    def link(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.source)))
        if len(self.source[key].names) < MOST_NAMES:
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
        nodeid = self.look_up_unless_cached(key, old)
        new = self.new_name()
        self.table.renamed(nodeid, old, new)
        for names in (self.source[key].names, self.known[nodeid].names):
            names.remove(old)
            names.add(new)

    @precondition(lambda self: self.source)
    @rule(data=st.data())
    def unlink(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.source)))
        name = data.draw(st.sampled_from(sorted(self.source[key].names)))
        nodeid = self.look_up_unless_cached(key, name)
        known = self.known[nodeid]
        known.names.remove(name)
        assert self.table.unlinked(nodeid, *name) is bool(known.names)
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
            self.gone.add(nodeid)

    @rule()
    def a_new_front(self) -> None:
        """The front is killed, and the next one finds the table as it is."""
        before = state_of(self.table)
        self.table = new_table(heir_of_table(self.table._table))
        assert state_of(self.table) == before
        assert self.table.finish_takeover(True) == []

    @rule(nodeid=st.sampled_from([0, 2, 77, 1 << 28, _MASK]), count=st.integers(1, 5))
    def forget_what_is_not_known(self, nodeid: int, count: int) -> None:
        assert nodeid not in self.table
        assert self.table.forget(nodeid, count) is False

    @rule(count=st.integers(1, 10))
    def forget_the_root(self, count: int) -> None:
        assert self.table.forget(ROOT, count) is False

    @invariant()
    def as_the_model(self) -> None:
        table = self.table
        assert len(table) == len(self.directories) + len(self.known)
        assert ROOT in table
        for nodeid in self.gone:
            assert nodeid not in table
        for nodeid, known in self.known.items():
            inode = table.get(nodeid)
            assert (inode.device, inode.number, table.lookups(nodeid)) == (*known.file, known.lookups)
            names = table.names(inode)
            assert len(names) == len(set(names)), "a name is kept twice"
            assert set(names) == known.names

    def teardown(self) -> None:
        if not hasattr(self, "table"):
            return
        for nodeid, known in self.known.items():
            assert self.table.forget(nodeid, known.lookups)
        for directory in self.directories[1:]:
            assert self.table.forget(directory, 1)
        used = self.table._table
        assert list(used) == [ROOT] and not any(bytes(used.states[ROOT + 1 : used._used])), "a row is left"
        self.memory.close()


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def table() -> Inodes:
    return new_table(Table(CAPACITY))


def test_the_source_itself_is_the_root(table: Inodes) -> None:
    root = attributes(ROOT_NUMBER, device=ROOT_DEVICE, mode=stat.S_IFDIR | 0o755)
    listing = [(ROOT_NUMBER, 4, b"."), (7, 8, b"file")]
    assert table.with_shown_numbers(ROOT_DEVICE, listing) == listing
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
    shown = {table.shown(device, 100) for device in devices}
    assert len(shown) == 3 and table.shown(ROOT_DEVICE, 100) == 100
    assert table.with_shown_numbers(OTHER_DEVICE, [(100, 8, b"file")]) == [(table.shown(OTHER_DEVICE, 100), 8, b"file")]


def test_what_the_kernel_does_not_know_is_stale(table: Inodes) -> None:
    assert 5 not in table
    with fails(errno.ESTALE):
        table.get(5)


def test_a_directory_has_one_name(table: Inodes) -> None:
    """Its links are its subdirectories, and a second place means that it was moved behind the mount's back."""
    directory = attributes(300, nlink=5, mode=stat.S_IFDIR | 0o755)
    nodeid = table.remember(ROOT, b"old", directory)
    assert table.remember(ROOT, b"new", directory) == nodeid
    assert table.names(table.get(nodeid)) == [(ROOT, b"new")]


def test_a_number_given_to_another_file_is_another_inode(table: Inodes) -> None:
    first, second = attributes(100, birth=1), attributes(100, birth=2)
    old = table.remember(ROOT, b"a", first)
    table.count(old)
    table.set_stamp(old, 5)
    new = table.remember(ROOT, b"a", second)
    assert new != old and table.stamp(new) == 0
    assert table.get(new).is_same(second) and not table.get(old).is_same(second)
    assert table.known(ROOT, b"a", second) == new
    # The old one goes as it would have gone.
    assert table.forget(old, 1) and table.known(ROOT, b"a", second) == new


def test_what_was_read_of_a_row_is_not_used_when_it_has_changed(table: Inodes) -> None:
    nodeid = table.remember(ROOT, b"a", attributes(100))
    assert table.get(nodeid).name == b"a"
    table.renamed(nodeid, (ROOT, b"a"), (ROOT, b"b"))
    assert table.get(nodeid).name == b"b"
    table.remember(ROOT, b"c", attributes(100))
    assert table.get(nodeid).name == b"c"
    table.unlinked(nodeid, ROOT, b"c")
    assert table.get(nodeid).parent == 0
    table.forget(nodeid, 1)
    with fails(errno.ESTALE):
        table.get(nodeid)


def test_a_file_made_without_a_name_gets_one(table: Inodes) -> None:
    nodeid = table.remember(0, b"", attributes(100, nlink=0))
    assert table.remember(ROOT, b"named", attributes(100)) == nodeid
    assert (table.get(nodeid).parent, table.get(nodeid).name) == (ROOT, b"named")
    assert table.names(table.get(nodeid)) == [(ROOT, b"named")]
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


# Mounts below the source: the root's is 50

DIRECTORY = stat.S_IFDIR | 0o755


def on_mount(mount: int, ino: int, mode: int = DIRECTORY, **more: int) -> Attributes:
    return attributes(ino, device=ROOT_DEVICE, mode=mode, **more)._replace(mount=mount)  # type: ignore[arg-type]


@pytest.fixture
def mounts() -> tuple[Inodes, Table]:
    table = Table(CAPACITY)
    return Inodes(on_mount(50, ROOT_NUMBER), table), table


def test_a_directory_is_another_inode_by_each_mount(mounts: tuple[Inodes, Table]) -> None:
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


def test_a_file_is_one_inode_by_all_mounts_that_allow_the_same(mounts: tuple[Inodes, Table]) -> None:
    table, _ = mounts
    table.is_alike = lambda directory, name: name != b"read-only"
    directories = [table.remember(ROOT, b"d%d" % mount, on_mount(mount, 100)) for mount in (50, 51)]
    files = {
        table.remember(directory, b"file", on_mount(mount, 200, stat.S_IFREG))
        for directory, mount in zip(directories, (50, 51), strict=True)
    }
    (file,) = files
    names = table.names(table.get(file))
    assert set(names) == {(directory, b"file") for directory in directories}, "one link, but a name on each mount"
    assert table.remember(ROOT, b"read-only", on_mount(52, 200, stat.S_IFREG)) != file
    assert table.known(ROOT, b"read-only", on_mount(52, 200, stat.S_IFREG)) not in (file, None)


def test_names_in_other_directories_stay_when_a_directory_is_forgotten(mounts: tuple[Inodes, Table]) -> None:
    """The kernel still has the name on the first mount when it looks up the directory on the second one again."""
    table, _ = mounts
    file = on_mount(50, 200, stat.S_IFREG)
    one, two = (table.remember(ROOT, b"d%d" % mount, on_mount(mount, 100)) for mount in (50, 51))
    nodeid = table.remember(one, b"file", file)
    assert table.remember(two, b"file", file._replace(mount=51)) == nodeid
    for _ in range(2 * MOST_NAMES):
        assert table.forget(two, 1)
        two = table.remember(ROOT, b"d51", on_mount(51, 100))
        table.remember(two, b"file", file._replace(mount=51))
        assert table.has_name(nodeid, one, b"file")
    assert table.names(table.get(nodeid)) == [(two, b"file"), (one, b"file")]


def test_a_mount_that_comes_to_forbid_more_is_noticed(
    mounts: tuple[Inodes, Table], monkeypatch: pytest.MonkeyPatch
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


def test_mounts_are_known_to_the_next_front(mounts: tuple[Inodes, Table]) -> None:
    table, memory = mounts
    table.is_alike = lambda directory, name: False
    found = [
        (b"one", on_mount(50, 100)),
        (b"two", on_mount(2**63 + 5, 100)),
        (b"file", on_mount(53, 100, stat.S_IFREG)),
    ]
    known = [table.remember(ROOT, name, one) for name, one in found]
    successor = Inodes(on_mount(50, ROOT_NUMBER), heir_of_table(memory))
    successor.is_alike = table.is_alike
    assert [successor.remember(ROOT, name, one) for name, one in found] == known
    assert len(set(known)) == 3
    for nodeid in known:
        assert successor.forget(nodeid, 1)
