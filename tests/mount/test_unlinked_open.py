"""Open files without a name."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.expect import pattern, start_python
from tests.server import Tree
from tests.syscalls import opened, statx, utimensat


def unlink(tree: Tree, name: str) -> None:
    os.unlink(tree.mnt / name)


def rename_over(tree: Tree, name: str) -> None:
    (tree.mnt / "replacing").write_bytes(b"replacing")
    os.rename(tree.mnt / "replacing", tree.mnt / name)


@pytest.mark.parametrize("remove", [unlink, rename_over])
def test_all_operations_work(tree: Tree, remove: Callable[[Tree, str], None]) -> None:
    content = pattern(200_000)
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.write(descriptor, content)
        inode = os.fstat(descriptor).st_ino
        remove(tree, "file")
        status = os.fstat(descriptor)
        assert (status.st_nlink, status.st_size, status.st_ino) == (0, 200_000, inode)
        assert os.pread(descriptor, 300_000, 0) == content
        os.pwrite(descriptor, b"changed", 100_000)
        assert os.pread(descriptor, 20, 99_995) == content[99_995:100_000] + b"changed" + content[100_007:100_015]
        os.ftruncate(descriptor, 1000)
        assert os.fstat(descriptor).st_size == 1000
        os.ftruncate(descriptor, 5000)
        assert os.pread(descriptor, 10_000, 0) == content[:1000] + bytes(4000)
        os.fchmod(descriptor, 0o604)
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o604
        utimensat(descriptor, (5, 6), (7, 8))
        assert os.fstat(descriptor).st_atime_ns == 5 * 10**9 + 6
        assert os.fstat(descriptor).st_mtime_ns == 7 * 10**9 + 8
        os.fsync(descriptor)
        os.fdatasync(descriptor)
        assert statx(descriptor).stx_nlink == 0
        assert os.lseek(descriptor, 0, os.SEEK_END) == 5000
        os.write(descriptor, b"end")
        assert os.fstat(descriptor).st_size == 5003
        assert os.fstatvfs(descriptor).f_namemax == 255
    assert os.listdir(tree.src) == ([] if remove is unlink else ["file"])
    if remove is rename_over:
        assert (tree.mnt / "file").read_bytes() == b"replacing"


@pytest.mark.root
def test_change_of_owner(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDONLY) as descriptor:
        os.unlink(tree.mnt / "file")
        os.fchown(descriptor, 1234, 5678)
        assert os.fstat(descriptor)[4:6] == (1234, 5678)


def test_mapped_into_memory(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.write(descriptor, b"a" * 10_000)
        os.unlink(tree.mnt / "file")
        with mmap.mmap(descriptor, 10_000) as mapped:
            assert mapped[9_999] == ord("a")
            mapped[5_000:5_007] = b"through"
            mapped.flush()
            assert os.pread(descriptor, 7, 5_000) == b"through"
            os.pwrite(descriptor, b"back", 100)
            assert mapped[100:104] == b"back"
    assert os.listdir(tree.src) == []


def test_mapping_outlives_its_descriptor(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.write(descriptor, pattern(100_000))
        mapped = mmap.mmap(descriptor, 100_000)
    os.unlink(tree.mnt / "file")
    with mapped:
        assert mapped[:] == pattern(100_000)
        mapped[:5] = b"MMAPS"
        mapped.flush()
        assert mapped[:6] == b"MMAPS" + pattern(6)[5:]


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_reopened_through_proc_self_fd(tree: Tree, flags: int) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as first:
        os.write(first, b"0123456789")
        os.unlink(tree.mnt / "file")
        with opened(f"/proc/self/fd/{first}", flags) as second:
            if flags != os.O_WRONLY:
                assert os.read(second, 100) == b"0123456789"
            if flags != os.O_RDONLY:
                os.pwrite(second, b"AB", 0)
        assert os.pread(first, 2, 0) == (b"01" if flags == os.O_RDONLY else b"AB")
        os.truncate(f"/proc/self/fd/{first}", 4)
        os.chmod(f"/proc/self/fd/{first}", 0o600)
        assert os.stat(f"/proc/self/fd/{first}").st_size == 4
        assert stat.S_IMODE(os.fstat(first).st_mode) == 0o600


def test_held_by_an_o_path_descriptor(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"content")
    with opened(tree.mnt / "file", os.O_PATH) as path:
        os.unlink(tree.mnt / "file")
        assert os.fstat(path).st_nlink == 0
        with opened(f"/proc/self/fd/{path}", os.O_RDWR) as descriptor:
            assert os.read(descriptor, 100) == b"content"
            os.ftruncate(descriptor, 3)
        assert os.fstat(path).st_size == 3


def test_one_of_two_descriptors_is_closed(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as first:
        os.write(first, b"shared")
        with opened(tree.mnt / "file", os.O_RDONLY) as second:
            os.unlink(tree.mnt / "file")
            assert os.read(second, 10) == b"shared"
        os.pwrite(first, b"S", 0)
        assert os.pread(first, 10, 0) == b"Shared"
        assert os.fstat(first).st_nlink == 0


def test_new_file_of_the_same_name_is_another(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as old:
        os.write(old, b"old file")
        os.unlink(tree.mnt / "file")
        with opened(tree.mnt / "file", os.O_CREAT | os.O_EXCL | os.O_RDWR) as new:
            os.write(new, b"new")
            os.fchmod(old, 0o600)
            os.ftruncate(old, 4)
            assert os.pread(old, 100, 0) == b"old "
            assert os.pread(new, 100, 0) == b"new"
            assert os.fstat(new).st_ino != os.fstat(old).st_ino
            assert os.fstat(new).st_nlink == 1
    assert (tree.src / "file").read_bytes() == b"new"
    assert stat.S_IMODE(os.stat(tree.src / "file").st_mode) == 0o644


def test_one_of_two_names_remains(tree: Tree) -> None:
    with opened(tree.mnt / "first", os.O_CREAT | os.O_RDWR) as descriptor:
        os.write(descriptor, b"content")
        os.link(tree.mnt / "first", tree.mnt / "second")
        os.unlink(tree.mnt / "first")
        assert os.fstat(descriptor).st_nlink == 1
        os.fchmod(descriptor, 0o600)
        os.unlink(tree.mnt / "second")
        assert os.fstat(descriptor).st_nlink == 0
        os.ftruncate(descriptor, 3)
        assert os.pread(descriptor, 10, 0) == b"con"


def test_file_in_a_removed_directory(tree: Tree) -> None:
    (tree.mnt / "a" / "b").mkdir(parents=True)
    with opened(tree.mnt / "a" / "b" / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.unlink(tree.mnt / "a" / "b" / "file")
        os.rmdir(tree.mnt / "a" / "b")
        os.rmdir(tree.mnt / "a")
        os.write(descriptor, b"still here")
        os.fchmod(descriptor, 0o600)
        assert os.pread(descriptor, 20, 0) == b"still here"
        assert os.fstat(descriptor).st_size == 10


def test_held_by_another_process(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"held")
    holder = start_python(
        """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print("opened")
