"""The limits of this process that decide whether a mount can be served: open files and processes (getrlimit(2))."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llloop.errors import HostError

# How many descriptors the processes of a mount have open besides those of the files of the mount: so many, and so many
# for each worker. A front has most. A test compares this with what they have.
_OWN = 72
_OWN_OF_A_WORKER = 6
# How many files of the mount must be possible at least for it to be of any use.
_FILES = 64
# The limits that `raise_limits` raises.
RAISED = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)
# The processes besides the workers: supervisor, keeper, front, the one that unmounts, and the log's thread.
_OTHERS = 5


def needed_descriptors(workers: int) -> int:
    """Return how many open files a mount with that many workers needs to be allowed to have."""
    return _OWN + _OWN_OF_A_WORKER * workers + _FILES


def check(workers: int) -> None:
    """Check that a mount with that many workers can be served within this process's limits.

    Raises:
        HostError: not so; the message says what is needed.
    """
    with _raised():
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size != resource.RLIM_INFINITY:
        raise HostError(
            f"this process may write files of {size} bytes at most, so nobody could write longer ones in the mount; "
            "lift that limit (ulimit -f unlimited)"
        )
    needed = needed_descriptors(workers)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise HostError(
            f"{workers} workers need {needed} open files, and this process may have {allowed}; "
            f"allow more (ulimit -n {needed}) or serve with fewer workers"
        )
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() != 0 and processes != resource.RLIM_INFINITY and processes < workers + _OTHERS:
        raise HostError(
            f"{workers} workers need {workers + _OTHERS} processes, and this user may have {processes}; "
            "allow more (ulimit -u) or serve with fewer workers"
        )


def raise_limits() -> None:
    """Raise what limits everybody who uses the mount, not only this process, as far as this user may.

    Each open file of the mount needs a descriptor. How long files may become is for those who write them: the kernel
    holds them to their own limits.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):  # only with CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # only with CAP_SYS_RESOURCE
        most = int(Path("/proc/sys/fs/nr_open").read_text())
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def _raised() -> Iterator[None]:
    before = [(limit, resource.getrlimit(limit)) for limit in RAISED]
    raise_limits()
    try:
        yield
    finally:
        for limit, values in before:
            resource.setrlimit(limit, values)
