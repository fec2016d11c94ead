"""Changes in the source are visible in the mount: immediately with --cache never, after 1 second by default."""

import itertools
import os
import random
import shutil
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import expect
from tests.conftest import Serve
from tests.expect import outcome
from tests.server import Server, Tree
from tests.syscalls import opened
from tests.watchdog import Watchdog

# `auto` with shorter timeouts than 1 s, because nearly every test waits for them.
SHORT_SECONDS = 0.2
AUTO = ["--cache", "auto"]
for _option in ("--attr-timeout", "--entry-timeout", "--negative-timeout"):
    AUTO += [_option, str(SHORT_SECONDS)]

# On a busy machine, so much time may pass between the server's look at the source and the kernel's note of it.
SLACK = 0.4

OLD, NEW = b"old content", b"NEW CONTENT"
assert len(OLD) == len(NEW)

_numbers = itertools.count(1)


@dataclass(frozen=True)
class View:
    """One mount for all tests with the same --cache."""

    src: Path
    mnt: Path
    seconds: float

    def settle(self) -> None:
        time.sleep(self.seconds)


@pytest.fixture(scope="module", params=["never", "auto"])
def patient(request: pytest.FixtureRequest, via: str, serve_options: list[str], watchdog: Watchdog) -> Iterator[Server]:
    """One mount for all tests with the same --cache."""
    options = AUTO if request.param == "auto" else ["--cache", request.param]
    server = Server.prepare(via, watchdog, [*serve_options, *options])
    try:
        server.start()
        yield server
        server.stop()
    finally:
        server.clean_up()
        server.forget_files()


@pytest.fixture
def view(patient: Server) -> Iterator[View]:
    if not patient.alive():
        # Another test ended it and failed because of that. This test must not fail, too.
        patient.clean_up()
        patient.start()
    name = f"{next(_numbers)}"
    (patient.source / name).mkdir()
    # A little more than the timeout, because of the clock's granularity.
    seconds = SHORT_SECONDS + 0.05 if "auto" in patient.arguments else 0.0
    yield View(patient.source / name, patient.mountpoint / name, seconds)
    assert patient.alive(), f"the server ended during the test\n{patient.all_output()}"
    patient.check_log()


