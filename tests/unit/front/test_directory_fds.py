"""Access to inodes on a real directory: with few descriptors, and never to another file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llloop.front.descriptor_shares import Shares
from llloop.front.directory_fds import DirectoryFds
from llloop.front.inodes import ROOT, Inodes
from llloop.front.pins import Pins
from llloop.linux.syscalls import Attributes, fstatx, statx
from llloop.shared.journal import Journal
from llloop.shared.leadership import Leadership
from llloop.shared.table import Table
from tests.expect import fails
from tests.unit.support import ClosedAtOnce, close_journal, open_descriptors

CAPACITY = 4


class Place:
    """A source with an inode table and directory descriptors."""

    def __init__(self, path: Path, capacity: int = CAPACITY) -> None:
        self.path = path
        self.root = os.open(path, os.O_PATH | os.O_DIRECTORY)
        self.journal, self.table = Journal(1 << 10), Table(1 << 12)
        self.inodes = Inodes(fstatx(self.root), self.table)
        leadership, closing = Leadership(), ClosedAtOnce()
        self.pins = Pins(self.inodes, Shares(1000), leadership, closing)
        self.directory_fds = DirectoryFds(self.inodes, self.root, capacity, self.pins, leadership, closing)

    def look_up(self, parent: int, name: str) -> int:
        found = statx(self.directory_fds.directory(parent), name.encode())
        return self.inodes.remember(parent, name.encode(), found)

    def look_up_path(self, path: str) -> int:
        nodeid = ROOT
        for name in path.split("/"):
            nodeid = self.look_up(nodeid, name)
        return nodeid

    def is_at(self, fd: int, path: str) -> bool:
        return os.path.samestat(os.fstat(fd), os.lstat(self.path / path))

    def close(self) -> None:
        self.directory_fds.shrink()
        for nodeid in list(self.pins):
            self.directory_fds.drop(nodeid)
        os.close(self.root)
        close_journal(self.journal)
        self.table.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    own = Place(tmp_path)
    yield own
    own.close()


@pytest.fixture
def many(place: Place) -> list[int]:
    """Twenty directories, each with a file, all known."""
    found = []
    for number in range(20):
        (place.path / f"dir-{number}").mkdir()
        (place.path / f"dir-{number}" / "file").write_text(str(number))
        found.append(place.look_up(ROOT, f"dir-{number}"))
    return found


def test_root_is_always_reachable(place: Place) -> None:
    assert place.directory_fds.directory(ROOT) == place.root
    assert place.directory_fds.held(ROOT) == place.root


def test_directory_is_opened_once(place: Place, many: list[int]) -> None:
    fd = place.directory_fds.directory(many[3])
    assert place.is_at(fd, "dir-3")
    assert place.directory_fds.directory(many[3]) == fd
    assert place.directory_fds.held(many[3]) == fd


def test_descriptors_are_o_path_and_close_on_exec(place: Place, many: list[int]) -> None:
    fd = place.directory_fds.directory(many[0])
    assert not os.get_inheritable(fd)
    with fails(errno.EBADF):
        os.listdir(fd)


def test_number_of_open_directories_is_limited(place: Place, many: list[int]) -> None:
    before = open_descriptors()
    for number, nodeid in enumerate(many * 3):
        assert place.is_at(place.directory_fds.directory(nodeid), f"dir-{number % 20}")
        assert open_descriptors() <= before + CAPACITY + 1
    place.directory_fds.shrink()
    assert open_descriptors() == before


def test_least_recently_used_directory_is_closed(place: Place, many: list[int]) -> None:
    kept = place.directory_fds.directory(many[0])
    for nodeid in many[1:]:
        place.directory_fds.directory(nodeid)
        assert place.directory_fds.directory(many[0]) == kept
    assert place.directory_fds.held(many[1]) is None


def test_descriptor_is_valid_after_the_next_call(place: Place, many: list[int]) -> None:
    """A rename needs two at the same time."""
    for first in many:
        for second in many[:3]:
            one = place.directory_fds.directory(first)
            place.directory_fds.directory(second)
            os.fstat(one)


@pytest.mark.parametrize("capacity", [0, 1, 2])
def test_two_directories_work_with_minimum_capacity(tmp_path: Path, capacity: int) -> None:
    place = Place(tmp_path, capacity)
    os.makedirs(tmp_path / "a/b/c/d")
    os.makedirs(tmp_path / "e/f/g/h")
    deep, other = place.look_up_path("a/b/c/d"), place.look_up_path("e/f/g/h")
    for _ in range(3):
        one, two = place.directory_fds.directory(deep), place.directory_fds.directory(other)
        assert place.is_at(one, "a/b/c/d") and place.is_at(two, "e/f/g/h")
    place.close()


def test_path_deeper_than_the_capacity(place: Place) -> None:
    """2,000 components: more than PATH_MAX, than Python's recursion limit, and than the capacity."""
    levels = 2000
    fd, nodeid, nodeids = os.dup(place.root), ROOT, []
    before = open_descriptors()
    try:
        for _ in range(levels):
            os.mkdir("d", dir_fd=fd)
            below = os.open("d", os.O_PATH, dir_fd=fd)
            os.close(fd)
            fd = below
            nodeid = place.inodes.remember(nodeid, b"d", fstatx(fd))
            nodeids.append(nodeid)
        deepest = place.directory_fds.directory(nodeid)
        assert os.path.samestat(os.fstat(deepest), os.fstat(fd))
        place.directory_fds.shrink()
        assert place.directory_fds.attributes(nodeid).ino == os.fstat(fd).st_ino
        for name in ("one", "two"):
            (place.path / name).mkdir()
            place.directory_fds.directory(place.look_up(ROOT, name))
        assert open_descriptors() <= before + CAPACITY + 2, "the way down stays open only until another is opened"
    finally:
        os.close(fd)
        remove_chain(place.root, levels)


