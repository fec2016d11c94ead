"""mkdir, rmdir, opendir, readdir, releasedir, fsyncdir."""

from __future__ import annotations

import collections
import errno
import os
import stat
import time
from pathlib import Path

import pytest

from tests.expect import fails, outcome, python, same_status, start_python
from tests.server import Tree
from tests.syscalls import directory_stream, opened

DT_FIFO, DT_CHR, DT_DIR, DT_REG, DT_LNK = 1, 2, 4, 8, 10


def test_mkdir_and_rmdir(tree: Tree) -> None:
    os.mkdir(tree.mnt / "d", 0o751)
    assert stat.S_IMODE(os.stat(tree.src / "d").st_mode) == 0o751
    same_status(tree.mnt / "d", tree.src / "d")
    with fails(errno.EEXIST):
        os.mkdir(tree.mnt / "d")
    (tree.mnt / "d" / "file").touch()
    with fails(errno.ENOTEMPTY):
        os.rmdir(tree.mnt / "d")
    with fails(errno.ENOTDIR):
        os.rmdir(tree.mnt / "d" / "file")
    with fails(errno.ENOENT):
        os.rmdir(tree.mnt / "missing")
    with fails(errno.EINVAL):
        os.rmdir(f"{tree.mnt}/d/.")
    with fails(errno.ENOTEMPTY):
        os.rmdir(f"{tree.mnt}/d/..")
    os.unlink(tree.mnt / "d" / "file")
    os.rmdir(tree.mnt / "d")
    with fails(errno.ENOENT):
        os.rmdir(tree.mnt / "d")
    assert os.listdir(tree.src) == os.listdir(tree.mnt) == []


def test_root_of_the_mount_cannot_be_removed(tree: Tree) -> None:
    with fails(errno.EBUSY, errno.ENOTEMPTY):
        os.rmdir(tree.server.mountpoint)
    assert os.path.isdir(tree.server.source)


def test_removed_directory_created_again(tree: Tree) -> None:
    for number in range(30):
        os.mkdir(tree.mnt / "d")
        (tree.mnt / "d" / f"{number}").touch()
        assert os.listdir(tree.mnt / "d") == [f"{number}"]
        os.unlink(tree.mnt / "d" / f"{number}")
        os.rmdir(tree.mnt / "d")


def test_entries_have_types_and_inode_numbers(tree: Tree) -> None:
    (tree.src / "file").touch()
    (tree.src / "directory").mkdir()
    os.symlink("file", tree.src / "symlink")
    os.mkfifo(tree.src / "fifo")
    with directory_stream(tree.mnt) as stream:
        entries = {entry.name: entry for entry in stream}
    assert {name: entry.kind for name, entry in entries.items()} == {
        b".": DT_DIR,
        b"..": DT_DIR,
        b"file": DT_REG,
        b"directory": DT_DIR,
        b"symlink": DT_LNK,
        b"fifo": DT_FIFO,
    }
    for name in ("file", "directory", "symlink", "fifo"):
        assert entries[name.encode()].inode == os.lstat(tree.mnt / name).st_ino
    assert entries[b"."].inode == os.stat(tree.mnt).st_ino


def test_dot_and_dotdot_are_listed_once(tree: Tree) -> None:
    (tree.src / "empty").mkdir()
    for path in (tree.mnt / "empty", tree.mnt, tree.server.mountpoint):
        with directory_stream(path) as stream:
            counted = collections.Counter(entry.name for entry in stream)
        assert counted[b"."] == counted[b".."] == 1
    assert os.listdir(tree.mnt / "empty") == []


def test_listing_a_file_gives_enotdir(tree: Tree) -> None:
    (tree.src / "file").touch()
    with fails(errno.ENOTDIR):
        os.listdir(tree.mnt / "file")
    with fails(errno.ENOENT):
        os.listdir(tree.mnt / "missing")


@pytest.mark.parametrize("count", [1, 2, 30, 31, 32, 33, 127, 128, 129, 1000, 5000])
def test_directories_of_any_size(tree: Tree, count: int) -> None:
    expected = {f"entry-{number:05}-{'x' * (number % 120)}" for number in range(count)}
    for name in expected:
        (tree.src / name).touch()
    for _ in range(2):
        listed = os.listdir(tree.mnt)
        assert len(listed) == count
        assert set(listed) == expected


def test_changes_are_listed_immediately(tree: Tree) -> None:
    expected: set[str] = set()
    for number in range(60):
        if number % 3 == 2:
            os.unlink(tree.mnt / f"{number - 1}")
            expected.remove(f"{number - 1}")
        else:
            (tree.mnt / f"{number}").touch()
            expected.add(f"{number}")
        listed = os.listdir(tree.mnt)
        assert sorted(listed) == sorted(expected)