def overwrite(path: Path, content: bytes, offset: int = 0) -> None:
    """In place: the same inode, and no truncation on the way."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, content, offset)
    finally:
        os.close(fd)


@pytest.mark.own_loop  # llfuse keeps the page cache at every open, and an invalidation may come a moment late
def test_overwrite_of_same_size_is_seen(view: View) -> None:
    (view.src / "file").write_bytes(OLD)
    assert (view.mnt / "file").read_bytes() == OLD
    overwrite(view.src / "file", NEW)
    view.settle()
    assert (view.mnt / "file").read_bytes() == NEW


def test_overwrite_of_a_middle_page_is_seen(view: View) -> None:
    (view.src / "file").write_bytes(b"o" * 3_000_000)
    assert (view.mnt / "file").read_bytes() == b"o" * 3_000_000
    overwrite(view.src / "file", b"new", 1_999_999)
    view.settle()
    content = (view.mnt / "file").read_bytes()
    assert content == b"o" * 1_999_999 + b"new" + b"o" * 999_998


@pytest.mark.own_loop
def test_overwrite_with_restored_mtime_is_seen(view: View) -> None:
    """rsync, tar and touch -r set mtime back; ctime tells all the same.

    llfuse has the kernel keep its pages at every open, and the kernel goes by size and mtime alone.
    """
    path = view.src / "file"
    path.write_bytes(OLD)
    assert (view.mnt / "file").read_bytes() == OLD
    before = path.stat()
    overwrite(path, NEW)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    view.settle()
    assert (view.mnt / "file").read_bytes() == NEW


@pytest.mark.own_loop  # llfuse keeps the page cache at every open, and an invalidation may come a moment late
def test_overwrite_is_seen_by_new_open_beside_old_one(view: View) -> None:
    (view.src / "file").write_bytes(OLD)
    with open(view.mnt / "file", "rb", buffering=0) as lasting:
        assert lasting.read() == OLD
        overwrite(view.src / "file", NEW)
        view.settle()
        assert (view.mnt / "file").read_bytes() == NEW
        lasting.seek(0)
        assert lasting.read() == NEW


def test_data_is_never_older_than_attributes(view: View) -> None:
    """A program that sees the new time in fstat(2) must not read old bytes, whatever the timeout."""
    (view.src / "file").write_bytes(OLD)
    assert (view.mnt / "file").read_bytes() == OLD
    time.sleep(0.02)
    overwrite(view.src / "file", NEW)
    expected = (view.src / "file").stat().st_mtime_ns
    for _ in range(3):
        fd = os.open(view.mnt / "file", os.O_RDONLY)
        try:
            if os.fstat(fd).st_mtime_ns == expected:
                assert os.read(fd, 100) == NEW
        finally:
            os.close(fd)


@pytest.mark.own_loop  # llfuse keeps the page cache at every open, and an invalidation may come a moment late
@pytest.mark.parametrize("patient", ["never"], indirect=True)
def test_overwrites_within_one_clock_tick_are_seen(view: View) -> None:
    """The size stays the same, and on an old kernel the times do, too."""
    (view.src / "file").write_bytes(b"%08d" % 0)
    for number in range(500):
        content = b"%08d" % number
        overwrite(view.src / "file", content)
        assert (view.mnt / "file").read_bytes() == content


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
def test_truncation_is_seen(view: View) -> None:
    (view.src / "file").write_bytes(b"x" * 100_000)
    assert len((view.mnt / "file").read_bytes()) == 100_000
    os.truncate(view.src / "file", 5_000)
    view.settle()
    assert (view.mnt / "file").stat().st_size == 5_000
    assert (view.mnt / "file").read_bytes() == b"x" * 5_000


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
def test_growth_is_seen(view: View) -> None:
    (view.src / "file").write_bytes(b"x" * 5_000)
    assert len((view.mnt / "file").read_bytes()) == 5_000
    with open(view.src / "file", "ab") as file:
        file.write(b"y" * 95_000)
    view.settle()
    assert (view.mnt / "file").stat().st_size == 100_000
    assert (view.mnt / "file").read_bytes() == b"x" * 5_000 + b"y" * 95_000


def test_truncation_then_growth_leaves_zeros(view: View) -> None:
    (view.src / "file").write_bytes(b"secret" * 2000)
    assert (view.mnt / "file").read_bytes() == b"secret" * 2000
    os.truncate(view.src / "file", 0)
    os.truncate(view.src / "file", 12_000)
    view.settle()
    assert (view.mnt / "file").read_bytes() == bytes(12_000)


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
def test_tail_follows_a_growing_file(view: View) -> None:
    """One descriptor, and a file that grows in the source only."""
    (view.src / "log").write_bytes(b"")
    with open(view.mnt / "log", "rb", buffering=0) as reader:
        followed = b""
        for number in range(3):
            with open(view.src / "log", "ab") as writer:
                writer.write(b"line %d\n" % number)
            view.settle()
            followed += reader.read()
    assert followed == b"line 0\nline 1\nline 2\n"


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
def test_append_does_not_overwrite_appends_in_the_source(view: View) -> None:
    """O_APPEND means the current end of the file, not the end that the kernel remembers."""
    (view.src / "log").write_bytes(b"one\n")
    fd = os.open(view.mnt / "log", os.O_WRONLY | os.O_APPEND)
    try:
        assert os.fstat(fd).st_size == 4
        with open(view.src / "log", "ab") as other:
            other.write(b"two\n")
        os.write(fd, b"three\n")
        with open(view.src / "log", "ab") as other:
            other.write(b"four\n")
        os.write(fd, b"five\n")
    finally:
        os.close(fd)
    assert (view.src / "log").read_bytes() == b"one\ntwo\nthree\nfour\nfive\n"
    view.settle()
    assert (view.mnt / "log").read_bytes() == b"one\ntwo\nthree\nfour\nfive\n"


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
def test_changed_attributes_are_seen(view: View) -> None:
    path = view.src / "file"
    path.write_bytes(b"")
    (view.mnt / "file").stat()
    path.chmod(0o640)
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    os.link(path, view.src / "second")
    if os.geteuid() == 0:
        os.chown(path, 4001, 4002)
    view.settle()
    expected, found = path.stat(), (view.mnt / "file").stat()
    for field in ("st_mode", "st_uid", "st_gid", "st_nlink", "st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_ino"):
        assert getattr(found, field) == getattr(expected, field), field


def test_changed_xattrs_are_seen(view: View) -> None:
    os.mknod(view.src / "file")
    os.setxattr(view.src / "file", "user.key", b"old")
    assert os.getxattr(view.mnt / "file", "user.key") == b"old"
    os.setxattr(view.src / "file", "user.key", b"new and longer")
    os.setxattr(view.src / "file", "user.second", b"")
    view.settle()
    assert os.getxattr(view.mnt / "file", "user.key") == b"new and longer"
    assert set(os.listxattr(view.mnt / "file")) >= {"user.key", "user.second"}


def test_deletion_is_seen_and_open_file_survives(view: View) -> None:
    (view.src / "file").write_bytes(OLD)
    with open(view.mnt / "file", "r+b", buffering=0) as file:
        (view.src / "file").unlink()
        view.settle()
        assert outcome((view.mnt / "file").stat) == "ENOENT"
        assert outcome((view.mnt / "file").read_bytes) == "ENOENT"
        assert os.listdir(view.mnt) == []
        assert file.read() == OLD
        file.write(b" goes on")
        assert os.pread(file.fileno(), 100, 0) == OLD + b" goes on"
        assert os.fstat(file.fileno()).st_nlink == 0


def test_new_file_is_seen_after_negative_lookup(view: View) -> None:
    assert outcome((view.mnt / "file").stat) == "ENOENT"
    assert os.listdir(view.mnt) == []
    (view.src / "file").write_bytes(NEW)
    view.settle()
    assert (view.mnt / "file").read_bytes() == NEW
    assert os.listdir(view.mnt) == ["file"]


def test_o_excl_finds_a_file_created_in_the_source(view: View) -> None:
    """Even within the negative timeout, two programs must not both create the same lock file."""
    assert outcome((view.mnt / "lock").stat) == "ENOENT"
    (view.src / "lock").write_bytes(b"theirs")
    assert outcome(lambda: os.open(view.mnt / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY)) == "EEXIST"
    assert outcome(lambda: os.mkdir(view.mnt / "lock")) == "EEXIST"
    assert (view.src / "lock").read_bytes() == b"theirs"


def test_o_creat_opens_a_file_created_in_the_source(view: View) -> None:
    assert outcome((view.mnt / "file").stat) == "ENOENT"
    (view.src / "file").write_bytes(b"theirs")
    with open(view.mnt / "file", "ab") as file:
        file.write(b" and ours")
    assert (view.src / "file").read_bytes() == b"theirs and ours"


def test_rename_is_seen(view: View) -> None:
    (view.src / "before").write_bytes(OLD)
    (view.mnt / "before").read_bytes()
    assert outcome((view.mnt / "after").stat) == "ENOENT"
    os.rename(view.src / "before", view.src / "after")
    view.settle()
    assert outcome((view.mnt / "before").stat) == "ENOENT"
    assert (view.mnt / "after").read_bytes() == OLD
    assert os.listdir(view.mnt) == ["after"]


def test_rename_over_a_file_is_seen(view: View) -> None:
    """Editors and package managers write like this: a new inode with the same name and size."""
    for content in (b"version 1", b"version 2", b"version 3"):
        (view.src / "new").write_bytes(content)
        os.rename(view.src / "new", view.src / "file")
        view.settle()
        assert (view.mnt / "file").read_bytes() == content
        assert (view.mnt / "file").stat().st_ino == (view.src / "file").stat().st_ino


def test_open_file_survives_rename_in_the_source(view: View) -> None:
    (view.src / "before").write_bytes(OLD)
    with open(view.mnt / "before", "r+b", buffering=0) as file:
        os.rename(view.src / "before", view.src / "after")
        (view.src / "before").write_bytes(b"another")
        file.write(NEW)
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o600)
        os.ftruncate(file.fileno(), 3)
        assert os.fstat(file.fileno()).st_size == 3
    assert (view.src / "after").read_bytes() == NEW[:3]
    assert (view.src / "before").read_bytes() == b"another"
    assert stat.S_IMODE((view.src / "after").stat().st_mode) == 0o600
    assert stat.S_IMODE((view.src / "before").stat().st_mode) == 0o644


def test_swapped_files_are_not_mixed_up(view: View) -> None:
    """Within the timeout either answer is right, but name, inode number and data must belong together."""
    (view.src / "a").write_bytes(b"content of a")
    (view.src / "b").write_bytes(b"content of b")
    contents = {(view.src / name).stat().st_ino: (view.src / name).read_bytes() for name in "ab"}
    for name in "ab":
        (view.mnt / name).read_bytes()
    for _ in range(20):
        os.rename(view.src / "a", view.src / "spare")
        os.rename(view.src / "b", view.src / "a")
        os.rename(view.src / "spare", view.src / "b")
        for name in "ab":
            fd = os.open(view.mnt / name, os.O_RDONLY)
            try:
                assert os.read(fd, 100) == contents[os.fstat(fd).st_ino]
            finally:
                os.close(fd)
    view.settle()
    for name in "ab":
        assert (view.mnt / name).read_bytes() == (view.src / name).read_bytes()


def test_renamed_directory_is_seen_with_its_content(view: View) -> None:
    (view.src / "before" / "deep").mkdir(parents=True)
    (view.src / "before" / "deep" / "file").write_bytes(OLD)
    assert (view.mnt / "before" / "deep" / "file").read_bytes() == OLD
    os.rename(view.src / "before", view.src / "after")
    view.settle()
    assert outcome((view.mnt / "before" / "deep" / "file").read_bytes) == "ENOENT"
    assert (view.mnt / "after" / "deep" / "file").read_bytes() == OLD


def test_replaced_directory_is_seen(view: View) -> None:
    (view.src / "directory").mkdir()
    (view.src / "directory" / "file").write_bytes(OLD)
    (view.src / "directory" / "gone").write_bytes(b"")
    assert (view.mnt / "directory" / "file").read_bytes() == OLD
    (view.mnt / "directory" / "gone").stat()
    shutil.rmtree(view.src / "directory")
    (view.src / "directory").mkdir()
    (view.src / "directory" / "file").write_bytes(NEW)
    (view.src / "directory" / "more").write_bytes(b"")
    view.settle()
    assert sorted(os.listdir(view.mnt / "directory")) == ["file", "more"]
    assert (view.mnt / "directory" / "file").read_bytes() == NEW
    assert outcome((view.mnt / "directory" / "gone").stat) == "ENOENT"


def test_write_does_not_reach_a_moved_directory(view: View) -> None:
    (view.src / "release").mkdir()
    (view.src / "release" / "file").write_bytes(b"1")
    (view.mnt / "release" / "file").read_bytes()
    os.rename(view.src / "release", view.src / "backup")
    (view.src / "release").mkdir()
    view.settle()
    (view.mnt / "release" / "new").write_bytes(b"2")
    assert os.listdir(view.src / "release") == ["new"]
    assert os.listdir(view.src / "backup") == ["file"]


def test_working_directory_survives_rename_in_the_source(view: View) -> None:
    (view.src / "before").mkdir()
    fd = os.open(view.mnt / "before", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.rename(view.src / "before", view.src / "after")
        (view.src / "before").mkdir()
        view.settle()
        # The call uses the directory that was opened, or fails. It never uses the new directory of the same name.
        result = outcome(lambda: os.close(os.open("made", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd)))
    finally:
        os.close(fd)
    assert result in (None, "ESTALE", "ENOENT")
    assert os.listdir(view.src / "before") == []
    assert os.listdir(view.src / "after") == (["made"] if result is None else [])


def test_replaced_symlink_is_seen(view: View) -> None:
    (view.src / "one").write_bytes(b"1")
    (view.src / "two").write_bytes(b"2")
    os.symlink("one", view.src / "link")
    assert (os.readlink(view.mnt / "link"), (view.mnt / "link").read_bytes()) == ("one", b"1")
    os.symlink("two", view.src / "new")
    os.rename(view.src / "new", view.src / "link")
    view.settle()
    assert (os.readlink(view.mnt / "link"), (view.mnt / "link").read_bytes()) == ("two", b"2")


KINDS = ("file", "directory", "symlink", "fifo")


def make_thing(path: Path, kind: str, content: bytes) -> None:
    if kind == "file":
        path.write_bytes(content)
    elif kind == "directory":
        path.mkdir()
        (path / "inside").write_bytes(content)
    elif kind == "symlink":
        os.symlink(content, path)
    else:
        os.mkfifo(path)


def look_at_thing(path: Path) -> tuple[int, int, object]:
    found = os.lstat(path)
    content: object = None
    if stat.S_ISREG(found.st_mode):
        content = path.read_bytes()
    elif stat.S_ISDIR(found.st_mode):
        content = (os.listdir(path), (path / "inside").read_bytes())
    elif stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    return stat.S_IFMT(found.st_mode), found.st_ino, content


def test_name_with_a_new_file_type_is_seen(view: View) -> None:
    pairs = [(f"{before} to {after}", before, after) for before in KINDS for after in KINDS]
    for name, before, _ in pairs:
        make_thing(view.src / name, before, OLD)
        look_at_thing(view.mnt / name)
    os.listdir(view.mnt)
    for name, before, after in pairs:
        if before == "directory":
            shutil.rmtree(view.src / name)
        else:
            (view.src / name).unlink()
        make_thing(view.src / name, after, NEW)
    view.settle()
    for name, _, _ in pairs:
        assert look_at_thing(view.mnt / name) == look_at_thing(view.src / name), name


def test_listing_is_up_to_date(view: View) -> None:
    (view.src / "directory").mkdir()
    for number in range(50):
        (view.src / "directory" / f"old{number}").write_bytes(b"")
    for _ in range(2):
        assert len(list(os.scandir(view.mnt / "directory"))) == 50
    for number in range(25):
        (view.src / "directory" / f"old{number}").unlink()
        (view.src / "directory" / f"new{number}").write_bytes(b"x")
    view.settle()
    expected = sorted(os.listdir(view.src / "directory"))
    assert sorted(os.listdir(view.mnt / "directory")) == expected
    # The attributes in a listing must be as fresh as the listing.
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(view.mnt / "directory")}
    assert sizes == {name: (1 if name.startswith("new") else 0) for name in expected}


def test_write_is_in_the_source_when_it_returns(tree: Tree) -> None:
    with open(tree.mnt / "file", "wb", buffering=0) as file:
        for number in range(20):
            file.write(b"%d" % number)
            assert (tree.src / "file").read_bytes().endswith(b"%d" % number)
    os.truncate(tree.mnt / "file", 2)
    assert (tree.src / "file").read_bytes() == b"01"
    os.rename(tree.mnt / "file", tree.mnt / "renamed")
    assert os.listdir(tree.src) == ["renamed"]


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
def test_source_and_mount_write_parts_of_one_page(view: View) -> None:
    """Neither side's bytes may be overwritten from an older copy of the page."""
    (view.src / "file").write_bytes(b"." * 4096)
    (view.mnt / "file").read_bytes()
    choice = random.Random(1)
    expected = bytearray(b"." * 4096)
    with open(view.mnt / "file", "r+b", buffering=0) as file:
        for number in range(200):
            offset = choice.randrange(4080)
            piece = b"%08d" % number
            if number % 2:
                overwrite(view.src / "file", piece, offset)
            else:
                os.pwrite(file.fileno(), piece, offset)
            expected[offset : offset + 8] = piece
    assert (view.src / "file").read_bytes() == expected
    view.settle()
    assert (view.mnt / "file").read_bytes() == expected


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
@pytest.mark.within_a_second
def test_one_second_is_enough_by_default(tree: Tree) -> None:
    for name in ("overwritten", "deleted", "replaced", "shortened", "renamed"):
        (tree.src / name).write_bytes(OLD)
        assert (tree.mnt / name).read_bytes() == OLD
    assert outcome((tree.mnt / "made").stat) == "ENOENT"
    overwrite(tree.src / "overwritten", NEW)
    (tree.src / "deleted").unlink()
    (tree.src / "made").write_bytes(NEW)
    os.rename(tree.src / "made", tree.src / "replaced")
    (tree.src / "made").write_bytes(NEW)
    os.truncate(tree.src / "shortened", 3)
    os.rename(tree.src / "renamed", tree.src / "moved")
    time.sleep(1.05)
    found = {name: (tree.mnt / name).read_bytes() for name in os.listdir(tree.mnt)}
    assert found == {"overwritten": NEW, "made": NEW, "replaced": NEW, "shortened": OLD[:3], "moved": OLD}
    for name in ("deleted", "renamed"):
        assert outcome((tree.mnt / name).stat) == "ENOENT"


