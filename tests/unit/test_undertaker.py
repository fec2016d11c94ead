"""What the keeper does with a dead mount, without one."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from llloop import mounting, undertaker
from llloop.errors import LlloopError
from llloop.mounting import MountEntry
from llloop.undertaker import detach_dead_mount

MNT = "/mnt/photos"
OURS = (0, 47)


class Kernel:
    """What is mounted, and what is done about it."""

    def __init__(self, connections: Path) -> None:
        self.device: tuple[int, int] | None = OURS
        self.error: Exception | None = None
        self.calls: list[str] = []
        self.abort = connections / "47" / "abort"
        self.abort.parent.mkdir()

    def find_mount(self, mountpoint: str) -> MountEntry | None:
        assert mountpoint == MNT
        return None if self.device is None else MountEntry(5, self.device, MNT, "fuse.llloop", "/srv")

    def unmount(self, mountpoint: str, *, lazy: bool) -> None:
        # In this order: a request that hangs would keep the unmount waiting for what is still to be written back.
        self.calls.append(f"unmount {mountpoint} lazy={lazy} aborted={self.abort.exists()}")
        if self.error:
            raise self.error


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    own = Kernel(tmp_path)
    monkeypatch.setattr(undertaker, "_CONNECTIONS", tmp_path)
    monkeypatch.setattr(mounting, "find_mount", own.find_mount)
    monkeypatch.setattr(mounting, "unmount", own.unmount)
    return own


def test_it_is_aborted_and_then_detached(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    assert detach_dead_mount(MNT, OURS)
    assert kernel.calls == [f"unmount {MNT} lazy=True aborted=True"]
    assert kernel.abort.read_text() == "1"
    assert [(record.levelno, MNT in record.getMessage()) for record in caplog.records] == [(logging.ERROR, True)]


@pytest.mark.parametrize("device", [None, (0, 48), (8, 47)])
def test_what_is_not_ours_is_left_alone(
    kernel: Kernel, caplog: pytest.LogCaptureFixture, device: tuple[int, int] | None
) -> None:
    kernel.device = device
    assert not detach_dead_mount(MNT, OURS)
    assert kernel.calls == [] and not kernel.abort.exists() and caplog.records == []


def test_without_fusectl_it_is_detached_all_the_same(kernel: Kernel) -> None:
    kernel.abort.parent.rmdir()
    assert detach_dead_mount(MNT, OURS)
    assert len(kernel.calls) == 1


@pytest.mark.parametrize("error", [OSError(errno.EPERM, "Operation not permitted"), LlloopError("fusermount says no")])
def test_a_failure_is_logged_not_raised(kernel: Kernel, caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    kernel.error = error
    assert not detach_dead_mount(MNT, OURS)
    assert str(error) in caplog.text and MNT in caplog.text
