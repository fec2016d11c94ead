"""A read of cached pages updates the access time when a read in the source would."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.syscalls import opened

pytestmark = [pytest.mark.mounted, pytest.mark.own_loop]
LONG_AGO = 10**18


def read(path: Path, flags: int = 0) -> bytes:
    with opened(path, os.O_RDONLY | flags) as descriptor:
        return os.pread(descriptor, 100, 0)


def is_accessed(path: Path) -> bool:
    """Asked of the mount where the file is in it."""
    return os.stat(path).st_atime_ns != LONG_AGO


@pytest.mark.parametrize(
    "mode",
    ["", "--cache always", "--cache never", "--writeback", pytest.param("--io kernel", marks=pytest.mark.root)],
)
def test_read_of_cached_pages_updates_the_access_time(serve: Serve, mode: str) -> None:
    server = serve(*mode.split())
    twins = server.mountpoint / "file", server.source / "native"
    for path in twins:
        path.write_bytes(b"data")
        with opened(
            path, os.O_RDONLY
        ) as descriptor:  # so that the kernel keeps no times of its own any more with --writeback
            os.fsync(descriptor)
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    # The kernel may keep pages only if the last change is more than a second old.
    time.sleep(max(0.0, os.stat(server.source / "file").st_ctime + 1.1 - time.time()))
    for _ in range(3):
        for path in twins:
            assert read(path, os.O_NOATIME) == b"data"
        assert [is_accessed(path) for path in twins] == [False, False], "O_NOATIME"
    for path in twins:
        assert read(path) == b"data"
    mounted, native = map(is_accessed, twins)
    assert mounted == native
    assert is_accessed(server.source / "file") == native
