"""Errors of the source reach the caller with their errno; small file systems produce each error."""

import contextlib
import errno
import faulthandler
import fcntl
import mmap
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import expect
from tests.as_user import Caller, Child, run_as
from tests.conftest import Serve
from tests.expect import outcome, pattern
from tests.filesystems import ext4, make_image, mounted, overlay, tmpfs
from tests.server import Server, Tree, reachable_directory
from tests.server_processes import wait_until
from tests.syscalls import FALLOC_FL_KEEP_SIZE, fallocate, opened, syncfs
from tests.twins import outcomes

MIB = 1 << 20
# <linux/posix_acl_xattr.h>: the rights of the owner, 50 users, the group, the mask, and others.
ACL_OF_MANY = struct.pack("=I", 2) + b"".join(
    struct.pack("=HHI", tag, 7, who)
    for tag, who in (
        (1, 2**32 - 1),
        *((2, 5000 + number) for number in range(50)),
        *((tag, 2**32 - 1) for tag in (4, 16, 32)),
    )
)


@pytest.fixture
def scratch() -> Iterator[Path]:
    directory = reachable_directory("llloop-small-")
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def serving(serve: Serve) -> Callable[..., Any]:
    """A mount that ends with the block, before the file system below it is unmounted."""

    @contextmanager
    def over(source: Path, *arguments: str) -> Iterator[Server]:
        server = serve(*arguments, source=source)
        try:
            yield server
        finally:
            server.stop()

    return over


def write_until_it_fails(path: Path, piece: int, limit: int = 64 * MIB, flags: int = 0) -> tuple[int, Any]:
    """How many bytes write(2) said it took, and why it took no more."""
    content = pattern(piece)
    taken = 0
    with opened(path, os.O_WRONLY | os.O_CREAT | flags) as fd:
        while taken < limit:
            try:
                taken += os.write(fd, content[taken % piece :])
            except OSError as error:
                return taken, errno.errorcode[error.errno or 0]
    return taken, None


def syncfs_of(directory: Path) -> None:
    with opened(directory, os.O_RDONLY) as fd:
        syncfs(fd)


