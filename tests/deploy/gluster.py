"""A replicated GlusterFS volume of two bricks on this machine, with a client for each of two hosts.

The bricks and clients are started from volume files, without glusterd: this needs no state outside the test's
directory. The translators are those of a volume that `gluster volume create NAME replica 2` makes with its defaults.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.ports import accepts, free_port
from tests.server import reachable_directory, remove_tree
from tests.server_processes import wait_until
from tests.watchdog import abort_connection, unmount_lazily

REPLICAS = 2

_BRICK = """
volume posix
  type storage/posix
  option directory {directory}
end-volume
volume locks
  type features/locks
  subvolumes posix
end-volume
volume index
  type features/index
  option index-base {directory}/.glusterfs/indices
  option xattrop-dirty-watchlist trusted.afr.dirty
  option xattrop-pending-watchlist trusted.afr.
  subvolumes locks
end-volume
volume brick
  type performance/io-threads
  subvolumes index
end-volume
volume server
  type protocol/server
  option transport-type tcp
  option transport.socket.bind-address 127.0.0.1
  option transport.socket.listen-port {port}
  option auth.addr.brick.allow 127.0.0.1
  subvolumes brick
end-volume
"""
_TO_BRICK = """
volume client-{number}
  type protocol/client
  option transport-type tcp
  option remote-host 127.0.0.1
  option remote-port {port}
  option remote-subvolume brick
  option ping-timeout 5
end-volume
"""
_CLIENT = """
volume replicate
  type cluster/replicate
  option afr-pending-xattr client-0,client-1
  subvolumes client-0 client-1
end-volume
volume utime
  type features/utime
  subvolumes replicate
end-volume
volume write-behind
  type performance/write-behind
  subvolumes utime
end-volume
volume open-behind
  type performance/open-behind
  subvolumes write-behind
end-volume
volume quick-read
  type performance/quick-read
  subvolumes open-behind
end-volume
volume md-cache
  type performance/md-cache
  subvolumes quick-read
end-volume
"""


def is_installed() -> bool:
    return shutil.which("glusterfs") is not None and shutil.which("glusterfsd") is not None


class Volume:
    """The volume.

    Attributes:
        bricks: the directories in which the bricks store the files.
        clients: the directories where the clients show the volume.
    """

    def __init__(self, state: Path) -> None:
        self.bricks = [state / f"brick-{number}" for number in range(REPLICAS)]
        self.clients = [state / f"client-{number}" for number in range(REPLICAS)]
        self._state = state
        self._ports = [free_port() for _ in self.bricks]
        self._servers: list[subprocess.Popen[bytes] | None] = [None] * REPLICAS
        self._mounted: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for directory in self.clients:
            directory.mkdir()
        for directory in self.bricks:
            (directory / ".glusterfs").mkdir(parents=True)
        for number in range(REPLICAS):
            self.start_brick(number)
        to_bricks = [_TO_BRICK.format(number=number, port=port) for number, port in enumerate(self._ports)]
        volume_file = self._state / "client.vol"
        volume_file.write_text("".join(to_bricks) + _CLIENT)
        for client in self.clients:
            # The caches of the kernel would hide changes for a while that the client itself knows of.
            process = self._run("glusterfs", volume_file, client.name, "--acl", "--entry-timeout=0", str(client))
            self._mounted.append(process)
        # A client answers only after it is connected to a brick.
        assert wait_until(lambda: all(map(os.path.ismount, self.clients))), self.log()

    def start_brick(self, number: int) -> None:
        directory, port = self.bricks[number], self._ports[number]
        volume_file = self._state / f"{directory.name}.vol"
        volume_file.write_text(_BRICK.format(directory=directory, port=port))
        self._servers[number] = self._run("glusterfsd", volume_file, directory.name)
        assert wait_until(lambda: accepts(port)), self.log()

    def kill_brick(self, number: int) -> None:
        process = self._servers[number]
        if process is not None:
            process.kill()
            process.wait(20)
            self._servers[number] = None

    @contextmanager
    def hanging_client(self, number: int) -> Iterator[None]:
        """A client that answers nothing."""
        self._mounted[number].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._mounted[number].send_signal(signal.SIGCONT)

    def stop(self) -> None:
        for process, client in zip(self._mounted, self.clients, strict=False):
            abort_connection(str(client))
            unmount_lazily(str(client))
            process.kill()
            process.wait(20)
        for number in range(REPLICAS):
            self.kill_brick(number)

    def log(self) -> str:
        return "".join(path.read_text() for path in self._state.glob("*.log"))

    def _run(self, program: str, volume_file: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        state = self._state
        files = [f"--log-file={state}/{name}.log", f"--pid-file={state}/{name}.pid"]
        return subprocess.Popen([program, "--no-daemon", f"--volfile={volume_file}", *files, *arguments])


@contextmanager
def volume() -> Iterator[Volume]:
    """A running volume; it ends with the block."""
    state = reachable_directory("llloop-gluster-")
    made = Volume(state)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        remove_tree(state)
