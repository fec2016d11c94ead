"""One inode number, two files: freed and given to another file in the source, or the same on two devices.

ext4 gives a freed number to the very next file. Whoever goes by the number alone shows one file's bytes under
another's name, or writes them there.
"""

import itertools
import os
import random
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Serve
from tests.expect import outcome
from tests.filesystems import ext4, tmpfs
from tests.server import Server, reachable_directory
from tests.watchdog import Watchdog

pytestmark = pytest.mark.root

OLD, NEW = b"bytes of the old file", b"BYTES OF THE NEW FILE"
assert len(OLD) == len(NEW)

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Place:
    src: Path
    mnt: Path
    seconds: float


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    directory = reachable_directory("llloop-ext4-")
    try:
        # With blocks of 4 KiB there is one block group, so every new inode gets the lowest free number.
        with ext4(directory, 32 << 20, "-b", "4096") as mounted:
            yield mounted
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module", params=["never", "auto"])
def patient(
    request: pytest.FixtureRequest, image: Path, via: str, serve_options: list[str], watchdog: Watchdog
) -> Iterator[Server]:
    server = Server.prepare(via, watchdog, [*serve_options, "--cache", request.param], image)
    try:
        server.start()
        yield server
        server.stop()
    finally:
        server.clean_up()
        server.forget_files()


@pytest.fixture
def place(patient: Server) -> Iterator[Place]:
    if not patient.alive():
        # Another test ended it and failed because of that. This test must not fail, too.
        patient.clean_up()
        patient.start()
    name = f"{next(_numbers)}"
    (patient.source / name).mkdir()
    yield Place(patient.source / name, patient.mountpoint / name, 1.05 if "auto" in patient.arguments else 0.0)
    assert patient.alive(), f"the server ended during the test\n{patient.all_output()}"
    shutil.rmtree(patient.source / name)
    patient.check_log()


def remove(path: Path) -> int:
    number = os.lstat(path).st_ino
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()
    return number


def reuse(old: Path, new: Path, make: Callable[[Path], Any]) -> bool:
    """Removes old and makes new until it has old's number; False if the server holds on to old, which is safe too."""
    number = remove(old)
    # The kernel sends RELEASE after close has returned. Until then the old file exists.
    for _ in range(20):
        make(new)
        if os.lstat(new).st_ino == number:
            return True
        remove(new)
        time.sleep(0.01)
    make(new)
    return False


def with_bytes(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def test_source_reuses_inode_numbers(image: Path) -> None:
    """Without this, the other tests here would prove nothing."""
    directory = image / "proof"
    directory.mkdir()
    for make in (with_bytes(OLD), Path.mkdir, lambda path: os.symlink("x", path)):
        make(directory / "old")
        assert reuse(directory / "old", directory / "new", make)
        remove(directory / "new")
    directory.rmdir()


def test_inode_numbers_are_reused_through_the_mount(place: Place) -> None:
    (place.src / "old").write_bytes(OLD)
    assert (place.mnt / "old").read_bytes() == OLD
    assert reuse(place.src / "old", place.src / "new", with_bytes(NEW)), "something holds a descriptor for each inode"


def test_same_name_and_number_never_show_old_data(place: Place) -> None:
    (place.src / "file").write_bytes(OLD)
    assert (place.mnt / "file").read_bytes() == OLD
    reuse(place.src / "file", place.src / "file", with_bytes(NEW))
    assert outcome((place.mnt / "file").read_bytes) in (NEW, "ESTALE")
    time.sleep(place.seconds)
    assert (place.mnt / "file").read_bytes() == NEW


def test_same_name_and_number_never_show_old_pages(place: Place) -> None:
    """The file is larger than a page, and the new one a little shorter: old pages would show at the end."""
    (place.src / "file").write_bytes(b"o" * 50_000)
    assert (place.mnt / "file").read_bytes() == b"o" * 50_000
    reuse(place.src / "file", place.src / "file", with_bytes(b"n" * 49_000))
    content = outcome((place.mnt / "file").read_bytes)
    assert content == "ESTALE" or b"o" not in content
    time.sleep(place.seconds)
    assert (place.mnt / "file").read_bytes() == b"n" * 49_000


def test_other_name_never_shows_old_data(place: Place) -> None:
    (place.src / "old").write_bytes(OLD)
    assert (place.mnt / "old").read_bytes() == OLD
    reuse(place.src / "old", place.src / "new", with_bytes(NEW))
    assert (place.mnt / "new").read_bytes() == NEW
    assert (place.mnt / "new").stat().st_ino == (place.src / "new").stat().st_ino
    # If an inode turns out to be another, the kernel itself returns EIO and no data.
    assert outcome((place.mnt / "old").read_bytes) in ("ENOENT", "ESTALE", "EIO")
    time.sleep(place.seconds)
    assert outcome((place.mnt / "old").read_bytes) == "ENOENT"


ACTIONS: dict[str, Callable[[Path], Any]] = {
    "read": lambda path: path.read_bytes(),
    "write": lambda path: os.write(os.open(path, os.O_WRONLY), b"wrong file"),
    "append": lambda path: os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b"wrong file"),
    "open with O_TRUNC": lambda path: os.open(path, os.O_WRONLY | os.O_TRUNC),
    "truncate": lambda path: os.truncate(path, 1),
    "chmod": lambda path: os.chmod(path, 0o600),
    "chown": lambda path: os.chown(path, 4001, 4001),
    "utime": lambda path: os.utime(path, (1, 1)),
    "setxattr": lambda path: os.setxattr(path, "user.wrong", b"file"),
    "getxattr": lambda path: os.getxattr(path, "user.secret"),
    "link": lambda path: os.link(path, path.with_name("link")),
    "rename": lambda path: os.rename(path, path.with_name("renamed")),
    "unlink": lambda path: os.unlink(path),
}


