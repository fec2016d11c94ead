"""create, open, mknod, flush, release: new objects, and the flags of open(2)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.expect import fails, outcome, python, same_status, start_python
from tests.server import Tree
from tests.syscalls import opened


@contextmanager
def umask(mask: int) -> Iterator[None]:
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077, 0o777])
def test_mode_of_new_objects(tree: Tree, mask: int) -> None:
    with umask(mask):
        for mode in (0o666, 0o777, 0o640, 0o400, 0o000):
            with opened(tree.mnt / f"file{mode:o}", os.O_CREAT | os.O_RDWR, mode):
                pass
            os.mkdir(tree.mnt / f"directory{mode:o}", mode)
            os.mkfifo(tree.mnt / f"fifo{mode:o}", mode)
            os.mknod(tree.mnt / f"node{mode:o}", mode | stat.S_IFREG)
            for kind in ("file", "directory", "fifo", "node"):
                assert stat.S_IMODE(os.stat(tree.src / f"{kind}{mode:o}").st_mode) == mode & ~mask
                same_status(tree.mnt / f"{kind}{mode:o}", tree.src / f"{kind}{mode:o}")


def test_special_bits_of_new_objects(tree: Tree) -> None:
    with umask(0):
        for mode in (0o1777, 0o2775, 0o4755):
            for side, name in ((tree.src, "reference"), (tree.mnt, "file")):
                os.mkdir(side / f"{name}-directory-{mode:o}", mode)
                with opened(side / f"{name}-{mode:o}", os.O_CREAT | os.O_WRONLY, mode):
                    pass
            for kind in ("-", "-directory-"):
                expected = os.stat(tree.src / f"reference{kind}{mode:o}").st_mode
                assert os.stat(tree.mnt / f"file{kind}{mode:o}").st_mode == expected
                assert os.stat(tree.src / f"file{kind}{mode:o}").st_mode == expected


def test_new_objects_belong_to_the_caller(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_WRONLY):
        pass
    os.mkdir(tree.mnt / "directory")
    os.symlink("x", tree.mnt / "symlink")
    os.mkfifo(tree.mnt / "fifo")
    for name in ("file", "directory", "symlink", "fifo"):
        status = os.lstat(tree.src / name)
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
        same_status(tree.mnt / name, tree.src / name)


def test_new_read_only_file_is_writable_by_its_descriptor(tree: Tree) -> None:
    for mode in (0o444, 0o000):
        with opened(tree.mnt / f"{mode}", os.O_CREAT | os.O_RDWR | os.O_EXCL, mode) as descriptor:
            assert os.write(descriptor, b"written") == 7
            assert os.pread(descriptor, 10, 0) == b"written"
            os.ftruncate(descriptor, 3)
        assert os.stat(tree.src / f"{mode}").st_size == 3


def test_exclusive_creation(tree: Tree) -> None:
    exclusive = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    (tree.src / "file").write_bytes(b"kept")
    (tree.src / "directory").mkdir()
    os.symlink("nowhere", tree.src / "dangling")
    for name in ("file", "directory", "dangling"):
        with fails(errno.EEXIST):
            os.open(tree.mnt / name, exclusive)
        with fails(errno.EEXIST):
            os.mkdir(tree.mnt / name)
        with fails(errno.EEXIST):
            os.mkfifo(tree.mnt / name)
        with fails(errno.EEXIST):
            os.symlink("x", tree.mnt / name)
    with fails(errno.EEXIST):
        os.open(tree.mnt / "file", exclusive | os.O_TRUNC)
    assert (tree.src / "file").read_bytes() == b"kept"
    assert sorted(os.listdir(tree.src)) == ["dangling", "directory", "file"]
    with opened(tree.mnt / "new", exclusive):
        pass
    assert os.stat(tree.src / "new").st_size == 0


def test_only_one_exclusive_creation_succeeds(tree: Tree) -> None:
    script = """
