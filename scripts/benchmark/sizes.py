"""The amount of work of each workload."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, replace

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sizes:
    """The amounts; times are in seconds, data in bytes.

    Attributes:
        data: the size of the large file that is read and written.
        share: the size of each of the four files that are read or written at once.
        duration: the duration of a workload that repeats an operation.
        directories: the number of directories in the tree that is walked.
        files: the number of files in each of these directories; each has 4 KiB.
        listed: the number of names in the large directory.
        created: the number of files that are created and unlinked.
        archive: the number of files in the archive, and in the git work tree.
        compiled: the number of C files of the program.
        repeats: how often one run repeats an operation that needs empty caches.
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
    """Return smaller sizes if the file system of the source, or a peer, has too little space.

    Args:
        sizes: the desired sizes.
        room: the free bytes in the place for the source.

    Raises:
        ValueError: there is too little space for a useful result.
    """
    # The data file, its four parts, the same amount of written data, and the same amount of page cache in the mounts.
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
    """Return the free bytes of the directory's file system, but at most half of the free memory."""
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    free = os.statvfs(path)
    return min(free.f_bavail * free.f_frsize, available // 2)
