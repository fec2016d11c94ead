"""Reading mountinfo, and unmounting."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llloop.config import ServeConfig
from llloop.errors import HostError, LlloopError
from llloop.linux import mounts
from llloop.linux.mounts import MountEntry
from tests.as_user import Caller
from tests.expect import fails

NOBODY = Caller(uid=65534, gid=65534)


def config(mountpoint: Path | str = "/mnt", **options: Any) -> ServeConfig:
    return ServeConfig(source=options.pop("source", "/src"), mountpoint=str(mountpoint), **options)


def escaped(name: bytes) -> bytes:
    """As the kernel's mangle() writes paths."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in name)


def mountinfo(monkeypatch: pytest.MonkeyPatch, directory: Path, *lines: bytes) -> None:
    """Have the lines read in the place of /proc/self/mountinfo."""
    file = directory / "mountinfo"
    file.write_bytes(b"".join(line + b"\n" for line in lines))

    def path(name: str) -> Path:
        return file if name == "/proc/self/mountinfo" else Path(name)

    monkeypatch.setattr(mounts, "Path", path)


def line(mountpoint: bytes, kind: bytes = b"tmpfs", source: bytes = b"tmpfs", optional: bytes = b"") -> bytes:
    fields = (b"36 35 98:0 / " + escaped(mountpoint) + b" rw,noatime", optional, b"- " + kind, escaped(source), b"rw")
    return b" ".join(field for field in fields if field)


# The list of mounts


def test_mounts_reads_mountinfo_of_this_machine() -> None:
    entries = mounts.mounts()
    assert mounts.find_mount("/") in entries
    root = mounts.find_mount("/proc")
    assert root is not None and root.type == "proc"
    assert mounts.find_mount("/no/such/place") is None


@pytest.mark.parametrize("optional", [b"", b"master:1", b"shared:2 master:1 propagate_from:3 unbindable"])
def test_fields_of_a_mount(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, optional: bytes) -> None:
    mountinfo(monkeypatch, tmp_path, line(b"/mnt", b"fuse.llloop", b"/data", optional))
    assert mounts.mounts() == [MountEntry(36, (98, 0), "/mnt", "fuse.llloop", "/data")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.binary(min_size=1, max_size=30).filter(lambda name: not {0, 0x0D} & set(name)))
def test_escaped_names_are_decoded(tmp_path: Path, name: bytes) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        mountinfo(monkeypatch, tmp_path, line(b"/" + name, source=name), line(b"/other"))
        first, second = mounts.mounts()
    assert os.fsencode(first.mountpoint) == b"/" + name
    assert os.fsencode(first.source) == name
    assert second.mountpoint == "/other"


@pytest.mark.parametrize(
    "name", ["with space", "tab\t", "line\nbreak", "back\\slash", "\\040", "#", " - ", "ü", "\udcff"]
)
def test_mount_with_an_escaped_name_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    mountinfo(monkeypatch, tmp_path, line(os.fsencode(f"/mnt/{name}")))
    found = mounts.find_mount(f"/mnt/{name}")
    assert found is not None and found.mountpoint == f"/mnt/{name}"


def test_find_mount_returns_the_topmost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mountinfo(monkeypatch, tmp_path, line(b"/mnt", b"ext4"), line(b"/other"), line(b"/mnt", b"fuse.llloop"))
    found = mounts.find_mount("/mnt")
    assert found is not None and found.type == "fuse.llloop"


def test_mount_without_a_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mountinfo(monkeypatch, tmp_path, b"36 35 0:50 / /mnt rw - tmpfs  rw")
    assert mounts.mounts()[0].source == ""


# Mount points by name


def test_resolve_mountpoint_does_not_access_the_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    top = os.path.realpath(tmp_path)
    assert mounts.resolve_mountpoint(f"{tmp_path}/link/mnt") == f"{top}/real/mnt"
    assert mounts.resolve_mountpoint(f"{tmp_path}/real/../real/./mnt/") == f"{top}/real/mnt"
    assert mounts.resolve_mountpoint(f"{tmp_path}/link") == f"{top}/real"
    assert mounts.resolve_mountpoint("/") == "/"
    monkeypatch.chdir(tmp_path)
    assert mounts.resolve_mountpoint("real") == f"{top}/real"


# Unmounting as an ordinary user


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda name, path: f"/usr/bin/{name}")


class Fusermount:
    """Replaces fusermount(1)."""

    def __init__(self, code: int, stderr: str = "") -> None:
        self.code, self.stderr = code, stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["env"]["LC_ALL"] == "C", "its words are looked at"
        self.commands.append(command)
        return subprocess.CompletedProcess(command, self.code, "", self.stderr)


@pytest.mark.parametrize("lazy", [False, True])
def test_fusermount_unmounts(ordinary: None, monkeypatch: pytest.MonkeyPatch, lazy: bool) -> None:
    program = Fusermount(0)
    monkeypatch.setattr(subprocess, "run", program)
    mounts.unmount("/-mnt", lazy=lazy)
    ((name, *arguments),) = program.commands
    assert name == "/usr/bin/fusermount" and "-u" in arguments and ("-z" in arguments) is lazy
    assert arguments[-2:] == ["--", "/-mnt"]


def test_fusermount_errors_are_raised(ordinary: None, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = "fusermount: failed to unmount /mnt: Device or resource busy\n"
    monkeypatch.setattr(subprocess, "run", Fusermount(1, busy))
    with fails(errno.EBUSY):
        mounts.unmount("/mnt", lazy=False)
    monkeypatch.setattr(subprocess, "run", Fusermount(1, "fusermount: entry for /mnt not found\n"))
    with pytest.raises(LlloopError, match="not found"):
        mounts.unmount("/mnt", lazy=False)
    monkeypatch.setattr(subprocess, "run", Fusermount(7))
    with pytest.raises(LlloopError, match="7"):
        mounts.unmount("/mnt", lazy=False)


def test_missing_or_hanging_fusermount_is_an_error(ordinary: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def hanging(command: list[str], timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    with monkeypatch.context() as without:
        without.setattr(shutil, "which", lambda name, path: None)
        with pytest.raises(HostError, match="fuse3"):
            mounts.unmount("/mnt", lazy=False)
    monkeypatch.setattr(subprocess, "run", hanging)
    with pytest.raises(LlloopError, match="30 seconds"):
        mounts.unmount("/mnt", lazy=False)


def test_root_unmounts_without_fusermount(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("root only")
    with fails(errno.EINVAL):
        mounts.unmount(str(tmp_path), lazy=False)


def test_fusermount_in_the_working_directory_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "fusermount"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f":.:{os.path.dirname(mounts.fusermount())}")
    assert os.path.isabs(mounts.fusermount()) and not os.path.samefile(mounts.fusermount(), program)
