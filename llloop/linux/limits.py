"""The resource limits that a mount needs: open files, file size and processes (getrlimit(2))."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llloop.errors import HostError

# The descriptors that a process needs apart from those of files in the mount: a base and a number for each worker. The
# front needs the most. A test compares these numbers with a running mount.
_BASE_DESCRIPTORS = 72
_DESCRIPTORS_PER_WORKER = 6
# The minimum number of files of the mount that can be open at the same time.
_MIN_FILES = 64
# The limits that `raise_limits` changes.
RAISED_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)
# Processes and threads besides the workers: supervisor, descriptor keeper, front, unmounting process, logging thread.
_OTHER_PROCESSES = 5


def needed_descriptors(workers: int) -> int:
    """Return the limit of open files (RLIMIT_NOFILE) that a mount with that many workers needs."""
    return _BASE_DESCRIPTORS + _DESCRIPTORS_PER_WORKER * workers + _MIN_FILES


def check(workers: int) -> None:
    """Check that the limits of this process, once raised, suffice for a mount with that many workers.

    Raises:
        HostError: a limit is too low; the message says which one, and the value that the mount needs.
    """
    with _raised():
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size != resource.RLIM_INFINITY:
        raise HostError(
            f"the file size limit of this process is {size} bytes and would apply to all users of the mount; "
            "lift it (ulimit -f unlimited)"
        )
    needed = needed_descriptors(workers)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise HostError(
            f"{workers} workers need {needed} open files, but this process may have {allowed} only; "
            f"allow more (ulimit -n {needed}) or serve with fewer workers"
        )
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() != 0 and processes != resource.RLIM_INFINITY and processes < workers + _OTHER_PROCESSES:
        raise HostError(
            f"{workers} workers need {workers + _OTHER_PROCESSES} processes, but this user may have {processes} only; "
            "allow more (ulimit -u) or serve with fewer workers"
        )


def raise_limits() -> None:
    """Raise the limits of open files and of file size as far as this user may.

    This process's limits would apply to all users of the mount: each open file of the mount needs a descriptor here,
    and this process writes their files. The kernel still applies each caller's own file size limit.
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
    before = [(limit, resource.getrlimit(limit)) for limit in RAISED_LIMITS]
    raise_limits()
    try:
        yield
    finally:
        for limit, values in before:
            resource.setrlimit(limit, values)
