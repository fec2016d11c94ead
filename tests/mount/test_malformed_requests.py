"""Requests of any bytes before a front with a real mount: it refuses what is malformed and goes on.

A mount is made, and instead of the kernel's requests its loop is fed made-up ones, in a process that may crash.
Their answers go to the real /dev/fuse, which waits for none of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import llfuse
import pytest

from llloop.config import ServeConfig
from llloop.front.context import build_context
from llloop.front.inodes import ROOT
from llloop.front.llfuse.operations import Operations
from llloop.front.loop import Loop
from llloop.front.requester import Requester
from llloop.linux import mounts
from llloop.shared.journal import Journal
from llloop.shared.negotiation import MAX_WRITE
from llloop.shared.slots import Slots
from llloop.shared.table import Table
from llloop.supervisor import connection, mounting
from tests.hostile import Choices, hostile_request
from tests.server import reachable_directory, remove_tree
from tests.watchdog import unmount_lazily

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop, pytest.mark.user]

REQUESTS = 4000


def feed(source: Path, mountpoint: Path, seed: int) -> None:
    """Serve made-up requests until they are used up."""
    config = ServeConfig(source=str(source), mountpoint=str(mountpoint), workers=1)
    device = mounting.mount(config, str(mountpoint), Operations()).device
    made = connection.initialise(device, config, str(source))
    slots, journal, table = Slots(4, MAX_WRITE, 1), Journal(1 << 16), Table(1 << 16)
    slots.set_front(os.getpid())
    reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    root = os.open(source, os.O_PATH | os.O_DIRECTORY)
    context = build_context(config, made.capabilities, slots, journal, table, [writer], root, device)
    nodeids = [ROOT, *(context.tree.lookup(ROOT, name)[0] for name in (b"file", b"directory", b"out"))]
    handles = [context.files.open(nodeids[1], os.O_RDWR, False, Requester(0, 0))[0]]
    choose = random.Random(seed)
    numbers = iter(range(1, REQUESTS + 1))
    real_readv = os.readv

    def readv(fd: int, buffers: list[Any]) -> int:
        if fd != device:
            return real_readv(fd, buffers)
        number = next(numbers, None)
        if number is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        for slot in range(4):  # no worker receives them
            slots.give_back(slot)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.read(reader, 4096)
        # Larger than all numbers that the kernel assigns.
        packet = hostile_request(Choices(choose.randbytes(200)), number << 40, nodeids, handles)[: len(buffers[0])]
        buffers[0][: len(packet)] = packet
        return len(packet)

    with mock.patch("os.readv", readv):
        Loop(context, device, journal).run()
    llfuse.close()
    print("survived")


@pytest.mark.parametrize("seed", range(2))
def test_front_answers_malformed_requests(seed: int) -> None:
    place = reachable_directory("llloop-hostile-")
    mountpoint = place / "mnt"
    try:
        (place / "canary").write_text("untouched")
        for directory in (mountpoint, place / "source", place / "source" / "directory"):
            directory.mkdir()
        (place / "source" / "file").write_bytes(b"content")
        (place / "source" / "out").symlink_to("..")
        top = Path(__file__).parents[2]
        arguments = [str(place / "source"), str(mountpoint), str(seed)]
        command = [sys.executable, "-m", "tests.mount.test_malformed_requests", *arguments]
        done = subprocess.run(command, cwd=top, capture_output=True, text=True, timeout=50)
        assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr[-3000:]
        assert (place / "canary").read_text() == "untouched"
        assert sorted(os.listdir(place)) == ["canary", "mnt", "source"]
    finally:
        if mounts.find_mount(str(mountpoint)):
            unmount_lazily(str(mountpoint))
        remove_tree(place)


if __name__ == "__main__":
    feed(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
