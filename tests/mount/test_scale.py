"""Large trees and many open files need few descriptors, and no memory for forgotten inodes."""

import errno
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.as_user import Child
from tests.conftest import Serve
from tests.expect import fails, outcome
from tests.kernel_caches import forget_unused
from tests.server import Tree, reachable_directory, source_parent
from tests.server_processes import descriptors, private_memory, titles, wait_until
from tests.syscalls import opened

DIRECTORIES, FILES = 2_000, 100
OPEN_FILES = 5_000


def with_descriptor_limit(limit: int) -> list[str]:
    """The command, unable to raise its limit again: root's could, but for the right that is taken away here."""
    server = [sys.executable, "-m", "llloop", "serve"]
    if os.geteuid() == 0:
        server = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource", *server]
    return ["/bin/sh", "-c", f'ulimit -n {limit} && exec "$0" "$@"', *server]


@pytest.fixture
def forest() -> Iterator[Path]:
    """200,000 files in two halves."""
    directory = reachable_directory("llloop-forest-", source_parent())
    try:
        for half in ("first", "second"):
            (directory / half).mkdir()
            for number in range(DIRECTORIES // 2):
                below = directory / half / f"directory{number:04d}"
                below.mkdir()
                for file in range(FILES):
                    os.mknod(below / f"file{file:03d}")
        yield directory
    finally:
        shutil.rmtree(directory)


def walk(root: Path) -> int:
    """find -ls: every name is listed and every inode asked for."""

    def fail(error: OSError) -> None:
        raise error

    count = 0
    for directory, names, files in os.walk(root, onerror=fail):
        for name in names + files:
            os.lstat(f"{directory}/{name}")
            count += 1
    return count


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.mounted
@pytest.mark.timeout(240)
def test_large_tree_needs_few_descriptors_and_is_forgotten(serve: Serve, forest: Path) -> None:
    server = serve(source=forest, command=with_descriptor_limit(1024))
    front = titles(server)["llloop-front"]
    expected = DIRECTORIES // 2 * (1 + FILES)
    start = private_memory(front)
    assert walk(server.mountpoint / "first") == expected
    assert len(descriptors(front)) < 1024
    peak = private_memory(front)
    forget_unused(server.mountpoint)
    settle(front)
    after_first = private_memory(front)
    assert walk(server.mountpoint / "second") == expected
    forget_unused(server.mountpoint)
    settle(front)
    after_second = private_memory(front)
    # The interpreter keeps freed memory for its next objects, so the second half must fit into the memory of the first.
    told = f"start {start}, peak {peak}, after the first half {after_first}, after the second {after_second}"
    assert after_second - after_first < max((peak - start) / 4, 4 << 20), told
    # The closed files can be opened again.
    assert os.listdir(server.mountpoint / "first" / "directory0000")
    assert (server.mountpoint / "first" / "directory0000" / "file000").read_bytes() == b""


def settle(pid: int) -> None:
    """FORGETs are on their way when the kernel has let go; they are over when the process's CPU time stands still."""

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def idle() -> bool:
        before = ticks()
        time.sleep(0.3)
        return ticks() == before

    assert wait_until(idle, 30)


@pytest.mark.mounted
def test_deep_tree_needs_few_descriptors(serve: Serve) -> None:
    server = serve(command=with_descriptor_limit(160))
    depth = 400
    path, mounted = server.source, server.mountpoint
    here = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    with opened("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=here) as fd:
        os.write(fd, b"found")
    os.close(here)
    bottom = mounted / "/".join(["d"] * depth) / "bottom"
    assert bottom.read_bytes() == b"found"
    bottom.with_name("made").write_bytes(b"made")
    assert walk(mounted) == depth + 2


def use_many(directory: Path, count: int) -> dict[str, int]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = [os.open(directory / f"{number}", os.O_RDWR | os.O_CREAT) for number in range(count)]
    for number, fd in enumerate(files):
        assert os.pwrite(fd, b"file %05d" % number, number) == 10
    wrong = sum(os.pread(fd, 100, number) != b"file %05d" % number for number, fd in enumerate(files))
    sizes = sum(os.fstat(fd).st_size != number + 10 for number, fd in enumerate(files))
    for fd in files:
        os.close(fd)
    return {"wrong": wrong, "wrong sizes": sizes}


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * OPEN_FILES, reason="the hard limit of open files is too low"
)
@pytest.mark.timeout(120)
def test_five_thousand_files_open_at_once(serve: Serve, via: str) -> None:
    """The server starts with the usual soft limit of 1024 and raises it itself."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command = ["/bin/sh", "-c", 'ulimit -Sn 1024 && exec "$0" "$@"', sys.executable, "-m", "llloop", "serve"]
    server = serve("--workers", "2", command=command)
    processes = {} if via == "native" else titles(server)
    for title, pid in processes.items():
        if title != "llloop-supervisor":
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (hard, hard)

    def counts() -> dict[str, int]:
        return {title: len(descriptors(pid)) for title, pid in processes.items()}

    before = counts()
    assert Child(use_many, server.mountpoint, OPEN_FILES).result() == {"wrong": 0, "wrong sizes": 0}
    for number in range(0, OPEN_FILES, 7):
        assert (server.source / f"{number}").read_bytes() == bytes(number) + b"file %05d" % number
    assert wait_until(lambda: all(counts()[title] <= before[title] + 3 for title in before)), (before, counts())


@pytest.mark.mounted
def test_limit_of_the_server_gives_emfile_to_the_caller(serve: Serve) -> None:
    server = serve("--workers", "2", command=with_descriptor_limit(200))
    server.expect_log("Too many open files|EMFILE|ENFILE", required=False)
    (server.source / "there").write_bytes(b"content")
    files: list[int] = []
    try:
        result = None
        while result is None and len(files) < 1_000:
            number = len(files)
            result = outcome(
                lambda: files.append(os.open(server.mountpoint / f"{number}", os.O_RDWR | os.O_CREAT))  # noqa: B023
            )
        assert result == "EMFILE"
        # Open files still work, and so do calls that need no new descriptor.
        for number, fd in enumerate(files):
            assert os.pwrite(fd, b"x" * 50_000, 0) == 50_000, number
            assert os.pread(fd, 4, 0) == b"xxxx"
        assert (server.mountpoint / "there").stat().st_size == 7
    finally:
        for fd in files:
            os.close(fd)
    assert wait_until(lambda: outcome((server.mountpoint / "there").read_bytes) == b"content")


@pytest.mark.mounted
def test_names_work_without_free_descriptors(serve: Serve) -> None:
    """Otherwise one user who opens as many files as possible would block the mount for all."""
    server = serve("--workers", "1", command=with_descriptor_limit(300))
    mnt = server.mountpoint
    for number in range(40):
        (server.source / f"directory{number}" / "below").mkdir(parents=True)
        (server.source / f"directory{number}" / "below" / "file").write_bytes(b"content")
    for number in range(300):
        (server.source / f"{number}").touch()
    files: list[int] = []
    try:
        with fails(errno.EMFILE):
            for number in range(300):
                files.append(os.open(mnt / f"{number}", os.O_RDONLY))
        assert len(files) > 100
        for number in range(40):
            below = mnt / f"directory{number}" / "below"
            assert (below / "file").stat().st_size == 7
            os.mkdir(below / "new")
            os.rename(below / "file", below / "new" / "moved")
            os.chmod(below / "new" / "moved", 0o600)
            os.symlink("moved", below / "new" / "symlink")
            os.unlink(below / "new" / "moved")
        # This applies to an open file, too: the server keeps a descriptor of each file without a name.
        for number in range(10):
            os.unlink(mnt / f"{number}")
            os.replace(mnt / f"{number + 10}", mnt / f"{number + 20}")
        assert os.listdir(server.source / "directory39" / "below" / "new") == ["symlink"]
    finally:
        for fd in files:
            os.close(fd)
    assert wait_until(lambda: outcome((mnt / "299").read_bytes) == b"")


def test_large_directory_is_created_listed_and_removed(tree: Tree) -> None:
    count = 5_000
    for number in range(count):
        os.mknod(tree.mnt / f"file{number}")
    assert sorted(os.listdir(tree.mnt)) == sorted(os.listdir(tree.src))
    assert len({entry.inode() for entry in os.scandir(tree.mnt)}) == count
    assert all(entry.is_file(follow_symlinks=False) for entry in os.scandir(tree.mnt))
    for number in range(count):
        os.unlink(tree.mnt / f"file{number}")
    assert os.listdir(tree.mnt) == os.listdir(tree.src) == []


@pytest.mark.root
@pytest.mark.mounted
def test_descriptors_of_removed_files_are_closed(serve: Serve) -> None:
    """The server keeps a removed file open until the kernel forgets it."""
    server = serve()
    front = titles(server)["llloop-front"]
    (server.mountpoint / "first").write_bytes(b"")
    before = len(descriptors(front))

    def fill_and_empty(remove: Callable[[Path], None], make: Callable[[Path], None]) -> None:
        for number in range(300):
            make(server.mountpoint / f"{number}")
        for number in range(300):
            remove(server.mountpoint / f"{number}")

    fill_and_empty(os.unlink, lambda path: path.touch())
    fill_and_empty(os.rmdir, os.mkdir)
    fill_and_empty(lambda path: os.replace(path, server.mountpoint / "first"), lambda path: path.touch())
    forget_unused(server.mountpoint)
    assert wait_until(lambda: len(descriptors(front)) <= before + 20), (before, len(descriptors(front)))