@pytest.mark.parametrize("looked_up", [False, True], ids=["unseen", "seen"])
@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_old_name_never_reaches_the_new_file(place: Place, action: Callable[[Path], Any], looked_up: bool) -> None:
    def make_new(path: Path) -> None:
        path.write_bytes(NEW)
        os.setxattr(path, "user.secret", b"secret")

    (place.src / "old").write_bytes(OLD)
    assert (place.mnt / "old").read_bytes() == OLD
    reuse(place.src / "old", place.src / "new", make_new)
    before = os.stat(place.src / "new")
    if looked_up:
        assert (place.mnt / "new").stat().st_ino == before.st_ino

    def act() -> Any:
        result = action(place.mnt / "old")
        return "succeeded" if result is None or isinstance(result, int) else result

    assert outcome(act) in ("ENOENT", "ESTALE", "EIO" if looked_up else "ENOENT")
    after = os.stat(place.src / "new")
    for field in ("st_ino", "st_mode", "st_uid", "st_size", "st_nlink", "st_mtime_ns", "st_ctime_ns"):
        assert getattr(after, field) == getattr(before, field), field
    assert (place.src / "new").read_bytes() == NEW
    assert os.listdir(place.src) == ["new"]
    # The new file is accessible by its own name.
    (place.mnt / "new").chmod(0o640)
    assert stat.S_IMODE((place.src / "new").stat().st_mode) == 0o640


def test_old_directory_never_leads_into_the_new_one(place: Place) -> None:
    def make_new(path: Path) -> None:
        path.mkdir()
        (path / "file").write_bytes(NEW)

    (place.src / "old").mkdir()
    (place.src / "old" / "file").write_bytes(OLD)
    assert (place.mnt / "old" / "file").read_bytes() == OLD
    reuse(place.src / "old", place.src / "new", make_new)
    refused = ("ENOENT", "ESTALE")
    old = place.mnt / "old"
    assert outcome((old / "file").read_bytes) in refused
    assert outcome(lambda: os.close(os.open(old / "made", os.O_CREAT | os.O_WRONLY))) in refused
    assert outcome(lambda: os.mkdir(old / "made")) in refused
    assert outcome(lambda: os.rename(old / "file", place.mnt / "stolen")) in refused
    assert outcome(lambda: os.unlink(old / "file")) in refused
    assert outcome(lambda: os.chmod(old, 0o700)) in refused
    assert os.listdir(place.src) == ["new"]
    assert os.listdir(place.src / "new") == ["file"]
    assert stat.S_IMODE((place.src / "new").stat().st_mode) == 0o755
    assert (place.mnt / "new" / "file").read_bytes() == NEW
    assert os.listdir(place.mnt / "new") == ["file"]


def test_open_directory_never_becomes_another(place: Place) -> None:
    def make_new(path: Path) -> None:
        path.mkdir()
        (path / "secret").write_bytes(NEW)

    (place.src / "old").mkdir()
    fd = os.open(place.mnt / "old", os.O_RDONLY | os.O_DIRECTORY)
    try:
        reuse(place.src / "old", place.src / "new", make_new)
        assert outcome(lambda: os.open("secret", os.O_RDONLY, dir_fd=fd)) in ("ENOENT", "ESTALE")
        assert outcome(lambda: os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=fd)) in ("ENOENT", "ESTALE")
        assert outcome(lambda: os.listdir(fd)) in ([], "ENOENT", "ESTALE")
    finally:
        os.close(fd)
    assert os.listdir(place.src / "new") == ["secret"]


