"""System call wrappers that have a fallback."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

import pytest

from llloop.linux import syscalls


@pytest.mark.parametrize(("number", "for_good"), [(errno.ENOSYS, True), (errno.EPERM, False)])
def test_chmod_falls_back_without_fchmodat2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, for_good: bool
) -> None:
    """Kernels before 6.6 return ENOSYS, seccomp filters that do not know the call EPERM."""
    tried = []

    def refuse(call: int, *arguments: object) -> int:
        tried.append(call)
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(syscalls, "_chmod_by_descriptor", True)
    monkeypatch.setattr(syscalls, "_syscall", refuse)
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_PATH)
    try:
        for mode in (0o4750, 0o640):
            syscalls.chmod(fd, mode)
            assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    finally:
        os.close(fd)
    assert len(tried) == (1 if for_good else 2)


def test_chmod_does_not_change_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "target").touch(0o600)
    fd = os.open(tmp_path / "link", os.O_PATH | os.O_NOFOLLOW)
    try:
        with pytest.raises(OSError) as caught:
            syscalls.chmod(fd, 0o777)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o600


def test_is_readable() -> None:
    reader, writer = os.pipe()
    try:
        assert not syscalls.is_readable(reader)
        assert not syscalls.is_readable(reader, 0.01)
        os.write(writer, b"x")
        assert syscalls.is_readable(reader, 10)
    finally:
        os.close(reader)
        os.close(writer)