def test_rewinddir_shows_new_entries(tree: Tree) -> None:
    (tree.mnt / "old").touch()
    with directory_stream(tree.mnt) as stream:
        assert stream.names() == [b"old"]
        (tree.mnt / "new").touch()
        os.unlink(tree.mnt / "old")
        stream.rewind()
        assert stream.names() == [b"new"]
        os.rename(tree.mnt / "new", tree.mnt / "renamed")
        stream.rewind()
        assert stream.names() == [b"renamed"]
        os.unlink(tree.mnt / "renamed")
        stream.rewind()
        assert stream.names() == []


def test_rewinding_an_open_descriptor(tree: Tree) -> None:
    with opened(tree.mnt, os.O_RDONLY) as descriptor:
        assert os.listdir(descriptor) == []
        for number in range(5):
            (tree.mnt / f"{number}").touch()
            # listdir rewinds its descriptor.
            assert sorted(os.listdir(descriptor)) == [f"{known}" for known in range(number + 1)]


@pytest.mark.parametrize("count", [10, 3000])
def test_telldir_and_seekdir(tree: Tree, count: int) -> None:
    for number in range(count):
        (tree.src / f"{number:04}").touch()
    with directory_stream(tree.mnt) as stream:
        positions = []
        names = []
        while True:
            position = stream.tell()
            entry = stream.read()
            if entry is None:
                break
            positions.append(position)
            names.append(entry.name)
        assert len(names) == len(set(names)) == count + 2
        for index in (len(names) - 1, 0, len(names) // 2, 1, len(names) // 3, len(names) - 2):
            stream.seek(positions[index])
            rest = [entry.name for entry in stream]
            assert rest == names[index:]


def test_two_streams_of_one_directory(tree: Tree) -> None:
    for number in range(2000):
        (tree.src / f"{number}").touch()
    with directory_stream(tree.mnt) as first, directory_stream(tree.mnt) as second:
        names: tuple[list[bytes], list[bytes]] = ([], [])
        for turn in range(4100):
            entry = (first, second)[turn % 2].read()
            if entry:
                names[turn % 2].append(entry.name)
    for listed in names:
        assert len(listed) == len(set(listed)) == 2002


@pytest.mark.timeout(120)
@pytest.mark.parametrize("through", ["mnt", "src"])
def test_listing_of_100000_changing_entries(tree: Tree, through: str) -> None:
    """Entries that exist all the time are listed once, others at most once."""
    count = 100_000
    directory = tree.src / "large"
    directory.mkdir()
    for number in range(count):
        os.mknod(directory / f"kept-{number:06}")
    changing = getattr(tree, through) / "large"
    for number in range(3000):
        (directory / f"doomed-{number:04}").touch()
    seen: collections.Counter[bytes] = collections.Counter()
    changes = 0
    with directory_stream(tree.mnt / "large") as stream:
        for entry in stream:
            seen[entry.name] += 1
            if len(seen) % 35 == 0 and changes < 3000:
                os.unlink(changing / f"doomed-{changes:04}")
                (changing / f"new-{changes:04}").touch()
                changes += 1
    kept = {name for name in seen if name.startswith(b"kept-")}
    assert changes > 2000
    assert len(kept) == count
    assert max(seen.values()) == 1
    assert seen[b"."] == seen[b".."] == 1
    assert all(name.startswith((b"kept-", b"doomed-", b"new-")) for name in seen.keys() - {b".", b".."})
    if through == "src":
        # A change in the source is visible after the cache timeout.
        time.sleep(1.2)
    again = set(os.listdir(tree.mnt / "large"))
    assert again == set(os.listdir(directory))
    assert len(again) == count + 3000


def test_a_large_directory_changed_by_another_process(tree: Tree) -> None:
    for number in range(5000):
        (tree.src / f"kept-{number}").touch()
    script = """
import os, sys
print("ready")
for turn in range(1000000):
    path = f"{sys.argv[1]}/changing-{turn % 7}"
    open(path, "w").close()
    os.rename(path, path + "-renamed")
    os.unlink(path + "-renamed")
"""
    changing = start_python(script, tree.mnt)
    try:
        assert changing.stdout
        changing.stdout.readline()
        for _ in range(10):
            listed = collections.Counter(os.listdir(tree.mnt))
            assert sum(name.startswith("kept-") for name in listed) == 5000
            assert {count for name, count in listed.items() if name.startswith("kept-")} == {1}
        assert changing.poll() is None
    finally:
        changing.kill()
        changing.communicate()


def test_removed_while_open(tree: Tree) -> None:
    os.mkdir(tree.mnt / "d")
    with opened(tree.mnt / "d", os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.rmdir(tree.mnt / "d")
        assert os.fstat(descriptor).st_nlink == 0
        assert stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.fchmod(descriptor, 0o700)
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o700
        assert os.listdir(descriptor) == []
        for action in (
            lambda: os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor),
            lambda: os.mkdir("new", dir_fd=descriptor),
            lambda: os.symlink("x", "new", dir_fd=descriptor),
            lambda: os.stat("new", dir_fd=descriptor),
        ):
            with fails(errno.ENOENT):
                action()
        # The descriptor does not refer to the new directory of the same name.
        os.mkdir(tree.mnt / "d")
        (tree.mnt / "d" / "file").touch()
        assert os.listdir(descriptor) == []
        with fails(errno.ENOENT):
            os.stat("file", dir_fd=descriptor)
    assert os.listdir(tree.src / "d") == ["file"]


def test_the_working_directory_removed(tree: Tree) -> None:
    os.mkdir(tree.mnt / "work")
    script = """
import errno, os, sys
os.chdir(sys.argv[1])
os.rmdir(sys.argv[1])
assert os.stat(".").st_nlink == 0
assert os.listdir(".") == []
for action in (os.getcwd, lambda: open("new", "w"), lambda: os.mkdir("new"), lambda: os.stat("missing")):
    try:
        action()
    except FileNotFoundError:
        pass
    else:
        sys.exit("no ENOENT")
os.mkdir(sys.argv[1])
assert os.stat(".").st_nlink == 0
print(os.path.samefile("..", os.path.dirname(sys.argv[1])))
"""
    assert python(script, tree.mnt / "work").stdout == "True\n"
    assert os.listdir(tree.src) == ["work"]


def test_directory_replaced_during_readdir(tree: Tree) -> None:
    os.mkdir(tree.mnt / "victim")
    os.mkdir(tree.mnt / "new")
    (tree.mnt / "new" / "file").touch()
    with opened(tree.mnt / "victim", os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.rename(tree.mnt / "new", tree.mnt / "victim")
        assert os.fstat(descriptor).st_nlink == 0
        assert os.listdir(descriptor) == []
    assert os.listdir(tree.mnt / "victim") == ["file"]


def test_directories_deeper_than_path_max(tree: Tree) -> None:
    name = "d" * 200
    depth = 40
    descriptors = [os.open(tree.mnt, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for _ in range(depth):
            os.mkdir(name, dir_fd=descriptors[-1])
            descriptors.append(os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=descriptors[-1]))
        with opened("file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptors[-1]) as descriptor:
            os.write(descriptor, b"at the bottom")
        assert os.stat("file", dir_fd=descriptors[-1]).st_size == 13
        # After a rename near the top, the deep directory is still found.
        os.rename(tree.mnt / name, tree.mnt / "short")
        os.chmod("file", 0o600, dir_fd=descriptors[-1])
        assert os.listdir(descriptors[-1]) == ["file"]
        with fails(errno.ENAMETOOLONG):
            os.stat(tree.mnt / "/".join([name] * depth))
        os.unlink("file", dir_fd=descriptors[-1])
        for level in range(depth - 1, 0, -1):
            os.rmdir(name, dir_fd=descriptors[level])
        os.rmdir("short", dir_fd=descriptors[0])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert os.listdir(tree.src) == []


def test_walking_a_tree(tree: Tree) -> None:
    for outer in range(10):
        for inner in range(10):
            (tree.src / f"{outer}" / f"{inner}").mkdir(parents=True)
            for number in range(5):
                (tree.src / f"{outer}" / f"{inner}" / f"{number}").write_bytes(b"x" * number)

    def walked(top: Path) -> list[tuple[str, list[str], list[str]]]:
        return sorted(
            (os.path.relpath(path, top), sorted(directories), sorted(files))
            for path, directories, files in os.walk(top)
        )

    assert walked(tree.mnt) == walked(tree.src)
    script = "import shutil, sys; shutil.rmtree(sys.argv[1])"
    python(script, tree.mnt / "3")
    assert not (tree.src / "3").exists()
    assert walked(tree.mnt) == walked(tree.src)


def test_fsync_of_a_directory(tree: Tree) -> None:
    (tree.mnt / "d").mkdir()
    with opened(tree.mnt / "d", os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        (tree.mnt / "d" / "file").touch()
        os.fsync(descriptor)
        os.rename(tree.mnt / "d" / "file", tree.mnt / "d" / "renamed")
        os.fdatasync(descriptor)
        os.unlink(tree.mnt / "d" / "renamed")
        os.rmdir(tree.mnt / "d")
        os.fsync(descriptor)


def test_unreadable_directory(tree: Tree) -> None:
    for side, name in ((tree.src, "reference"), (tree.mnt, "d")):
        (side / name).mkdir()
        (side / name / "file").touch()
        (side / name).chmod(0o300)
    listing = [outcome(os.listdir, path) for path in (tree.src / "reference", tree.mnt / "d")]
    assert listing[0] == listing[1]
    assert os.stat(tree.mnt / "d" / "file").st_size == 0
    (tree.mnt / "d" / "new").touch()
    (tree.src / "reference").chmod(0o700)
    (tree.src / "d").chmod(0o700)
    assert sorted(os.listdir(tree.src / "d")) == ["file", "new"]