@pytest.mark.mounted
def test_timeouts_are_respected(serve: Serve) -> None:
    """Long timeouts keep old values: this shows that the kernel caches at all."""
    server = serve("--attr-timeout", "30", "--entry-timeout", "30", "--negative-timeout", "30")

    def seen(directory: Path) -> list[int | str]:
        return [outcome(lambda name=name: (directory / name).stat().st_size) for name in ("file", "gone", "missing")]

    # Try more than once, because the kernel may drop its caches at any time if memory is short.
    for intent in range(5):
        src, mnt = server.source / f"{intent}", server.mountpoint / f"{intent}"
        src.mkdir()
        (src / "file").write_bytes(b"12345")
        (src / "gone").write_bytes(b"")
        assert seen(mnt) == [5, 0, "ENOENT"]
        (src / "missing").write_bytes(b"")
        (src / "gone").unlink()
        (src / "file").write_bytes(b"123456789")
        time.sleep(1.2)
        found = seen(mnt)
        if found == [5, 0, "ENOENT"]:
            break
    assert found == [5, 0, "ENOENT"]


@pytest.mark.timeout(90)
def test_reads_are_not_older_than_the_timeout(view: View) -> None:
    """Another process changes eight files. Each read must return data that was current within the timeout."""
    names = [f"file{number}" for number in range(8)]
    ended: dict[bytes, float] = {}
    current: dict[str, bytes] = {}
    lock = threading.Lock()
    stop = threading.Event()
    problems: list[str] = []

    def change() -> None:
        choice = random.Random(7)
        serial = 0
        while not stop.is_set():
            name = choice.choice(names)
            serial += 1
            content = b"%s %08d" % (name.encode(), serial)
            path = view.src / name
            how = choice.randrange(4)
            with lock:
                # Hold the lock during the change, so that each content ends at one known moment.
                if how == 0 and path.exists():
                    overwrite(path, content)
                elif how == 1:
                    path.unlink(missing_ok=True)
                    path.write_bytes(content)
                elif how == 2:
                    (view.src / "new").write_bytes(content)
                    os.rename(view.src / "new", path)
                else:
                    path.write_bytes(content)
                if name in current:
                    ended[current[name]] = time.monotonic()
                current[name] = content
            time.sleep(0.001)

    for name in names:
        (view.src / name).write_bytes(b"%s %08d" % (name.encode(), 0))
        current[name] = b"%s %08d" % (name.encode(), 0)
    changer = threading.Thread(target=change)
    changer.start()
    reads = 0
    try:
        until = time.monotonic() + (1.5 if view.seconds == 0 else 3)
        choice = random.Random(8)
        while time.monotonic() < until:
            name = choice.choice(names)
            began = time.monotonic()
            content = outcome((view.mnt / name).read_bytes)
            reads += 1
            if content in ("ENOENT", "ESTALE", b""):
                continue  # it was read between unlink and creation, or between O_TRUNC and write
            if expect.collecting and not any(content):
                continue  # it was read between O_TRUNC and write: the kernel uses the size that it knows
            with lock:
                if not content.startswith(name.encode()):
                    problems.append(f"{name} gave {content!r}")
                elif content in ended and began - ended[content] > view.seconds + SLACK:
                    problems.append(f"{name} gave {content!r} {began - ended[content]:.3f} s after its end")
    finally:
        stop.set()
        changer.join()
    assert problems == []
    assert reads > 100
    time.sleep(view.seconds + SLACK)
    left = {name: (view.mnt / name).read_bytes() for name in names}
    if expect.collecting:  # with --writeback the kernel also uses a known size of 0
        left = {name: content or current[name] for name, content in left.items()}
    assert left == current