@pytest.mark.parametrize("before", ["file", "directory", "symlink", "fifo"])
@pytest.mark.parametrize("after", ["file", "directory", "symlink", "fifo"])
def test_number_reused_for_another_file_type(place: Place, before: str, after: str) -> None:
    makers: dict[str, Callable[[Path], Any]] = {
        "file": with_bytes(NEW),
        "directory": Path.mkdir,
        "symlink": lambda path: os.symlink(path.name, path),
        "fifo": os.mkfifo,
    }
    makers[before](place.src / "old")
    os.lstat(place.mnt / "old")
    if before == "symlink":
        assert os.readlink(place.mnt / "old") == "old"
    reuse(place.src / "old", place.src / "new", makers[after])
    found, expected = os.lstat(place.mnt / "new"), os.lstat(place.src / "new")
    assert found.st_mode == expected.st_mode
    assert found.st_ino == expected.st_ino
    if after == "file":
        assert (place.mnt / "new").read_bytes() == NEW
    elif after == "directory":
        (place.mnt / "new" / "inside").write_bytes(NEW)
        assert os.listdir(place.src / "new") == ["inside"]
    elif after == "symlink":
        assert os.readlink(place.mnt / "new") == "new"


def test_reuse_within_one_clock_tick_is_noticed(place: Place) -> None:
    """Birth time and ctime may then equal those of the old file."""
    for number in range(500):
        name, content = f"file{number}", b"content %06d" % number
        (place.src / name).write_bytes(content)
        assert (place.mnt / name).read_bytes() == content
        (place.src / name).unlink()


@pytest.mark.at_once("the kernel takes its own word for sizes and times of a file that it knows")
def test_files_keep_their_own_data_under_stress(place: Place, via: str) -> None:
    """The source creates and removes files while the mount writes to them; each contains only its own name."""
    choice = random.Random(5)
    names = [f"{number:04d}" for number in range(40)]
    live: set[str] = set()
    until = time.monotonic() + 2
    rounds = 0
    while time.monotonic() < until:
        rounds += 1
        name = choice.choice(names)
        how = choice.randrange(5)
        if how == 0 and name in live:
            (place.src / name).unlink()
            live.remove(name)
        elif how == 1:
            (place.src / name).write_bytes(name.encode() * 3)
            live.add(name)
        elif how in (2, 3):
            content = outcome((place.mnt / name).read_bytes)
            if isinstance(content, bytes):
                if via == "llfuse":
                    # Because of its late invalidation, the kernel does not note at a read that the file is shorter.
                    content = content.rstrip(b"\0")
                assert content == name.encode() * (len(content) // 4), f"{name} gave {content!r}"
        else:

            def write(path: Path = place.mnt / name) -> None:
                fd = os.open(path, os.O_WRONLY | os.O_APPEND)
                try:
                    os.write(fd, path.name.encode())
                finally:
                    os.close(fd)

            outcome(write)
        if rounds % 100 == 0:
            for found in os.listdir(place.src):
                content = (place.src / found).read_bytes()
                assert content == found.encode() * (len(content) // 4), f"{found} holds {content!r}"
    assert rounds > 200


def test_equal_numbers_on_two_devices_are_two_files(serve: Serve) -> None:
    """tmpfs counts inodes from 1 on every mount; 1 is also FUSE's number of the root."""
    holder = reachable_directory("llloop-nested-")
    try:
        source = holder / "source"
        source.mkdir()
        with tmpfs(source / "one", "size=1m"), tmpfs(source / "two", "size=1m"):
            for name in ("one", "two"):
                for number in range(5):
                    (source / name / f"file{number}").write_bytes(b"%s %d" % (name.encode(), number))
                    (source / name / f"directory{number}").mkdir()
                    (source / name / f"directory{number}" / name).write_bytes(b"")
            numbers = [os.stat(source / name / "file0").st_ino for name in ("one", "two")]
            assert numbers[0] == numbers[1]
            server = serve(source=source)
            try:
                mnt = server.mountpoint
                assert sorted(os.listdir(mnt)) == ["one", "two"]
                for name in ("one", "two", "one"):
                    assert len(os.listdir(mnt / name)) == 10
                    for number in range(5):
                        assert (mnt / name / f"file{number}").read_bytes() == b"%s %d" % (name.encode(), number)
                        assert os.listdir(mnt / name / f"directory{number}") == [name]
                identities = {
                    (found.st_dev, found.st_ino)
                    for found in (os.stat(path) for path in [mnt, *mnt.glob("*"), *mnt.glob("*/*"), *mnt.glob("*/*/*")])
                }
                assert len(identities) == 1 + 2 + 2 * 10 + 2 * 5
                (mnt / "one" / "file0").write_bytes(b"changed")
                assert (source / "two" / "file0").read_bytes() == b"two 0"
                assert outcome(lambda: os.rename(mnt / "one" / "file0", mnt / "two" / "moved")) == "EXDEV"
                assert outcome(lambda: os.link(mnt / "one" / "file0", mnt / "two" / "linked")) == "EXDEV"
                assert outcome(lambda: os.rmdir(mnt / "one")) == "EBUSY"
                assert (mnt / "one" / "file0").read_bytes() == b"changed"
            finally:
                # Stop the server before the file systems below it are unmounted.
                server.stop()
    finally:
        shutil.rmtree(holder)