sys.stdin.readline()
os.pwrite(fd, b"H", 0)
print(os.fstat(fd).st_nlink, os.pread(fd, 10, 0).decode())
""",
        tree.mnt / "file",
    )
    assert holder.stdout
    assert holder.stdout.readline() == "opened\n"
    os.unlink(tree.mnt / "file")
    (tree.mnt / "file").write_bytes(b"another")
    assert holder.communicate("go on\n", timeout=30)[0] == "0 Held\n"
    assert (tree.src / "file").read_bytes() == b"another"


def test_many_at_once(tree: Tree) -> None:
    descriptors = []
    try:
        for number in range(200):
            descriptors.append(os.open(tree.mnt / "same", os.O_CREAT | os.O_EXCL | os.O_RDWR))
            os.write(descriptors[-1], b"%d" % number)
            os.unlink(tree.mnt / "same")
        for number, descriptor in enumerate(descriptors):
            assert os.pread(descriptor, 10, 0) == b"%d" % number
            os.ftruncate(descriptor, number)
            assert os.fstat(descriptor).st_size == number
            assert os.fstat(descriptor).st_nlink == 0
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert os.listdir(tree.src) == []


def holders(pids: list[int], inode: int) -> list[str]:
    """The descriptors of these processes that still keep the file."""
    held = []
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.stat(link).st_ino == inode and "(deleted)" in os.readlink(link):
                    held.append(str(link))
    return held


def test_no_process_holds_it_after_the_last_close(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.write(descriptor, bytes(1024 * 1024))
        inode = os.fstat(descriptor).st_ino
        os.unlink(tree.mnt / "file")
        pids = [os.getpid(), *tree.server.processes()]
        assert holders(pids, inode)
    # The server gets RELEASE a moment after the last close, and then tells its workers.
    deadline = time.monotonic() + 30
    while left := holders(pids, inode):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_removed_in_the_source(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.write(descriptor, b"content")
        os.unlink(tree.src / "file")
        assert os.pread(descriptor, 10, 0) == b"content"
        os.pwrite(descriptor, b"C", 0)
        os.ftruncate(descriptor, 4)
        assert os.pread(descriptor, 10, 0) == b"Cont"
        assert os.fstat(descriptor).st_size == 4
