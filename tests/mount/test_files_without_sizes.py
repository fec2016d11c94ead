"""Files with size 0 that have data: proc, sysfs, cgroup, and other FUSE file systems."""

import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.expect import outcome
from tests.filesystems import mounted
from tests.server import Server, reachable_directory
from tests.syscalls import opened

pytestmark = [pytest.mark.root, pytest.mark.own_loop]


@pytest.fixture(params=[(), ("--cache", "always")], ids=["", "always"])
def server(serve: Serve, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A mirror of a directory with proc, sysfs and a cgroup hierarchy of its own below it."""
    holder = reachable_directory("llloop-sizes-")
    try:
        with ExitStack() as stack:
            for kind in ("proc", "sysfs"):
                stack.enter_context(mounted(kind, holder / kind, "-t", kind))
            server = serve(*request.param, source=holder)
            stack.callback(server.stop)
            yield server
    finally:
        shutil.rmtree(holder)


def same_as_in_source(server: Server, name: str) -> bytes:
    content = (server.source / name).read_bytes()
    assert (server.mountpoint / name).read_bytes() == content != b""
    return content


def test_files_are_read_completely(server: Server, tmp_path: Path) -> None:
    for name in ("proc/filesystems", "proc/1/status", "proc/crypto", "sysfs/kernel/mm/transparent_hugepage/enabled"):
        content = same_as_in_source(server, name)
        path = server.mountpoint / name
        subprocess.run(["cp", path, tmp_path / "copy"], check=True, timeout=20)
        assert (tmp_path / "copy").read_bytes() == content
        head = subprocess.run(["head", "-c", "7", path], capture_output=True, check=True, timeout=30)
        assert head.stdout == content[:7]
        with opened(path, os.O_RDONLY) as fd:
            assert os.pread(fd, 5, 2) == content[2:7]
            os.lseek(fd, 3, os.SEEK_SET)
            assert os.read(fd, 4) == content[3:7]
            assert os.pread(fd, 10, 10_000_000) == b""


def test_files_are_not_cached(server: Server) -> None:
    """Their times do not change with their content."""
    with opened(server.mountpoint / "proc" / "uptime", os.O_RDONLY) as fd:
        seen = {os.pread(fd, 100, 0) for _ in range(1000)}
    native = (server.source / "proc" / "uptime").read_bytes()
    assert all(len(one.split()) == 2 for one in seen)
    assert float(native.split()[0]) >= max(float(one.split()[0]) for one in seen)
    value = server.mountpoint / "proc" / "sys" / "kernel" / "domainname"
    before = value.read_bytes()
    try:
        for name in (b"longer than that\n", b"short\n"):
            (server.source / value.relative_to(server.mountpoint)).write_bytes(name)
            assert value.read_bytes() == name
    finally:
        value.write_bytes(before)
    assert (server.source / value.relative_to(server.mountpoint)).read_bytes() == before


def test_each_write_is_one_system_call(server: Server) -> None:
    """Such a write is a command: it must arrive complete, and once."""
    name = Path("proc/sys/kernel/domainname")
    before = (server.source / name).read_bytes()
    try:
        with opened(server.mountpoint / name, os.O_WRONLY | os.O_TRUNC) as fd:
            assert os.write(fd, b"by-write\n") == 9
        assert (server.source / name).read_bytes() == b"by-write\n"
        with opened(server.mountpoint / name, os.O_WRONLY | os.O_APPEND) as fd:
            assert os.write(fd, b"by-append\n") == 10
        assert same_as_in_source(server, str(name)) == b"by-append\n"
        subprocess.run(f"echo by-shell > {server.mountpoint / name}", shell=True, check=True, timeout=30)
        assert same_as_in_source(server, str(name)) == b"by-shell\n"
    finally:
        (server.source / name).write_bytes(before)
    wrong = Path("proc/sys/vm/swappiness")
    with opened(server.mountpoint / wrong, os.O_WRONLY) as fd:
        assert outcome(os.write, fd, b"not a number\n") == "EINVAL"


def test_cgroup_is_created_and_controlled(serve: Serve) -> None:
    holder = reachable_directory("llloop-cgroup-")
    group = f"llloop-test-{os.getpid()}"
    try:
        with mounted("cgroup2", holder / "cgroup", "-t", "cgroup2") as hierarchy:
            server = serve(source=holder)
            below = server.mountpoint / "cgroup" / group
            try:
                below.mkdir()
                with subprocess.Popen(["sleep", "60"]) as process:
                    (below / "cgroup.procs").write_text(f"{process.pid}\n")
                    assert (below / "cgroup.procs").read_text() == f"{process.pid}\n"
                    assert (below / "cgroup.events").read_text().startswith("populated 1\n")
                    (below / "cgroup.kill").write_text("1")
                    assert process.wait(30) == -9
                assert (below / "cgroup.procs").read_text() == ""
            finally:
                if (hierarchy / group).is_dir():
                    (hierarchy / group).rmdir()
                server.stop()
    finally:
        shutil.rmtree(holder)


def test_files_of_another_fuse_server_are_read_completely(serve: Serve, server: Server) -> None:
    """Its empty files are empty, and data written to them is there."""
    outer = serve(source=server.mountpoint)
    try:
        assert (outer.mountpoint / "proc" / "devices").read_bytes() == (server.source / "proc" / "devices").read_bytes()
        empty = outer.mountpoint / "empty"
        empty.touch()
        assert empty.read_bytes() == b""
        with opened(empty, os.O_RDWR) as fd, opened(empty, os.O_RDONLY) as reader:
            os.write(fd, b"written")
            assert os.pread(reader, 100, 0) == b"written"
            with mmap.mmap(fd, 7) as memory:
                memory[:5] = b"WRITT"
                memory.flush()
        assert empty.read_bytes() == (server.source / "empty").read_bytes() == b"WRITTen"
    finally:
        outer.stop()


def test_ordinary_files_are_cached_and_mapped(server: Server) -> None:
    path = server.mountpoint / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"some content")
        with mmap.mmap(fd, 12) as memory:
            memory[:4] = b"more"
            memory.flush()
    assert (server.source / "file").read_bytes() == b"more content"
