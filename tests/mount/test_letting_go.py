"""`llloop control MNT release PATH`: file systems below the source can be unmounted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import filesystems
from tests.conftest import Serve
from tests.mount.command_line import Ended, llloop
from tests.server import Server
from tests.server_processes import titles
from tests.syscalls import opened

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop]

IN_USE = 7  # exit code


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system that is mounted in a directory, which is to be the source."""
    place = tmp_path / "source" / "disk"
    place.mkdir(parents=True)
    with (
        filesystems.tmpfs(tmp_path / "tmpfs", "size=1m")
        if request.param == "tmpfs"
        else filesystems.ext4(tmp_path) as path
    ):
        subprocess.run(["mount", "--bind", path, place], check=True)
        try:
            yield place
        finally:
            # The test has unmounted it, unless it failed; then the server still uses it.
            subprocess.run(["umount", "-q", "-l", place], check=False)


def use(server: Server) -> None:
    """Makes llloop open directories and files of the disk."""
    (server.mountpoint / "disk" / "directory" / "below").mkdir(parents=True, exist_ok=True)
    file = server.mountpoint / "disk" / "directory" / "below" / "file"
    file.write_bytes(bytes(300_000))
    assert file.read_bytes() == bytes(300_000)
    with opened(file, os.O_RDWR) as fd:
        os.fsync(fd)
        file.unlink()
    file.write_bytes(b"content")
    assert os.listdir(server.mountpoint / "disk" / "directory") == ["below"]


def is_busy(place: Path) -> bool:
    """Whether it cannot be unmounted; otherwise it is unmounted."""
    ended = subprocess.run(["umount", "-c", place], capture_output=True, check=False)
    assert ended.returncode == 0 or b"busy" in ended.stderr, ended.stderr
    return ended.returncode != 0


def release(server: Server, path: Path | str) -> Ended:
    return llloop("control", server.mountpoint, "release", path)


@pytest.mark.root
@pytest.mark.parametrize("below", ["source", "mount"])
def test_file_system_can_be_unmounted(serve: Serve, disk: Path, below: str) -> None:
    server = serve(source=disk.parent)
    use(server)
    assert is_busy(disk)
    path = disk if below == "source" else server.mountpoint / "disk"
    ended = release(server, path)
    assert (ended.code, ended.stdout, ended.stderr) == (0, "", "")
    assert not is_busy(disk)
    assert os.listdir(server.mountpoint / "disk") == []
    server.stop()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["open", "mapped"])
def test_programs_that_use_it_are_named(serve: Serve, disk: Path, kind: str) -> None:
    server = serve(source=disk.parent)
    use(server)
    path = server.mountpoint / "disk" / "directory" / "below" / "file"
    code = f"import mmap, os, sys\nfd = os.open({str(path)!r}, os.O_RDONLY)\n"
    if kind == "mapped":
        code += "used = mmap.mmap(fd, 0, prot=mmap.PROT_READ)\nos.close(fd)\n"
    code += "print(flush=True)\nsys.stdin.read()"
    arguments = [sys.executable, "-c", code]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout
        user.stdout.readline()
        ended = release(server, disk)
        assert ended.code == IN_USE
        name = Path(f"/proc/{user.pid}/comm").read_text().strip()
        assert f"in use by {name} (process {user.pid})" in ended.complaint()
        assert is_busy(disk)
        user.communicate()
    assert release(server, disk).code == 0
    assert not is_busy(disk)
    server.stop()


@pytest.mark.root
def test_front_has_died(serve: Serve, disk: Path) -> None:
    server = serve(source=disk.parent)
    server.expect_log("takes over")
    use(server)
    os.kill(titles(server)["llloop-front"], signal.SIGKILL)
    assert release(server, disk).code == 0
    assert not is_busy(disk)
    server.stop()


@pytest.mark.root
def test_watched_source(serve: Serve, disk: Path) -> None:
    server = serve("--watch", source=disk.parent)
    use(server)
    assert release(server, disk).code == 0
    assert not is_busy(disk)
    server.stop()


@pytest.mark.user
def test_programs_notice_nothing(serve: Serve) -> None:
    server = serve()
    with opened(server.mountpoint / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.unlink(server.mountpoint / "file")
        for number in range(5):
            os.write(fd, b"x")
            (server.mountpoint / f"{number}").mkdir()
            assert release(server, server.mountpoint / f"{number}").code == 0
        assert os.pread(fd, 10, 0) == b"xxxxx"
    assert sorted(os.listdir(server.mountpoint)) == [f"{number}" for number in range(5)]


@pytest.mark.user
def test_other_paths_are_refused(serve: Serve) -> None:
    server = serve()
    for ended, problem in (
        (release(server, "/etc"), "neither below"),
        (release(server, server.mountpoint), "llloop serves this directory"),
        (release(server, server.source), "llloop serves this directory"),
        (llloop("control", server.mountpoint, "release"), "release needs a path"),
        (llloop("control", server.mountpoint, "stop", "path"), "stop takes no argument"),
        (llloop("control", server.mountpoint, "log-level", "loud"), "not loud"),
    ):
        assert ended.code == 2
        assert problem in ended.complaint()
    assert release(server, server.source / "missing").code == 0