def holds_pattern(path: Path, piece: int, size: int) -> bool:
    expected = (pattern(piece) * (size // piece + 1))[:size]
    return path.read_bytes() == expected


@pytest.mark.at_once("errors of collected writes are told at fsync or close")
@pytest.mark.root
@pytest.mark.parametrize("piece", [100, 4096, 65_536, 3 * MIB], ids=["100", "4k", "64k", "3m"])
def test_full_source_gives_enospc_and_keeps_written_data(
    scratch: Path, serving: Callable[..., Any], piece: int
) -> None:
    with tmpfs(scratch / "full", "size=2m") as source, serving(source) as server:
        path = server.mountpoint / "file"
        taken, why = write_until_it_fails(path, piece)
        assert why == "ENOSPC"
        assert MIB < taken <= 2 * MIB
        for side in (path, source / "file"):
            assert side.stat().st_size == taken
            assert holds_pattern(side, piece, taken)
        # When there is space again, it continues at the same position.
        path.unlink()
        assert wait_until(lambda: os.statvfs(source).f_bavail * os.statvfs(source).f_bsize > MIB)
        assert write_until_it_fails(path, piece, limit=MIB)[1] is None


@pytest.mark.at_once("errors of collected writes are told at fsync or close")
@pytest.mark.root
def test_full_source_refuses_each_way_to_add_data(scratch: Path, serving: Callable[..., Any]) -> None:
    def try_all(directory: Path) -> dict[str, Any]:
        def mapped_hole() -> None:
            with opened(directory / "hole", os.O_RDWR) as fd:
                os.posix_fallocate(fd, 0, MIB)

        def allocate(mode: int) -> None:
            with opened(directory / "hole", os.O_RDWR) as fd:
                fallocate(fd, mode, 0, 4 * MIB)

        def copy() -> None:
            with opened(directory / "filler", os.O_RDONLY) as one, opened(directory / "hole", os.O_WRONLY) as other:
                os.copy_file_range(one, other, MIB, 0, 0)

        def write(flags: int) -> None:
            with opened(directory / "hole", os.O_WRONLY | flags) as fd:
                os.pwrite(fd, b"x" * 5000, 100_000)

        return outcomes(
            {
                "posix_fallocate": mapped_hole,
                "fallocate": lambda: allocate(0),
                "fallocate keeping the size": lambda: allocate(FALLOC_FL_KEEP_SIZE),
                "copy_file_range": copy,
                "write": lambda: write(0),
                "write synchronously": lambda: write(os.O_SYNC),
                "append": lambda: write(os.O_APPEND),
                "grow by truncate": lambda: os.truncate(directory / "hole", 100 * MIB),
                "symlink": lambda: os.symlink("x" * 3000, directory / "symlink"),
                "overwrite in place": lambda: write_at(directory / "filler", b"in place"),
            }
        )

    def write_at(path: Path, content: bytes) -> int:
        with opened(path, os.O_WRONLY) as fd:
            return os.pwrite(fd, content, 0)

    found = {}
    for side in ("native", "mounted"):
        with tmpfs(scratch / side, "size=2m") as source, serving(source) as server:
            directory = source if side == "native" else server.mountpoint
            (source / "hole").touch()
            write_until_it_fails(directory / "filler", 4096)
            found[side] = try_all(directory)
            assert os.statvfs(server.mountpoint).f_bavail == os.statvfs(source).f_bavail == 0
    if server.via == "llfuse":
        for name in ("posix_fallocate", "fallocate", "fallocate keeping the size", "copy_file_range"):
            del found["native"][name], found["mounted"][name]
    assert found["mounted"] == found["native"]
    assert found["native"]["write"] == "ENOSPC"


@pytest.mark.root
@pytest.mark.mounted
@pytest.mark.own_loop
@pytest.mark.by_workers
@pytest.mark.parametrize("how", ["mapping", "writeback"])
def test_loss_of_cached_data_is_reported(scratch: Path, serving: Callable[..., Any], how: str) -> None:
    """The kernel treats a short write of its cache as complete."""
    size, room = 400_000, 60 * mmap.PAGESIZE
    content = pattern(size)

    def write(path: Path) -> None:
        with opened(path, os.O_RDWR | os.O_CREAT) as fd:
            if how == "mapping":
                os.ftruncate(fd, size)
                with mmap.mmap(fd, size) as view:
                    view[:] = content
                    view.flush()
            else:
                assert os.write(fd, content) == size
                os.fsync(fd)

    # With --cache never the kernel collects no writes.
    options = ["--writeback", "--cache", "auto"] if how == "writeback" else []
    with tmpfs(scratch / "full", "size=1m") as source, serving(source, *options) as server:
        (source / "filler").write_bytes(bytes(MIB - room))
        server.expect_log("file: data from a mapping .* could not be written and is lost: No space left")
        assert outcome(write, server.mountpoint / "file") == "ENOSPC"
        assert (source / "file").stat().st_blocks * 512 == room
        (source / "filler").unlink()
        assert outcome(write, server.mountpoint / "second") is None
        assert (source / "second").read_bytes() == content


def fill_up(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(mmap.PAGESIZE)):
            pass


@pytest.mark.root
@pytest.mark.own_loop
@pytest.mark.by_workers
@pytest.mark.parametrize("mode", ["", "--writeback", "--cache never"])
def test_loss_of_stored_data_is_reported_at_close(scratch: Path, serving: Callable[..., Any], mode: str) -> None:
    """Even if another process, or a duplicate of the descriptor, was closed before and got the error."""
    with tmpfs(scratch / "full", "size=1m") as source, serving(source, *mode.split()) as server:
        server.expect_log("file: data from a mapping .* could not be written and is lost: No space left")
        path = server.mountpoint / "file"
        path.write_bytes(b"")
        os.truncate(path, MIB)
        storing, copy = os.open(path, os.O_RDWR), -1
        reading = os.open(path, os.O_RDONLY)
        with mmap.mmap(storing, MIB) as view:
            fill_up(source / "filler")
            view[:] = pattern(MIB)
            if not mode and not expect.collecting:  # with --writeback the kernel reports the error to readers, too
                assert outcome(os.close, reading) is None
            else:
                outcome(os.close, reading)
            copy = os.dup(storing)
            outcome(os.close, copy)
        assert outcome(os.close, storing) == "ENOSPC"
        (source / "filler").unlink()
        for flags in (os.O_RDWR, os.O_RDONLY):
            assert outcome(os.close, os.open(path, flags)) is None, "opened since"


@pytest.mark.root
def test_source_without_free_inodes_gives_enospc(scratch: Path, serving: Callable[..., Any]) -> None:
    def try_all(directory: Path) -> dict[str, Any]:
        return outcomes(
            {
                "create": lambda: os.close(os.open(directory / "a", os.O_CREAT | os.O_WRONLY)),
                "mkdir": lambda: os.mkdir(directory / "b"),
                "mknod": lambda: os.mknod(directory / "c"),
                "mkfifo": lambda: os.mkfifo(directory / "d"),
                "symlink": lambda: os.symlink("x", directory / "e"),
                "rename": lambda: os.rename(directory / "0", directory / "f"),
            }
        )

    with tmpfs(scratch / "full", "size=2m,nr_inodes=20") as source, serving(source) as server:
        for number in range(30):
            if outcome((server.mountpoint / f"{number}").touch) == "ENOSPC":
                break
        found = try_all(server.mountpoint)
        assert found.pop("rename") is None
        assert set(found.values()) == {"ENOSPC"}
        assert sorted(os.listdir(source)) == sorted([*(str(n) for n in range(1, number)), "f"])
        (server.mountpoint / "1").unlink()
        # The server may hold the removed file until the kernel sends FORGET, a moment later.
        assert wait_until(lambda: outcome((server.mountpoint / "again").touch) is None)


def fill_by_writing(fd: int, size: int, flags: int = 0) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | flags)
    piece = mmap.mmap(-1, 64 * 1024)  # aligned to a page, as O_DIRECT requires
    for offset in range(0, size, len(piece)):
        if os.pwrite(fd, piece, offset) < len(piece):
            break


def fill_by_mapping(fd: int, size: int) -> None:
    os.ftruncate(fd, size)
    with mmap.mmap(fd, size) as view:
        for offset in range(0, size, mmap.PAGESIZE):
            view[offset] = 1
        view.flush()


def fill_by_copying(fd: int, size: int) -> None:
    os.pwrite(fd, b"x" * MIB, 0)
    for offset in range(MIB, size, MIB):
        if os.copy_file_range(fd, fd, MIB, 0, offset) < MIB:
            break


def fill_by_allocating(fd: int, size: int) -> None:
    for offset in range(0, size, MIB):
        fallocate(fd, 0, offset, MIB)


WAYS_TO_FILL: dict[str, Callable[[int, int], None]] = {
    "write": fill_by_writing,
    "direct": lambda fd, size: fill_by_writing(fd, size, os.O_DIRECT),
    "mapping": fill_by_mapping,
    "copy": fill_by_copying,
    "allocate": fill_by_allocating,
}


@pytest.mark.root
@pytest.mark.own_loop
@pytest.mark.parametrize("options", [[], ["--io=kernel"], ["--writeback"], ["--cache=never"]], ids=str)
def test_users_cannot_use_blocks_reserved_for_root(
    scratch: Path, serving: Callable[..., Any], options: list[str]
) -> None:
    """A write on a user's behalf must not use the blocks that ext4 reserves for root."""
    user = Caller(4001, 4001)
    image = make_image(scratch / "image", 16 * MIB, "ext4", "-F", "-m", "20", "-O", "^has_journal")
    with mounted(image, scratch / "source", "-o", "loop,nodelalloc") as source, serving(source, *options) as server:
        server.expect_log("data from a mapping .* could not be written and is lost: No space left", required=False)
        source.chmod(0o777)
        state = os.statvfs(source)
        reserved = state.f_bfree - state.f_bavail
        assert reserved > 2000

        def fill(path: Path, way: Callable[[int, int], None]) -> None:
            faulthandler.disable()  # because it would print a stack for SIGBUS
            with suppress(OSError), opened(path, os.O_RDWR | os.O_CREAT) as fd:
                way(fd, 16 * MIB)
                os.fsync(fd)

        for name, way in WAYS_TO_FILL.items():
            # As one of several users who have the file open; the first of them is root.
            path = server.mountpoint / name
            path.touch()
            os.chown(path, user.uid, 0)
            with opened(path, os.O_RDONLY):
                child = Child(fill, path, way, caller=user)
                try:
                    child.result()
                except AssertionError:  # killed by SIGBUS, as in a plain directory
                    assert name == "mapping"
            syncfs_of(source)
            free = os.statvfs(source).f_bfree
            # ext4 uses its reserved blocks for the extents of a file.
            assert reserved - 20 <= free <= reserved + 300, f"{name}: {free} blocks are free, {reserved} are reserved"
            path.unlink()
            assert wait_until(lambda: os.statvfs(source).f_bfree > state.f_bfree - 100)
        fill(server.mountpoint / "of root", WAYS_TO_FILL["write"])
        assert os.statvfs(source).f_bfree < reserved // 2, "nothing is reserved for root"


@pytest.mark.root
@pytest.mark.own_loop
@pytest.mark.at_once("errors of collected writes are told at fsync or close")
@pytest.mark.parametrize("options", [[], ["--io=kernel"]], ids=str)
def test_users_cannot_use_blocks_reserved_for_the_servers_group(
    scratch: Path, serve: Serve, options: list[str]
) -> None:
    image = make_image(scratch / "image", 16 * MIB, "ext4", "-F", "-m", "20", "-O", "^has_journal")
    command = ["setpriv", "--groups", "0,5000", sys.executable, "-m", "llloop", "serve"]
    with mounted(image, scratch / "source", "-o", "loop,nodelalloc,resgid=5000") as source:
        source.chmod(0o777)
        server = serve(*options, source=source, command=command)
        _, why = run_as(Caller(4001, 4001), write_until_it_fails, server.mountpoint / "file", 65_536)
        assert why == "ENOSPC"
        state = os.statvfs(source)
        assert state.f_bfree > 2000
        server.stop()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["own", "of root"])
