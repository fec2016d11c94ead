"""Two mounts over two clients of one GlusterFS volume, as two hosts would have them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.deploy import gluster
from tests.expect import pattern
from tests.server import Server
from tests.server_processes import wait_until

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.own_loop,
    pytest.mark.root,
    pytest.mark.skipif(not gluster.is_installed(), reason="needs GlusterFS (glusterfs-server)"),
]
SIZE = 1_500_000  # bytes


@pytest.fixture
def volume() -> Iterator[gluster.Volume]:
    with gluster.volume() as made:
        yield made


@pytest.fixture
def hosts(volume: gluster.Volume, serve: Serve) -> list[Server]:
    """A mount over each client."""
    return [serve("--workers", "4", source=client) for client in volume.clients]


def seen(condition: Callable[[], object]) -> bool:
    """Whether a condition holds soon: clients and mounts may keep attributes and names for a second each."""

    def holds() -> bool:
        try:
            return bool(condition())
        except OSError:
            return False

    return wait_until(holds)


def test_two_mounts_see_each_others_changes(hosts: list[Server]) -> None:
    assert all("metadata through workers" in host.output.read_text() for host in hosts)
    here, there = (host.mountpoint for host in hosts)
    content = pattern(SIZE)
    (here / "file").write_bytes(content)
    assert seen(lambda: (there / "file").read_bytes() == content)
    with (there / "file").open("ab") as file:
        file.write(b"more")
    assert seen(lambda: (here / "file").read_bytes() == content + b"more")
    os.truncate(there / "file", 10)
    assert seen(lambda: (here / "file").read_bytes() == content[:10])
    (here / "file").chmod(0o640)
    assert seen(lambda: (there / "file").stat().st_mode & 0o777 == 0o640)
    (here / "directory").mkdir()
    assert seen((there / "directory").is_dir)
    (there / "file").rename(there / "directory" / "moved")
    assert seen(lambda: not (here / "file").exists() and os.listdir(here / "directory") == ["moved"])
    os.setxattr(here / "directory" / "moved", "user.key", b"value")
    assert seen(lambda: os.getxattr(there / "directory" / "moved", "user.key") == b"value")
    os.link(there / "directory" / "moved", there / "link")
    assert seen(lambda: (here / "link").stat().st_nlink == 2)
    (here / "directory" / "moved").unlink()
    (here / "directory").rmdir()
    assert seen(lambda: os.listdir(there) == ["link"])


# Writes files of known content and reads each of them back; what it prints tells what is wrong.
WRITER = """
import os, sys
directory, name, count, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for number in range(count):
    path = f"{directory}/{name}-{number}"
    content = bytes([number]) * size
    with open(path, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    with open(path, "rb") as file:
        assert file.read() == content, path
print("done", flush=True)
"""


def start_writer(host: Server, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(host.mountpoint), name, str(count), "300000"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_brick_that_is_killed_and_returns_loses_nothing(volume: gluster.Volume, hosts: list[Server]) -> None:
    writers = [start_writer(host, f"host-{number}", 40) for number, host in enumerate(hosts)]
    try:
        assert seen(lambda: len(os.listdir(volume.bricks[0])) > 10)
        volume.kill_brick(0)
        known = len(os.listdir(volume.bricks[1]))
        assert seen(lambda: len(os.listdir(volume.bricks[1])) > known + 10)
        volume.start_brick(0)
        assert [writer.communicate(timeout=60)[0] for writer in writers] == ["done\n"] * 2
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    wanted = digests(volume.clients[0])
    assert len(wanted) == 80
    assert seen(lambda: all(digests(host.mountpoint) == wanted for host in hosts))
    for host in hosts:
        assert seen(partial(reaches, host.mountpoint, volume.bricks[0])), "a client is not connected to the brick again"


def reaches(mountpoint: Path, brick: Path) -> bool:
    """Whether a new file in *mountpoint* is stored in *brick*."""
    path = mountpoint / f"new-{time.monotonic_ns()}"
    path.touch()
    return (brick / path.name).exists()


def test_client_that_hangs_stops_only_its_own_mount(volume: gluster.Volume, hosts: list[Server]) -> None:
    hung, other = hosts
    (other.mountpoint / "file").write_bytes(pattern(SIZE))
    assert seen((hung.mountpoint / "file").exists)
    read: list[bytes] = []
    with volume.hanging_client(0):
        reader = threading.Thread(target=lambda: read.append((hung.mountpoint / "file").read_bytes()), daemon=True)
        reader.start()
        for number in range(20):
            (other.mountpoint / f"new-{number}").write_bytes(b"new")
        assert (other.mountpoint / "file").read_bytes() == pattern(SIZE)
        shown = subprocess.run(
            [sys.executable, "-m", "llloop", "status", str(hung.mountpoint)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        # It says "serving" or, once the source has not answered for a while, "degraded".
        assert f"mirrors {hung.source}" in shown.stdout, shown.stderr
    reader.join(60)
    assert read == [pattern(SIZE)]
    assert seen(lambda: len(os.listdir(hung.mountpoint)) == 21)