@pytest.mark.mounted
@pytest.mark.timeout(20)
def test_swapped_directories_do_not_cause_a_hang(serve: Serve) -> None:
    """Each directory was seen in the other. Neither is open any more: few stay open with a limit of 160 files."""
    command = ["/bin/sh", "-c", 'ulimit -n 160 && exec "$0" "$@"', sys.executable, "-m", "llloop", "serve"]
    server = serve("--workers", "1", command=command)
    src, mnt = server.source, server.mountpoint
    (src / "outer/inner").mkdir(parents=True)
    with opened(mnt / "outer/inner", os.O_PATH) as inner:
        assert outcome(os.stat, "nothing", dir_fd=inner) == "ENOENT"
        (src / "outer/inner").rename(src / "inner")
        (src / "outer").rename(src / "inner/outer")
        # The kernel itself may refuse to move a directory into one that it believes to be inside.
        assert outcome(os.stat, "outer", dir_fd=inner) == "ELOOP" or (mnt / "inner/outer").is_dir()
        for number in range(40):
            (src / f"other{number}/below").mkdir(parents=True)
            (mnt / f"other{number}/below").stat()
        assert outcome(os.stat, "missing", dir_fd=inner) in ("ENOENT", "ESTALE")
    assert (mnt / "inner").is_dir()


def test_cached_listing_is_dropped_after_a_change(serve: Serve) -> None:
    server = serve("--cache", "always")
    directory = server.source / "directory"
    directory.mkdir()
    shown = server.mountpoint / "directory"
    for number in range(50):
        (directory / f"{number}").touch()
    time.sleep(1.2)  # after this time, the server trusts the time stamp of the directory
    for _ in range(3):
        assert len(os.listdir(shown)) == 50
    (directory / "behind the mount").touch()
    assert len(os.listdir(shown)) == 51
    time.sleep(1.2)
    for _ in range(3):
        assert len(os.listdir(shown)) == 51
    (shown / "through it").touch()
    assert len(os.listdir(shown)) == 52
    (shown / "1").rename(shown / "renamed")
    (directory / "2").unlink()
    assert {"renamed", "2", "1"} & set(os.listdir(shown)) == {"renamed"}