def test_names_and_xattrs_of_users_use_no_reserved_blocks(
    scratch: Path, serving: Callable[..., Any], kind: str
) -> None:
    """In directories of the user, and in directories of root in which the user may write."""
    user = Caller(4001, 4001)

    def take_blocks(directory: Path) -> dict[str, Any]:
        def many_names(name: Callable[[Path], Any]) -> None:
            for number in range(10):
                name(directory / "crowded" / f"{number:0>200}")

        return outcomes(
            {
                "mkdir": lambda: os.mkdir(directory / "new"),
                "symlink": lambda: os.symlink("x" * 200, directory / "symlink"),
                "attribute": lambda: os.setxattr(directory / "file", "user.a", b"x" * 900),
                "ACL": lambda: os.setxattr(directory / "file", "system.posix_acl_access", ACL_OF_MANY),
                "link": lambda: many_names(lambda path: os.link(directory / "file", path)),
                "rename": lambda: many_names(lambda path: os.rename(directory / path.name[-1], path)),
                "create": lambda: many_names(lambda path: path.with_suffix(".new").touch()),
            }
        )

    found = {}
    for side in ("native", "mounted"):
        image = make_image(scratch / f"{side}.image", 16 * MIB, "ext4", "-F", "-m", "20", "-I", "128", "-b", "1024")
        with mounted(image, scratch / side, "-o", "loop,nodelalloc") as source, serving(source) as server:
            (source / "crowded").mkdir()
            for name in ("file", "full", *map(str, range(10))):
                (source / name).touch()
                os.chown(source / name, user.uid, user.gid)
            for directory in (source, source / "crowded"):
                directory.chmod(0o777)
                if kind == "own":
                    os.chown(directory, user.uid, user.gid)
            for piece in (65_536, 1024):
                run_as(user, write_until_it_fails, source / "full", piece, 64 * MIB, os.O_APPEND)
            assert os.statvfs(source).f_bavail == 0
            free = os.statvfs(source).f_bfree
            found[side] = run_as(user, take_blocks, source if side == "native" else server.mountpoint)
            found[side]["taken"] = free - os.statvfs(source).f_bfree
    assert found["native"]["taken"] == 0
    assert set(found["native"].values()) == {"ENOSPC", 0}
    assert found["mounted"] == found["native"]


