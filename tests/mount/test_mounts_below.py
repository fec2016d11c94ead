"""Mounts below the source: a directory or file with several paths behaves as in the source."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.expect import outcome
from tests.filesystems import make_image, mounted, tmpfs
from tests.server import Server, reachable_directory
from tests.server_processes import is_replaced, process_ids, wait_until
from tests.syscalls import opened

pytestmark = pytest.mark.root


@pytest.fixture
def source() -> Iterator[Path]:
    """A source with the directories `one` and `two`, the first of which has something in it."""
    holder = reachable_directory("llloop-below-")
    try:
        source = holder / "source"
        (source / "one" / "inner").mkdir(parents=True)
        (source / "one" / "inner" / "file").write_bytes(b"content")
        (source / "two").mkdir()
        yield source
    finally:
        shutil.rmtree(holder)


@contextmanager
def bound(what: Path, where: Path, *options: str) -> Iterator[Path]:
    with mounted(what, where, "--bind") as path:
        if options:
            subprocess.run(["mount", "-o", f"remount,bind,{','.join(options)}", where], check=True, timeout=30)
        yield path


@contextmanager
def serving(serve: Serve, source: Path, *arguments: str) -> Iterator[Server]:
    """A mount that ends with the block, before what is mounted below its source goes."""
    server = serve(*arguments, source=source)
    try:
        yield server
    finally:
        server.stop()


def working_directory_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/cwd")


@contextmanager
def process_in(directory: Path) -> Iterator[int]:
    with subprocess.Popen(["sleep", "60"], cwd=directory) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def test_directory_with_two_paths_is_at_both(serve: Serve, source: Path) -> None:
    with bound(source / "one", source / "two"), serving(serve, source) as server:
        mnt = server.mountpoint
        with process_in(mnt / "one" / "inner") as pid, opened(mnt / "one" / "inner", os.O_RDONLY) as fd:
            for name in ("two", "one", "two"):
                assert os.listdir(mnt / name / "inner") == ["file"]
                assert (mnt / name / "inner" / "file").read_bytes() == b"content"
                assert working_directory_of(pid) == str(mnt / "one" / "inner")
                assert os.readlink(f"/proc/self/fd/{fd}") == str(mnt / "one" / "inner")
        assert (mnt / "two" / "inner").stat().st_ino == (source / "one" / "inner").stat().st_ino


@pytest.mark.mounted
def test_mount_point_inside_the_mount_stays(serve: Serve, source: Path) -> None:
    with bound(source / "one", source / "two"), serving(serve, source) as server:
        mnt = server.mountpoint
        with tmpfs(mnt / "one" / "inner", "size=1m"):
            assert os.listdir(mnt / "two" / "inner") == ["file"]
            assert os.listdir(mnt / "one" / "inner") == []
            assert os.listdir(mnt / "two" / "inner") == ["file"]


def test_source_bound_into_itself(serve: Serve, source: Path) -> None:
    with bound(source, source / "two"), serving(serve, source) as server:
        mnt = server.mountpoint
        with process_in(mnt / "one") as pid:
            assert sorted(os.listdir(mnt / "two")) == ["one", "two"]
            assert (mnt / "two" / "one" / "inner" / "file").read_bytes() == b"content"
            assert os.listdir(mnt / "two" / "two") == []
            assert working_directory_of(pid) == str(mnt / "one")
        native, mirrored = (
            subprocess.run(["find", "."], cwd=side, capture_output=True, text=True, timeout=20)
            for side in (source, mnt)
        )
        assert sorted(mirrored.stdout.splitlines()) == sorted(native.stdout.splitlines())
        assert mirrored.stderr == native.stderr


def test_one_device_mounted_twice(serve: Serve, source: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", 16 << 20, "ext4", "-F")
    with ExitStack() as stack:
        one = stack.enter_context(mounted(image, source / "one", "-o", "loop"))
        device = next(line.split()[0] for line in Path("/proc/mounts").read_text().splitlines() if str(one) in line)
        stack.enter_context(mounted(device, source / "two"))
        (one / "inner").mkdir()
        (one / "inner" / "file").write_bytes(b"content")
        server = stack.enter_context(serving(serve, source))
        mnt = server.mountpoint
        with process_in(mnt / "one" / "inner") as pid:
            for name in ("two", "one", "two"):
                assert (mnt / name / "inner" / "file").read_bytes() == b"content"
                assert working_directory_of(pid) == str(mnt / "one" / "inner")


def test_file_with_two_paths_is_one_file(serve: Serve, source: Path) -> None:
    with bound(source / "one", source / "two"), serving(serve, source) as server:
        one, two = (server.mountpoint / name / "inner" / "file" for name in ("one", "two"))
        with opened(one, os.O_RDWR) as here, opened(two, os.O_RDWR) as there:
            for number in range(20):
                content = b"%d" % number * (number + 7)
                os.pwrite(here, content, 0)
                assert os.pread(there, 100, 0) == content
                assert two.stat().st_size == len(content)
            assert os.path.samestat(os.fstat(here), os.fstat(there))
        assert outcome(os.rename, one, two.with_name("moved")) == "EXDEV"
        for path in (one, two, one):
            path.stat()
            os.link(path, path.with_name("link"))
            assert path.stat().st_nlink == 2
            os.unlink(path.with_name("link"))
        os.rename(one, one.with_name("renamed"))
        assert one.with_name("renamed").read_bytes() == content
        os.unlink(one.with_name("renamed"))
        assert outcome((source / "two" / "inner" / "file").stat) == "ENOENT"


def test_mount_flags_apply_to_their_path_only(serve: Serve, source: Path) -> None:
    with bound(source / "one", source / "two", "ro"), serving(serve, source) as server:
        one, two = (server.mountpoint / name / "inner" / "file" for name in ("one", "two"))
        for _ in range(2):
            for path in (one, two, one):
                path.stat()
            assert outcome(os.open, two, os.O_WRONLY) == "EROFS"
            assert outcome(os.truncate, two, 0) == "EROFS"
            assert outcome(os.chmod, two, 0o600) == "EROFS"
            assert outcome(os.unlink, two) == "EROFS"
            assert outcome(os.utime, two) == "EROFS"
            with opened(two, os.O_RDONLY):
                one.write_bytes(b"written")
                os.chmod(one, 0o640)
        assert (source / "one" / "inner" / "file").read_bytes() == b"written"


def test_mount_point_of_the_source_cannot_be_removed_or_moved(serve: Serve, source: Path) -> None:
    (source / "one" / "point").touch()
    with ExitStack() as stack:
        stack.enter_context(bound(source / "one", source / "two"))
        stack.enter_context(bound(source / "one" / "inner" / "file", source / "one" / "point"))
        mnt = stack.enter_context(serving(serve, source)).mountpoint
        for _ in range(2):
            assert outcome(os.rmdir, mnt / "two") == "EBUSY"
            assert outcome(os.rename, mnt / "two", mnt / "three") == "EBUSY"
            assert outcome(os.unlink, mnt / "one" / "point") == "EBUSY"
            assert outcome(os.rename, mnt / "one" / "point", mnt / "one" / "moved") == "EBUSY"
            assert outcome(os.rename, mnt / "one" / "inner", mnt / "two" / "other") == "EXDEV"
        assert (mnt / "one" / "point").read_bytes() == b"content"
        assert sorted(os.listdir(mnt / "two")) == ["inner", "point"]


@pytest.mark.within_a_second
def test_mounts_and_unmounts_below_the_source_are_seen(serve: Serve, source: Path) -> None:
    (source / "two" / "below").mkdir()
    with serving(serve, source) as server:
        mnt = server.mountpoint

        def shows(*names: str) -> bool:
            return wait_until(lambda: sorted(os.listdir(mnt / "two")) == sorted(names))

        with process_in(mnt / "two" / "below") as pid:
            assert shows("below")
            with bound(source / "one", source / "two"):
                assert shows("inner")
                assert (mnt / "two" / "inner" / "file").read_bytes() == b"content"
                # A directory that the server has open keeps the mount busy.
                subprocess.run(["umount", "-l", source / "two"], check=True, timeout=30)
                assert shows("below")
                assert (mnt / "two" / "below").is_dir()
                subprocess.run(["mount", "--bind", source / "one", source / "two"], check=True, timeout=30)
                assert shows("inner")
                subprocess.run(["umount", "-l", source / "two"], check=True, timeout=30)
                assert shows("below")
                subprocess.run(["mount", "--bind", source / "one", source / "two"], check=True, timeout=30)
            assert os.path.isdir(f"/proc/{pid}/cwd/")


@pytest.mark.mounted
@pytest.mark.own_loop
def test_paths_stay_distinct_after_death_of_the_front(serve: Serve, source: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(bound(source / "one", source / "two"))
        server = stack.enter_context(serving(serve, source))
        server.expect_log("llloop-front was killed by signal 9")
        mnt = server.mountpoint
        one, two = (mnt / name / "inner" for name in ("one", "two"))
        here, there = (stack.enter_context(opened(path, os.O_RDONLY)) for path in (one, two))
        pid = stack.enter_context(process_in(one))
        (front,) = process_ids(server, "front")
        os.kill(front, signal.SIGKILL)
        assert is_replaced(server, "front", front)
        for path, fd in ((two, there), (one, here)) * 2:
            assert os.listdir(path) == os.listdir(fd) == ["file"]
            assert os.stat("file", dir_fd=fd).st_size == 7
            assert working_directory_of(pid) == str(one)
            assert os.readlink(f"/proc/self/fd/{fd}") == str(path)
