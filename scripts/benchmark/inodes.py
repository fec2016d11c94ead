"""The memory of a server for each inode that the kernel knows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from . import processes
from .progress import Progress
from .servers import Server
from .site import Failed
from .tools import Unavailable, run

# Few enough that one READDIRPLUS returns a whole directory, and that no server needs many directories at a time.
PER_DIRECTORY = 800


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a server's processes (PSS), in bytes.

    Attributes:
        inodes: how many inodes the kernel looked up.
        before: the memory before the lookups.
        known: the memory when the kernel knew all of them.
        forgotten: the memory after the kernel had forgotten them.
        seconds: how long the lookups took.
    """

    inodes: int
    before: int
    known: int
    forgotten: int
    seconds: float

    @property
    def each(self) -> float:
        """The bytes for one inode."""
        return (self.known - self.before) / self.inodes


def make(top: Path, count: int, progress: Progress) -> int:
    """Make a tree of about *count* empty files and return how many directories it has."""
    directories = max(1, count // PER_DIRECTORY)
    for number in range(directories):
        progress.step(number, directories, "making the files", "native")
        directory = top / f"d{number:03}"
        directory.mkdir(parents=True)
        for file in range(PER_DIRECTORY):
            (directory / f"f{file:03}").touch()
    progress.clear()
    return directories


def measure(server: Server, load: Path, directories: int) -> Memory:
    """Make the kernel look up all files of the tree and forget them, and measure the memory.

    Args:
        server: the server. The tree is the directory "inodes" of its mount.
        load: the compiled load generator.
        directories: the number of directories in the tree.

    Raises:
        Failed: walking the tree failed.
    """
    top = server.root / "inodes"
    try:
        run([load, "drop", server.root])
        before = _settled(server)
        start = time.monotonic()
        run([load, "walk", "0", "1", top, str(directories)])
        seconds = time.monotonic() - start
        known = _settled(server)
        run([load, "drop", server.root])
    except Unavailable as reason:
        raise Failed(str(reason)) from None
    return Memory(directories * (PER_DIRECTORY + 1), before, known, _settled(server), seconds)


def _settled(server: Server) -> int:
    processes.settle(server.pids)
    return processes.memory(server.pids)


def table(found: dict[str, Memory]) -> str:
    """Return the results as text."""
    lines = [f"{'':16}{'inodes':>10}{'bytes each':>12}{'MiB before':>12}{'known':>8}{'forgotten':>11}{'seconds':>9}"]
    for name, memory in found.items():
        sizes = [size / 2**20 for size in (memory.before, memory.known, memory.forgotten)]
        lines.append(
            f"{name:16}{memory.inodes:>10,}{memory.each:>12.0f}{sizes[0]:>12.0f}{sizes[1]:>8.0f}{sizes[2]:>11.0f}"
            f"{memory.seconds:>9.1f}"
        )
    return "\n".join(lines)