@pytest.mark.at_once("errors of collected writes are told at fsync or close")
@pytest.mark.root
def test_exceeded_quota_gives_edquot(scratch: Path, serving: Callable[..., Any]) -> None:
    """btrfs counts for root too, and its limit is set by one command."""
    image = make_image(scratch / "image", 128 * MIB, "btrfs")
    with mounted(image, scratch / "limited", "-o", "loop") as source:
        for command in (["quota", "enable"], ["qgroup", "limit", "2M"]):
            subprocess.run(["btrfs", *command, source], check=True, capture_output=True, timeout=60)
        with serving(source) as server:
            path = server.mountpoint / "file"
            taken, why = write_until_it_fails(path, 65_536)
            assert why == "EDQUOT"
            assert 0 < taken < 3 * MIB
            for side in (path, source / "file"):
                assert holds_pattern(side, 65_536, taken)
            syncfs_of(source)
            assert outcome(lambda: os.close(os.open(server.mountpoint / "more", os.O_CREAT))) == "EDQUOT"
            assert outcome(lambda: os.mkdir(server.mountpoint / "more")) == "EDQUOT"


@pytest.mark.at_once("errors of collected writes are told at fsync or close")
@pytest.mark.root
def test_file_beyond_the_maximum_size_gives_efbig(scratch: Path, serving: Callable[..., Any]) -> None:
    """The limit of ext4 is 16 TiB, far below FUSE's own."""

    def try_all(directory: Path) -> dict[str, Any]:
        path = directory / "file"
        path.write_bytes(b"content")

        def use(action: Callable[[int], Any]) -> Any:
            with opened(path, os.O_RDWR) as fd:
                return action(fd)

        return outcomes(
            {
                "write beyond": lambda: use(lambda fd: os.pwrite(fd, b"x", 1 << 45)),
                "write at 8 EiB": lambda: use(lambda fd: os.pwrite(fd, b"x", (1 << 63) - 2)),
                "truncate": lambda: os.truncate(path, 1 << 45),
                "ftruncate": lambda: use(lambda fd: os.ftruncate(fd, 1 << 45)),
                "just below": lambda: use(lambda fd: os.pwrite(fd, b"x", (1 << 43) - 1)),
                "size": lambda: os.stat(path).st_size,
                "read beyond": lambda: use(lambda fd: os.pread(fd, 1, 1 << 45)),
                "blocks": lambda: os.stat(path).st_blocks < 1000,
            }
        )

    with ext4(scratch, 32 * MIB, "-b", "4096") as source, serving(source) as server:
        (source / "native").mkdir()
        (source / "mounted").mkdir()
        found = try_all(server.mountpoint / "mounted")
        assert found == try_all(source / "native")
        assert (found["write beyond"], found["ftruncate"], found["just below"]) == ("EFBIG", "EFBIG", 1)


