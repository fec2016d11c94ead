"""How the descriptor keeper removes a dead mount, with a fake kernel."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from llloop.errors import LlloopError
from llloop.linux import mounts, syscalls
from llloop.linux.mount_identity import MountIdentity
from llloop.linux.mounts import MountEntry
from llloop.supervisor import orphaned_mount
from llloop.supervisor.orphaned_mount import detach_dead_mount

MNT = "/mnt/photos"
OURS = MountIdentity(MNT, (0, 47), 5, 1001)


class Kernel:
    """Records which mounts there are, and what is done to them."""

    def __init__(self, connections: Path) -> None:
        self.entry: MountEntry | None = MountEntry(5, (0, 47), MNT, "fuse.llloop", "/srv")
        self.unique: int | None = 1001
        self.error: Exception | None = None
        self.calls: list[str] = []
        self.abort = connections / "47" / "abort"
        self.abort.parent.mkdir()
        self.device = os.open(os.devnull, os.O_RDONLY)

    def mounts(self) -> list[MountEntry]:
        return [self.entry] if self.entry is not None else []

    def unmount(self, mount: MountIdentity, *, lazy: bool) -> None:
        # In this order: otherwise a hanging request would delay the unmount, which waits for writeback.
        # A process that holds the device keeps the connection alive.
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(self.device)
        self.calls.append(f"unmount {mount.mountpoint} lazy={lazy} aborted={self.abort.exists()}")
        if self.error:
            raise self.error


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    own = Kernel(tmp_path)
    monkeypatch.setattr(orphaned_mount, "CONNECTIONS", tmp_path)
    monkeypatch.setattr(mounts, "mounts", own.mounts)
    monkeypatch.setattr(syscalls, "unique_mount_id", lambda place: own.unique)
    monkeypatch.setattr(MountIdentity, "unmount", lambda mount, *, lazy: own.unmount(mount, lazy=lazy))
    return own


def test_mount_is_aborted_then_detached(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    assert detach_dead_mount(OURS, kernel.device)
    assert kernel.calls == [f"unmount {MNT} lazy=True aborted=True"]
    assert kernel.abort.read_text() == "1"
    assert [(record.levelno, MNT in record.getMessage()) for record in caplog.records] == [(logging.ERROR, True)]


@pytest.mark.parametrize(
    ("entry", "unique"),
    [
        (None, None),
        (MountEntry(5, (0, 48), MNT, "fuse.llloop", "/srv"), 1001),
        (MountEntry(6, (0, 47), MNT, "fuse.llloop", "/srv"), 1001),
        # The kernel has reused both numbers.
        (MountEntry(5, (0, 47), MNT, "fuse.llloop", "/srv"), 1002),
    ],
)
def test_other_mount_at_the_same_path_is_not_detached(
    kernel: Kernel, caplog: pytest.LogCaptureFixture, entry: MountEntry | None, unique: int | None
) -> None:
    kernel.entry, kernel.unique = entry, unique
    assert not detach_dead_mount(OURS, kernel.device)
    assert kernel.calls == [] and not kernel.abort.exists() and caplog.records == []


def test_mount_is_detached_without_fusectl(kernel: Kernel) -> None:
    kernel.abort.parent.rmdir()
    assert detach_dead_mount(OURS, kernel.device)
    assert len(kernel.calls) == 1


@pytest.mark.parametrize("error", [OSError(errno.EPERM, "Operation not permitted"), LlloopError("fusermount says no")])
def test_failure_is_logged(kernel: Kernel, caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    kernel.error = error
    assert not detach_dead_mount(OURS, kernel.device)
    assert str(error) in caplog.text and MNT in caplog.text
