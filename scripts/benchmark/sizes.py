"""How much work each workload does."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, replace

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sizes:
    """The amounts; times are in seconds, data in bytes.

    Attributes:
        data: the large file that is read and written.
        share: each of the four files that are read or written at once.
        duration: how long a workload goes on that repeats itself.
        directories: of the tree that is walked.
        files: in each of these directories, 4 KiB each.
        listed: names in the large directory.
        created: files that are created and unlinked.
        archive: files in the archive, and in the git work tree.
        compiled: C files of the program that is compiled.
        repeats: how often what must start cold is done in one run.
    """

    data: int
    share: int
    duration: float
    directories: int
    files: int
    listed: int
    created: int
    archive: int
    compiled: int
    repeats: int


FULL = Sizes(
    data=512 * MIB,
    share=128 * MIB,
    duration=0.7,
    directories=100,
    files=80,
    listed=12000,
    created=4000,
    archive=3000,
    compiled=12,
    repeats=2,
)
QUICK = Sizes(
    data=128 * MIB,
    share=32 * MIB,
    duration=0.15,
    directories=40,
    files=25,
    listed=4000,
    created=600,
    archive=500,
    compiled=2,
    repeats=1,
)


def fitted(sizes: Sizes, room: int) -> Sizes:
    """Return the sizes made smaller where the source's file system, or a peer, has no room for them.

    Args:
        sizes: what is wished for.
        room: bytes free where the source is to lie.

    Raises:
        ValueError: if there is too little for the smallest result that means something.
    """
    # The data file, the four shares, as much again that is written, and as much of page cache in the mounts.
    needed = 4 * sizes.data
    while needed > room:
        sizes = replace(sizes, data=sizes.data // 2, share=sizes.share // 2)
        needed //= 2
        if sizes.data < 64 * MIB:
            raise ValueError(f"too little room: {room // MIB} MiB")
    # passthrough_ll keeps a descriptor for each name that the kernel knows.
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors != resource.RLIM_INFINITY:
        most = descriptors * 3 // 4
        sizes = replace(
            sizes,
            files=min(sizes.files, most // sizes.directories),
            listed=min(sizes.listed, most),
            created=min(sizes.created, most),
            archive=min(sizes.archive, most // 2),
        )
    return sizes


def room_at(path: str) -> int:
    """Return the bytes that the directory's file system has free, and no more than half of the free memory."""
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    free = os.statvfs(path)
    return min(free.f_bavail * free.f_frsize, available // 2)