def test_file_size_limit_of_the_caller_applies(tree: Tree) -> None:
    def limited(path: Path) -> list[Any]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
            return [
                outcome(lambda: os.pwrite(fd, b"x" * 5_000, 98_000)),
                outcome(lambda: os.pwrite(fd, b"x", 100_000)),
                outcome(lambda: os.ftruncate(fd, 100_001)),
                outcome(lambda: os.pwrite(fd, b"x" * 300_000, 0)),
                os.fstat(fd).st_size,
            ]

    expected = [2_000, "EFBIG", "EFBIG", 100_000, 100_000]
    assert run_as(Caller(), limited, tree.src / "native") == expected
    assert run_as(Caller(), limited, tree.mnt / "mounted") == expected


def test_maximum_offset_does_not_kill_the_server(tree: Tree) -> None:
    """A write at the largest possible offset is an error for the caller only."""
    with opened(tree.mnt / "file", os.O_RDWR | os.O_CREAT) as fd:
        native = os.open(tree.src / "native", os.O_RDWR | os.O_CREAT)
        try:
            for offset in ((1 << 63) - 1, (1 << 63) - 4096, (1 << 62)):
                expected = outcome(partial(os.pwrite, native, b"x" * 8192, offset))
                assert outcome(partial(os.pwrite, fd, b"x" * 8192, offset)) == expected
        finally:
            os.close(native)
    os.truncate(tree.mnt / "file", 0)
    assert (tree.mnt / "file").read_bytes() == b""