import os, sys
sys.stdin.readline()
won = 0
for number in range(200):
    try:
        os.close(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        won += 1
    except FileExistsError:
        pass
print(won)
"""
    rivals = [start_python(script, tree.mnt) for _ in range(3)]
    for rival in rivals:
        assert rival.stdin
        rival.stdin.write("go\n")
        rival.stdin.flush()
    assert sum(int(rival.communicate(timeout=30)[0]) for rival in rivals) == 200
    assert sorted(map(int, os.listdir(tree.src))) == list(range(200))


def test_o_creat_opens_an_existing_file(tree: Tree) -> None:
    (tree.src / "file").write_bytes(b"there")
    (tree.src / "file").chmod(0o640)
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR, 0o777) as descriptor:
        assert os.read(descriptor, 10) == b"there"
    assert stat.S_IMODE(os.stat(tree.src / "file").st_mode) == 0o640


def test_creation_through_a_dangling_symlink(tree: Tree) -> None:
    os.symlink("target", tree.mnt / "symlink")
    (tree.mnt / "symlink").write_bytes(b"through")
    assert (tree.src / "target").read_bytes() == b"through"
    assert os.readlink(tree.src / "symlink") == "target"


def test_creation_errors(tree: Tree) -> None:
    (tree.src / "file").touch()
    for name, number in (("missing/new", errno.ENOENT), ("file/new", errno.ENOTDIR)):
        with fails(number):
            os.open(tree.mnt / name, os.O_CREAT | os.O_WRONLY)
        with fails(number):
            os.mkdir(tree.mnt / name)
        with fails(number):
            os.symlink("x", tree.mnt / name)
        with fails(number):
            os.mkfifo(tree.mnt / name)
    with fails(errno.EISDIR):
        os.open(f"{tree.mnt}/new/", os.O_CREAT | os.O_WRONLY)
    assert os.listdir(tree.src) == ["file"]


def test_o_trunc(tree: Tree) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_APPEND):
        (tree.mnt / "file").write_bytes(b"to be cut")
        with opened(tree.mnt / "file", flags | os.O_TRUNC) as descriptor:
            assert os.fstat(descriptor).st_size == 0
            assert os.stat(tree.src / "file").st_size == 0
            os.write(descriptor, b"new")
        assert (tree.src / "file").read_bytes() == b"new"
        assert (tree.mnt / "file").read_bytes() == b"new"


def test_o_trunc_is_seen_by_other_descriptors(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"first content")
    with (
        opened(tree.mnt / "file", os.O_RDONLY) as reader,
        opened(tree.mnt / "file", os.O_RDWR) as writer,
    ):
        assert os.pread(reader, 100, 0) == b"first content"
        with opened(tree.mnt / "file", os.O_WRONLY | os.O_TRUNC) as cutter:
            for descriptor in (reader, writer):
                assert os.fstat(descriptor).st_size == 0
                assert os.pread(descriptor, 100, 0) == b""
            assert os.pwrite(writer, b"2", 4) == 1
            assert os.write(cutter, b"one") == 3
        assert os.pread(reader, 100, 0) == b"one\x002"
    assert (tree.src / "file").read_bytes() == b"one\x002"


def test_restrictive_open_flags(tree: Tree) -> None:
    (tree.src / "file").touch()
    (tree.src / "directory").mkdir()
    os.symlink("file", tree.src / "symlink")
    with fails(errno.ELOOP):
        os.open(tree.mnt / "symlink", os.O_RDONLY | os.O_NOFOLLOW)
    with fails(errno.ENOTDIR):
        os.open(tree.mnt / "file", os.O_RDONLY | os.O_DIRECTORY)
    with fails(errno.ENOTDIR):
        os.open(tree.mnt / "symlink", os.O_RDONLY | os.O_DIRECTORY)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_CREAT):
        with fails(errno.EISDIR):
            os.open(tree.mnt / "directory", flags)
    with fails(errno.ENOENT):
        os.open(tree.mnt / "missing", os.O_RDWR)


def test_open_flags_are_kept(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    for flags in (
        os.O_RDONLY,
        os.O_WRONLY,
        os.O_RDWR,
        os.O_RDWR | os.O_APPEND,
        os.O_WRONLY | os.O_SYNC | os.O_NONBLOCK,
    ):
        with opened(tree.mnt / "file", flags) as descriptor:
            kept = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            with opened(tree.src / "file", flags) as native:
                assert kept == fcntl.fcntl(native, fcntl.F_GETFL)


def test_access_modes_are_enforced(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"content")
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        with fails(errno.EBADF):
            os.write(descriptor, b"x")
        assert os.read(descriptor, 100) == b"content"
    with opened(tree.mnt / "file", os.O_WRONLY) as descriptor:
        with fails(errno.EBADF):
            os.read(descriptor, 1)
        os.write(descriptor, b"C")
    with opened(tree.mnt / "file", os.O_PATH) as descriptor:
        with fails(errno.EBADF):
            os.read(descriptor, 1)
        assert os.fstat(descriptor).st_size == 7
    assert (tree.src / "file").read_bytes() == b"Content"


def test_two_opens_with_different_flags(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"0123456789")
    with (
        opened(tree.mnt / "file", os.O_RDONLY) as reader,
        opened(tree.mnt / "file", os.O_WRONLY) as writer,
        opened(tree.mnt / "file", os.O_RDWR) as both,
        opened(tree.mnt / "file", os.O_WRONLY | os.O_APPEND) as appender,
        opened(tree.mnt / "file", os.O_RDWR | os.O_SYNC) as synchronous,
    ):
        os.write(writer, b"AB")
        assert os.read(reader, 4) == b"AB23"
        os.write(appender, b"++")
        os.write(both, b"xyz")
        os.pwrite(synchronous, b"S", 5)
        expected = b"xyz34S6789++"
        assert os.pread(both, 100, 0) == os.pread(synchronous, 100, 0) == os.pread(reader, 100, 0) == expected
        with fails(errno.EBADF):
            os.pwrite(reader, b"x", 0)
        with fails(errno.EBADF):
            os.pread(appender, 1, 0)
    assert (tree.src / "file").read_bytes() == expected


def test_write_only_open_of_a_write_only_file(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"x" * 10_000)
    os.chmod(tree.mnt / "file", 0o200)
    with opened(tree.mnt / "file", os.O_WRONLY) as descriptor:
        # Not whole pages, so that a page cache would have to read the rest first.
        assert os.pwrite(descriptor, b"y" * 100, 5_000) == 100
    os.chmod(tree.src / "file", 0o600)
    assert (tree.src / "file").read_bytes() == b"x" * 5_000 + b"y" * 100 + b"x" * 4_900


def test_reopening_through_proc_self_fd(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"0123456789")
    with opened(tree.mnt / "file", os.O_RDONLY) as first:
        with opened(f"/proc/self/fd/{first}", os.O_RDWR) as second:
            os.write(second, b"ab")
        assert os.read(first, 10) == b"ab23456789"
    with opened(tree.mnt / "file", os.O_PATH) as path, opened(f"/proc/self/fd/{path}", os.O_RDONLY) as first:
        assert os.read(first, 2) == b"ab"


def test_duplicates_share_their_position(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        duplicate = os.dup(descriptor)
        os.write(descriptor, b"one")
        os.write(duplicate, b"two")
        os.close(duplicate)
        child = os.fork()
        if child == 0:
            try:
                os.write(descriptor, b"three")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.write(descriptor, b"four")
    assert (tree.src / "file").read_bytes() == b"onetwothreefour"


def test_written_data_is_in_the_source_at_close(tree: Tree) -> None:
    for number in range(50):
        with opened(tree.mnt / "file", os.O_CREAT | os.O_WRONLY | os.O_TRUNC) as descriptor:
            os.write(descriptor, b"%d" % number)
        assert (tree.src / "file").read_bytes() == b"%d" % number


@pytest.mark.parametrize("flag", ["O_SYNC", "O_DSYNC", "O_NOATIME"])
def test_io_flags(tree: Tree, flag: str) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR | getattr(os, flag)) as descriptor:
        for number in range(10):
            assert os.write(descriptor, b"%d" % number * 1000) == 1000
            assert os.stat(tree.src / "file").st_size == 1000 * (number + 1)
        assert os.pread(descriptor, 20_000, 0) == b"".join(b"%d" % number * 1000 for number in range(10))


def test_fsync_and_fdatasync(tree: Tree) -> None:
    with opened(tree.mnt / "file", os.O_CREAT | os.O_RDWR) as descriptor:
        os.write(descriptor, b"durable")
        os.fsync(descriptor)
        assert (tree.src / "file").read_bytes() == b"durable"
        os.write(descriptor, b" data")
        os.fdatasync(descriptor)
        assert (tree.src / "file").read_bytes() == b"durable data"
    with opened(tree.mnt / "file", os.O_RDONLY) as descriptor:
        os.fsync(descriptor)
    with opened(tree.mnt, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)
        os.fdatasync(descriptor)


def test_a_fifo_carries_data_between_processes(tree: Tree) -> None:
    os.mkfifo(tree.mnt / "fifo")
    with fails(errno.ENXIO):
        os.open(tree.mnt / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    writer = start_python("import sys; open(sys.argv[1], 'w').write('by fifo')", tree.mnt / "fifo")
    assert (tree.mnt / "fifo").read_text() == "by fifo"
    writer.communicate(timeout=30)
    assert writer.returncode == 0


def test_a_socket_in_the_mount(tree: Tree) -> None:
    # sun_path holds only 107 bytes, so use a relative path.
    with opened(tree.mnt, os.O_RDONLY) as directory, socket.socket(socket.AF_UNIX) as listener:
        address = f"/proc/self/fd/{directory}/s"
        listener.bind(address)
        listener.listen()
        assert stat.S_ISSOCK(os.lstat(tree.src / "s").st_mode)
        with fails(errno.ENXIO):
            os.open(tree.mnt / "s", os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)
            connection, _ = listener.accept()
            with connection:
                client.sendall(b"hello")
                assert connection.recv(5) == b"hello"
    os.unlink(tree.mnt / "s")
    assert os.listdir(tree.src) == []


@pytest.mark.root
def test_mknod_of_devices(tree: Tree) -> None:
    for name, kind, device in (
        ("character", stat.S_IFCHR, os.makedev(1, 3)),
        ("block", stat.S_IFBLK, os.makedev(7, 200)),
        ("large", stat.S_IFCHR, os.makedev(0xABC, 0xFEDCB)),
    ):
        os.mknod(tree.mnt / name, kind | 0o640, device)
        status = os.stat(tree.src / name)
        assert stat.S_IFMT(status.st_mode) == kind
        assert stat.S_IMODE(status.st_mode) == 0o640
        assert status.st_rdev == device
        same_status(tree.mnt / name, tree.src / name)
    with fails(errno.EEXIST):
        os.mknod(tree.mnt / "block", stat.S_IFBLK | 0o600, os.makedev(7, 0))


@pytest.mark.user
@pytest.mark.skipif(os.geteuid() == 0, reason="root may make devices")
def test_ordinary_user_cannot_create_devices(tree: Tree) -> None:
    with fails(errno.EPERM):
        os.mknod(tree.mnt / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    assert os.listdir(tree.src) == []


def test_a_program_runs_from_the_mount(tree: Tree) -> None:
    (tree.mnt / "script").write_text("#!/bin/sh\necho from the mount: $1\n")
    (tree.mnt / "script").chmod(0o755)
    (tree.mnt / "binary").write_bytes(Path("/bin/echo").read_bytes())
    (tree.mnt / "binary").chmod(0o755)
    script = "import subprocess, sys; sys.stdout.write(subprocess.check_output(sys.argv[1:], text=True))"
    assert python(script, tree.mnt / "script", "yes").stdout == "from the mount: yes\n"
    assert python(script, tree.mnt / "binary", "yes").stdout == "yes\n"
    (tree.mnt / "script").chmod(0o644)
    with fails(errno.EACCES):
        os.execv(tree.mnt / "script", ["script"])


def rewrite(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY))


def test_running_program_gives_etxtbsy(tree: Tree) -> None:
    outcomes = []
    for side, name in ((tree.src, "reference"), (tree.mnt, "program")):
        (side / name).write_bytes(Path("/bin/sleep").read_bytes())
        (side / name).chmod(0o755)
        running = os.posix_spawn(side / name, ["sleep", "60"], {})
        try:
            outcomes.append(outcome(rewrite, side / name))
        finally:
            os.kill(running, 9)
            os.waitpid(running, 0)
    assert outcomes[0] == outcomes[1]


def test_many_open_files_at_once(tree: Tree) -> None:
    descriptors = []
    try:
        for number in range(500):
            descriptors.append(os.open(tree.mnt / str(number), os.O_CREAT | os.O_RDWR))
            os.write(descriptors[-1], b"%d" % number)
        for number, descriptor in enumerate(descriptors):
            assert os.pread(descriptor, 10, 0) == b"%d" % number
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