def remove_chain(root: int, levels: int) -> None:
    """Too deep for shutil.rmtree, and for any single path: one level at a time is moved to the top."""
    for _ in range(levels):
        try:
            os.rename("d/d", "next", src_dir_fd=root, dst_dir_fd=root)
        except FileNotFoundError:
            os.rmdir("d", dir_fd=root)
            return
        os.rmdir("d", dir_fd=root)
        os.rename("next", "d", src_dir_fd=root, dst_dir_fd=root)


def test_unknown_inode_gives_estale(place: Place) -> None:
    with fails(errno.ESTALE):
        place.directory_fds.directory(4711)
    with fails(errno.ESTALE):
        place.directory_fds.attributes(4711)


def test_replaced_directory_gives_estale(place: Place, many: list[int]) -> None:
    (place.path / "dir-0").rename(place.path / "away")
    (place.path / "dir-0").mkdir()
    before = open_descriptors()
    with fails(errno.ESTALE):
        place.directory_fds.directory(many[0])
    with fails(errno.ESTALE):
        place.directory_fds.attributes(many[0])
    with fails(errno.ESTALE):
        place.directory_fds.open(many[0], os.O_RDONLY)
    assert open_descriptors() == before


def test_directory_replaced_by_a_symlink_gives_estale(place: Place, many: list[int], tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    """Even if the symlink leads to the directory: symlinks are never followed."""
    (place.path / "dir-0").rename(place.path / "away")
    (place.path / "dir-0").symlink_to("away")
    with fails(errno.ESTALE):
        place.directory_fds.directory(many[0])


@pytest.mark.parametrize("replacement", ["file", "symlink", "directory", "nothing"])
def test_replaced_file_gives_estale(place: Place, replacement: str) -> None:
    path = place.path / "file"
    path.write_text("old")
    nodeid = place.look_up(ROOT, "file")
    path.rename(place.path / "old")
    if replacement == "file":
        path.write_text("new")
    elif replacement == "symlink":
        path.symlink_to("old")
    elif replacement == "directory":
        path.mkdir()
    before = open_descriptors()
    for action in (
        lambda: place.directory_fds.attributes(nodeid),
        lambda: place.directory_fds.open(nodeid, os.O_RDONLY | os.O_NOFOLLOW),
        lambda: place.directory_fds.reach(nodeid).__enter__(),
    ):
        with fails(errno.ESTALE):
            action()
    assert open_descriptors() == before


def test_reused_inode_number_gives_estale(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the birth time differs; this test changes it in the table."""
    (place.path / "file").write_text("old")
    found = statx(place.root, b"file")
    nodeid = place.inodes.remember(ROOT, b"file", found._replace(btime=found.btime - 1))
    with fails(errno.ESTALE):
        place.directory_fds.attributes(nodeid)
    with fails(errno.ESTALE):
        place.directory_fds.open(nodeid, os.O_RDONLY)


def test_each_name_of_a_hard_link_works(place: Place) -> None:
    (place.path / "sub").mkdir()
    sub = place.look_up(ROOT, "sub")
    names = ["a", "b", "sub/c"]
    (place.path / "a").write_text("content")
    for name in names[1:]:
        (place.path / name).hardlink_to(place.path / "a")
    nodeid = place.look_up(ROOT, "a")
    assert place.look_up(ROOT, "b") == place.look_up(sub, "c") == nodeid
    assert set(place.directory_fds.places(nodeid)) == {(ROOT, b"a"), (ROOT, b"b"), (sub, b"c")}
    for name in ("a", "sub/c"):
        (place.path / name).unlink()
        fd, attributes = place.directory_fds.open(nodeid, os.O_RDONLY)
        assert os.read(fd, 10) == b"content"
        assert attributes.ino == place.directory_fds.attributes(nodeid).ino
        os.close(fd)
    (place.path / "b").unlink()
    with fails(errno.ESTALE):
        place.directory_fds.attributes(nodeid)


def test_other_errors_do_not_become_estale(place: Place) -> None:
    (place.path / "socket").write_text("")
    nodeid = place.look_up(ROOT, "socket")
    with fails(errno.ENOTDIR, errno.ESTALE):
        place.directory_fds.open(nodeid, os.O_RDONLY | os.O_DIRECTORY)
    fifo = place.path / "fifo"
    os.mkfifo(fifo)
    nodeid = place.look_up(ROOT, "fifo")
    with fails(errno.ENXIO):
        place.directory_fds.open(nodeid, os.O_WRONLY | os.O_NONBLOCK)


def test_open_leaks_no_descriptor(place: Place, many: list[int]) -> None:
    file = place.look_up(many[0], "file")
    before = open_descriptors()
    with place.directory_fds.reach(file) as reached:
        assert place.is_at(reached.fd, "dir-0/file")
    assert open_descriptors() == before
    with place.directory_fds.reach(many[0]) as reached:
        assert reached.fd == place.directory_fds.held(many[0])
    assert open_descriptors() == before


def test_symlink_is_not_followed(place: Place) -> None:
    (place.path / "link").symlink_to("/etc/passwd")
    nodeid = place.look_up(ROOT, "link")
    with place.directory_fds.reach(nodeid) as reached:
        assert os.readlink(b"", dir_fd=reached.fd) == b"/etc/passwd"
    with fails(errno.ESTALE, errno.ELOOP):
        place.directory_fds.open(nodeid, os.O_RDONLY | os.O_NOFOLLOW)


def pin(place: Place, name: str) -> tuple[int, Attributes]:
    nodeid = place.look_up(ROOT, name)
    fd = os.open(place.path / name, os.O_PATH | os.O_NOFOLLOW)
    (place.path / name).unlink()
    place.pins.add(nodeid, fd, 0)
    return nodeid, fstatx(fd)


def test_pinned_file_stays_reachable(place: Place) -> None:
    (place.path / "file").write_text("content")
    nodeid, attributes = pin(place, "file")
    (place.path / "file").write_text("another")
    assert place.directory_fds.attributes(nodeid) == attributes
    assert attributes.nlink == 0
    fd, _ = place.directory_fds.open(nodeid, os.O_RDONLY | os.O_NOFOLLOW)
    assert os.read(fd, 10) == b"content"
    os.close(fd)
    with place.directory_fds.reach(nodeid) as held:
        assert fstatx(held.fd).ino == attributes.ino


def test_pin_is_dropped_with_the_inode(place: Place) -> None:
    before = open_descriptors()
    (place.path / "file").write_text("content")
    nodeid, _ = pin(place, "file")
    place.pins.add(nodeid, os.dup(place.directory_fds.held(nodeid) or -1), 0)
    assert open_descriptors() == before + 1, "the first pin was left open"
    place.directory_fds.drop(nodeid)
    place.directory_fds.drop(nodeid)
    assert open_descriptors() == before
    with fails(errno.ESTALE):
        place.directory_fds.attributes(nodeid)


def test_unused_pins_are_released(place: Place) -> None:
    for name in ("a", "b"):
        (place.path / name).write_text(name)
    first, _ = pin(place, "a")
    second, _ = pin(place, "b")
    assert place.pins.release_unused({first})
    assert place.directory_fds.held(first) is not None
    assert place.directory_fds.held(second) is None
    assert not place.pins.release_unused({first})


def test_attributes_of_a_pinned_directory(place: Place, many: list[int]) -> None:
    path = place.path / "dir-0"
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    (path / "file").unlink()
    path.rmdir()
    place.pins.add(many[0], fd, 0)
    with fails(errno.ENOENT):
        statx(place.directory_fds.directory(many[0]), b"file")


def test_directory_with_reused_number_is_dropped(place: Place, many: list[int]) -> None:
    held = place.directory_fds.directory(many[0])
    attributes = statx(place.root, b"dir-0")
    new = place.inodes.remember(ROOT, b"dir-0", attributes._replace(btime=attributes.btime + 1))
    assert new not in many
    assert place.directory_fds.held(new) is None
    assert place.directory_fds.directory(many[0]) == held