def change_everything(directory: Path) -> dict[str, Any]:
    file, below = directory / "file", directory / "directory"
    return outcomes(
        {
            "read": file.read_bytes,
            "list": lambda: sorted(os.listdir(below)),
            "open for writing": lambda: os.open(file, os.O_WRONLY),
            "open for both": lambda: os.open(file, os.O_RDWR),
            "open with O_TRUNC": lambda: os.open(file, os.O_RDONLY | os.O_TRUNC),
            "create": lambda: os.open(directory / "new", os.O_WRONLY | os.O_CREAT),
            "create what is there": lambda: os.close(os.open(file, os.O_RDONLY | os.O_CREAT)),
            "mkdir": lambda: os.mkdir(directory / "new"),
            "mknod": lambda: os.mkfifo(directory / "new"),
            "symlink": lambda: os.symlink("x", directory / "new"),
            "link": lambda: os.link(file, directory / "new"),
            "rename": lambda: os.rename(file, directory / "new"),
            "unlink": lambda: os.unlink(file),
            "rmdir": lambda: os.rmdir(below),
            "truncate": lambda: os.truncate(file, 1),
            "chmod": lambda: os.chmod(file, 0o600),
            "chown": lambda: os.chown(file, 1, 1),
            "utime": lambda: os.utime(file, (1, 1)),
            "setxattr": lambda: os.setxattr(file, "user.new", b"x"),
            "removexattr": lambda: os.removexattr(file, "user.there"),
            "getxattr": lambda: os.getxattr(file, "user.there"),
            "mkdir what is there": lambda: os.mkdir(below),
        }
    )


def fill(directory: Path) -> None:
    (directory / "file").write_bytes(b"content")
    os.setxattr(directory / "file", "user.there", b"value")
    (directory / "directory").mkdir()
    (directory / "directory" / "inside").write_bytes(b"")


@pytest.mark.root
def test_read_only_source(scratch: Path, serving: Callable[..., Any]) -> None:
    image = make_image(scratch / "image", 16 * MIB, "ext4", "-F")
    with mounted(image, scratch / "there", "-o", "loop") as source:
        fill(source)
    with mounted(image, scratch / "there", "-o", "loop,ro") as source, serving(source) as server:
        expected = change_everything(source)
        assert change_everything(server.mountpoint) == expected
        assert list(expected.values()).count("EROFS") >= 15


@pytest.mark.root
def test_source_that_becomes_read_only(scratch: Path, serving: Callable[..., Any]) -> None:
    """As ext4 does after an error."""
    with ext4(scratch, 16 * MIB) as source, serving(source) as server:
        fill(source)
        assert (server.mountpoint / "file").read_bytes() == b"content"
        subprocess.run(["mount", "-o", "remount,ro", source], check=True, timeout=30)
        assert change_everything(server.mountpoint) == change_everything(source)
        subprocess.run(["mount", "-o", "remount,rw", source], check=True, timeout=30)
        (server.mountpoint / "file").write_bytes(b"goes on")
        assert (source / "file").read_bytes() == b"goes on"


@pytest.mark.mounted
def test_read_only_option(serving: Callable[..., Any], tmp_path: Path) -> None:
    fill(tmp_path)
    with serving(tmp_path, "--read-only") as server:
        found = change_everything(server.mountpoint)
        for name in ("read", "list", "getxattr", "create what is there", "mkdir what is there"):
            assert found.pop(name) in (b"content", ["inside"], b"value", None, "EEXIST")
        assert set(found.values()) == {"EROFS"}
        assert outcome(lambda: os.access(server.mountpoint / "file", os.W_OK)) is False
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.root
def test_unreadable_disk_gives_eio(scratch: Path, serving: Callable[..., Any]) -> None:
    """The second half of the image is cut off, so its blocks cannot be read."""
    image = scratch / "ext4.image"
    with ext4(scratch, 64 * MIB, "-b", "4096") as source:
        (source / "good").write_bytes(pattern(100_000))
        (source / "bad").write_bytes(b"b" * (32 * MIB))
        with opened(source / "bad", os.O_RDONLY) as fd:
            syncfs(fd)
            # Read from the disk, not from the page cache.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with open(image, "r+b") as file:
            file.truncate(9 * MIB)
        assert outcome((source / "bad").read_bytes) == "EIO"
        with serving(source) as server:
            mnt = server.mountpoint
            assert outcome((mnt / "bad").read_bytes) == "EIO"
            with opened(mnt / "bad", os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, MIB) as memory:
                assert outcome(lambda: os.preadv(fd, [memory], 24 * MIB)) == "EIO"
            with opened(mnt / "bad", os.O_RDONLY) as fd:
                assert outcome(lambda: os.pread(fd, 4096, 30 * MIB)) == "EIO"
                # A readable part of the file, and other files, can still be read.
                readable = outcome(lambda: os.pread(fd, 4096, 0))
                assert readable == outcome(lambda: read_at(source / "bad", 4096, 0))
            assert (mnt / "good").stat().st_size == 100_000
            assert (mnt / "bad").stat().st_size == 32 * MIB


def read_at(path: Path, size: int, offset: int) -> bytes:
    with opened(path, os.O_RDONLY) as fd:
        return os.pread(fd, size, offset)


@pytest.mark.root
@pytest.mark.parametrize("how", ["fsync", "fdatasync", "O_SYNC", "msync"])
def test_unwritable_disk_fails_fsync(scratch: Path, serving: Callable[..., Any], how: str) -> None:
    """The image is on a full tmpfs: write(2) succeeds into the page cache, and fsync(2) reports the loss."""
    with tmpfs(scratch / "backing", "size=6m") as backing:
        image = make_image(backing / "image", 64 * MIB, "ext4", "-F", "-m", "0", "-O", "^has_journal", "-b", "4096")
        with mounted(image, scratch / "there", "-o", "loop") as source, serving(source) as server:
            (source / "small").write_bytes(b"before")
            path = server.mountpoint / "file"
            if expect.collecting:
                server.expect_log("file: data that was stored .* could not be written and is lost", required=False)

            def write_and_sync() -> None:
                flags = os.O_SYNC if how == "O_SYNC" else 0
                with opened(path, os.O_RDWR | os.O_CREAT | flags) as fd:
                    if how == "msync":
                        os.ftruncate(fd, 12 * MIB)
                        with mmap.mmap(fd, 12 * MIB) as view:
                            view[:] = pattern(MIB) * 12
                            view.flush()
                        os.fsync(fd)
                        return
                    for number in range(12):
                        os.pwrite(fd, pattern(MIB, number), number * MIB)
                    if how == "fsync":
                        os.fsync(fd)
                    elif how == "fdatasync":
                        os.fdatasync(fd)

            assert outcome(write_and_sync) in ("EIO", "ENOSPC")
            assert (server.mountpoint / "small").read_bytes() == b"before"
            assert server.alive()


def test_errors_of_devices_and_ioctls(tree: Tree) -> None:
    """An unknown ioctl must fail with ENOTTY, not harm the mount."""
    (tree.src / "file").write_bytes(b"content")
    with opened(tree.mnt / "file", os.O_RDWR) as fd:
        assert outcome(lambda: fcntl.ioctl(fd, 0x5401, bytes(64))) == "ENOTTY"
        assert outcome(lambda: fcntl.ioctl(fd, 0x12345678, bytes(64))) == "ENOTTY"


@pytest.mark.root
@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="default"),
        # The command refuses --writeback with --io kernel.
        pytest.param(["--writeback"], id="writeback", marks=pytest.mark.by_workers),
    ],
)
def test_append_only_file_can_be_appended_to(
    scratch: Path, serving: Callable[..., Any], via: str, options: list[str]
) -> None:
    """Such a file (chattr +a) appends whatever is written, also a page that the kernel had filled up with old data."""
    if options and via == "llfuse":
        pytest.skip("only llloop's own loop can do this")
    with ext4(scratch, 16 * MIB) as source, serving(source, *options) as server:
        (source / "log").write_bytes(b"hello")
        subprocess.run(["chattr", "+a", source / "log"], check=True, timeout=30)
        try:
            with opened(server.mountpoint / "log", os.O_WRONLY | os.O_APPEND) as fd:
                assert os.write(fd, b"12345") == 5
                assert os.write(fd, b"x" * 100_000) == 100_000
                os.fsync(fd)
            for side in (source, server.mountpoint):
                assert (side / "log").read_bytes() == b"hello12345" + b"x" * 100_000
            assert outcome(lambda: os.open(server.mountpoint / "log", os.O_WRONLY)) == "EPERM"
        finally:
            subprocess.run(["chattr", "-a", source / "log"], check=True, timeout=30)


@pytest.mark.root
def test_overlay_copy_up_keeps_open_files(scratch: Path, serving: Callable[..., Any]) -> None:
    """The first change of a file moves it to the upper directory, where it has another birth time."""
    below = scratch / "below"
    (below / "directory").mkdir(parents=True)
    (below / "directory" / "file").write_bytes(b"content")
    home = os.open(".", os.O_RDONLY)
    with overlay(scratch, below) as source:
        # A birth time has the granularity of the kernel's clock tick.
        time.sleep(0.02)
        with serving(source) as server:
            directory = server.mountpoint / "directory"
            try:
                with opened(directory, os.O_RDONLY) as descriptor, opened(directory / "file", os.O_RDONLY) as fd:
                    os.fchdir(descriptor)
                    (directory / "new").write_bytes(b"new")
                    os.chmod(directory / "file", 0o600)
                    # The kernel must not answer from its cache of earlier lookups.
                    time.sleep(1.1)
                    found = outcomes(
                        {
                            "list the working directory": lambda: sorted(os.listdir(".")),
                            "list the open directory": lambda: sorted(os.listdir(descriptor)),
                            "read through the working directory": lambda: Path("new").read_bytes(),
                            "read the open file": lambda: os.pread(fd, 100, 0),
                            "size of the open file": lambda: os.fstat(fd).st_size,
                            "mode": lambda: oct(os.stat("file").st_mode),
                            "read by path": (directory / "file").read_bytes,
                        }
                    )
            finally:
                os.fchdir(home)
                os.close(home)
    assert found == {
        "list the working directory": ["file", "new"],
        "list the open directory": ["file", "new"],
        "read through the working directory": b"new",
        "read the open file": b"content",
        "size of the open file": 7,
        "mode": "0o100600",
        "read by path": b"content",
    }
