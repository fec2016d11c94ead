"""What is checked before anything is mounted, and how the kernel's list of mounts is read."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llloop import mounting
from llloop.config import ServeConfig
from llloop.errors import DeadMountError, HostError, LlloopError, MountpointError, SourceError
from llloop.mounting import MountEntry
from tests.as_user import MYSELF, Caller, run_as
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
    original = mounting.Path

    def path(name: str) -> Path:
        return file if name == "/proc/self/mountinfo" else original(name)

    monkeypatch.setattr(mounting, "Path", path)


def line(mountpoint: bytes, kind: bytes = b"tmpfs", source: bytes = b"tmpfs", optional: bytes = b"") -> bytes:
    fields = (b"36 35 98:0 / " + escaped(mountpoint) + b" rw,noatime", optional, b"- " + kind, escaped(source), b"rw")
    return b" ".join(field for field in fields if field)


# The list of mounts


def test_the_list_of_this_machine_is_read() -> None:
    entries = mounting.mounts()
    assert mounting.find_mount("/") in entries
    root = mounting.find_mount("/proc")
    assert root is not None and root.type == "proc"
    assert mounting.find_mount("/no/such/place") is None


@pytest.mark.parametrize("optional", [b"", b"master:1", b"shared:2 master:1 propagate_from:3 unbindable"])
def test_fields_of_a_mount(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, optional: bytes) -> None:
    mountinfo(monkeypatch, tmp_path, line(b"/mnt", b"fuse.llloop", b"/data", optional))
    assert mounting.mounts() == [MountEntry(36, (98, 0), "/mnt", "fuse.llloop", "/data")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.binary(min_size=1, max_size=30).filter(lambda name: not {0, 0x0D} & set(name)))
def test_odd_names_are_read(tmp_path: Path, name: bytes) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        mountinfo(monkeypatch, tmp_path, line(b"/" + name, source=name), line(b"/other"))
        first, second = mounting.mounts()
    assert os.fsencode(first.mountpoint) == b"/" + name
    assert os.fsencode(first.source) == name
    assert second.mountpoint == "/other"


@pytest.mark.parametrize(
    "name", ["with space", "tab\t", "line\nbreak", "back\\slash", "\\040", "#", " - ", "ü", "\udcff"]
)
def test_a_mount_with_an_odd_name_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    mountinfo(monkeypatch, tmp_path, line(os.fsencode(f"/mnt/{name}")))
    found = mounting.find_mount(f"/mnt/{name}")
    assert found is not None and found.mountpoint == f"/mnt/{name}"


def test_of_several_mounts_in_one_place_the_topmost_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mountinfo(monkeypatch, tmp_path, line(b"/mnt", b"ext4"), line(b"/other"), line(b"/mnt", b"fuse.llloop"))
    found = mounting.find_mount("/mnt")
    assert found is not None and found.type == "fuse.llloop"


def test_a_mount_without_a_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mountinfo(monkeypatch, tmp_path, b"36 35 0:50 / /mnt rw - tmpfs  rw")
    assert mounting.mounts()[0].source == ""


# Mount points by name


def test_a_mount_point_is_found_without_being_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    top = os.path.realpath(tmp_path)
    assert mounting.resolve_mountpoint(f"{tmp_path}/link/mnt") == f"{top}/real/mnt"
    assert mounting.resolve_mountpoint(f"{tmp_path}/real/../real/./mnt/") == f"{top}/real/mnt"
    assert mounting.resolve_mountpoint(f"{tmp_path}/link") == f"{top}/real"
    assert mounting.resolve_mountpoint("/") == "/"
    monkeypatch.chdir(tmp_path)
    assert mounting.resolve_mountpoint("real") == f"{top}/real"


# The source


def test_a_source_is_given_back_without_symlinks(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert mounting.check_source(str(tmp_path / "link")) == os.path.realpath(tmp_path / "real")
    assert mounting.check_source("/") == "/"


def test_sources_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (
        ("missing", "no such directory"),
        ("dangling", "no such directory"),
        ("file", "not a directory"),
        ("file/below", "Not a directory"),
        ("x" * 300, "too long"),
    ):
        with pytest.raises(SourceError, match=words):
            mounting.check_source(str(tmp_path / name))
    with pytest.raises(SourceError):
        mounting.check_source(str(tmp_path / "loop"))


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_source_that_may_not_be_read(mode: int) -> None:
    # Not below pytest's directory, into which other users may not look.
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        top.chmod(0o755)
        source = top / "source"
        source.mkdir()
        source.chmod(mode)

        def check() -> str:
            with pytest.raises(SourceError) as caught:
                mounting.check_source(str(source))
            return str(caught.value)

        said = run_as(NOBODY if os.geteuid() == 0 else MYSELF, check)
        assert "you may not read it" in said and "r-x" in said


# The mount point


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    (path / "sub").mkdir(parents=True)
    return path


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def check(mountpoint: Path | str, source: Path, **options: Any) -> str:
    return mounting.check_mountpoint(config(mountpoint, **options), os.path.realpath(source))


def test_a_mount_point_that_will_do(source: Path, mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("mnt")
    assert check(mountpoint, source) == os.path.realpath(mountpoint)
    assert check(tmp_path / "link", source) == os.path.realpath(mountpoint)


def test_mount_points_that_cannot_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MountpointError, match="mkdir"):
        check(tmp_path / "missing", source)
    with pytest.raises(MountpointError, match="not a directory"):
        check(tmp_path / "file", source)
    with pytest.raises(MountpointError, match="Not a directory"):
        check(tmp_path / "file" / "below", source)


def test_a_mount_point_that_is_not_empty(source: Path, mountpoint: Path) -> None:
    (mountpoint / ".hidden").write_text("")
    with pytest.raises(MountpointError, match="--nonempty"):
        check(mountpoint, source)
    assert check(mountpoint, source, nonempty=True)


def test_places_that_would_deadlock(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("source/sub")
    for place in (source, source / "sub", source / "sub" / "..", tmp_path / "link"):
        with pytest.raises(MountpointError, match="deadlock"):
            check(place, source, nonempty=True)
    with pytest.raises(MountpointError, match="hidden"):
        check(tmp_path, source, nonempty=True)
    (tmp_path / "source-2").mkdir()
    assert check(tmp_path / "source-2", source), "only its name begins like the source's"


def test_what_is_a_mount_already(
    source: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.path.realpath(mountpoint)
    mountinfo(monkeypatch, tmp_path, line(path.encode(), b"ext4", b"/dev/sda1"))
    with pytest.raises(MountpointError, match=rf"/dev/sda1 \(ext4\).*llloop umount {path}"):
        check(mountpoint, source)


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch, mountpoint: Path) -> list[str]:
    """The mount point is a mount without a server until it is unmounted; the list tells what was."""
    unmounted: list[str] = []
    original = os.stat

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if path == os.path.realpath(mountpoint) and not unmounted:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return original(path, *arguments, **options)

    def unmount(path: str, *, lazy: bool) -> None:
        assert lazy
        unmounted.append(path)

    monkeypatch.setattr(mounting.os, "stat", stat)
    monkeypatch.setattr(mounting, "unmount", unmount)
    return unmounted


def test_a_dead_mount_is_told_apart_and_how_to_cure_it(source: Path, mountpoint: Path, dead: list[str]) -> None:
    with pytest.raises(DeadMountError, match=rf"llloop umount --lazy {os.path.realpath(mountpoint)}.*--replace-dead"):
        check(mountpoint, source)
    assert dead == []


def test_a_dead_mount_is_replaced_if_asked(source: Path, mountpoint: Path, dead: list[str]) -> None:
    assert check(mountpoint, source, replace_dead=True) == os.path.realpath(mountpoint)
    assert dead == [os.path.realpath(mountpoint)]


# The machine


def test_a_machine_without_fuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mounting, "_DEVICE", str(tmp_path / "missing"))
    with pytest.raises(HostError, match="modprobe fuse"):
        mounting.check_host(config())
    monkeypatch.setattr(mounting, "_DEVICE", str(tmp_path))
    with pytest.raises(HostError, match="cannot be opened"):
        mounting.check_host(config())


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As an ordinary user sees it, with a /etc/fuse.conf of the test's own."""
    monkeypatch.setattr(mounting, "_DEVICE", "/dev/null")
    monkeypatch.setattr(mounting, "_FUSE_CONF", tmp_path / "fuse.conf")
    monkeypatch.setattr(mounting.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(mounting.shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path / "fuse.conf"


def test_an_ordinary_user_without_fusermount(ordinary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounting.check_host(config())
    monkeypatch.setattr(mounting.shutil, "which", lambda name: None)
    with pytest.raises(HostError, match="fuse3"):
        mounting.check_host(config())


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("user_allow_other\n", True),
        ("# comment\n  user_allow_other  \nmount_max = 10\n", True),
        ("#user_allow_other\n", False),
        ("user_allow_others\n", False),
        ("", False),
        (None, False),
    ],
)
def test_allow_other_needs_the_administrators_word(ordinary: Path, text: str | None, allowed: bool) -> None:
    if text is not None:
        ordinary.write_text(text)
    mounting.check_host(config(allow_other=False))
    if allowed:
        mounting.check_host(config(allow_other=True))
    else:
        with pytest.raises(HostError, match=r"user_allow_other in .*fuse\.conf.*--no-allow-other"):
            mounting.check_host(config(allow_other=True))


# Unmounting as an ordinary user


class Fusermount:
    """Stands in for the program."""

    def __init__(self, code: int, stderr: str = "") -> None:
        self.code, self.stderr = code, stderr
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["env"]["LC_ALL"] == "C", "its words are looked at"
        self.commands.append(command)
        return subprocess.CompletedProcess(command, self.code, "", self.stderr)


@pytest.mark.parametrize("lazy", [False, True])
def test_fusermount_unmounts(ordinary: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool) -> None:
    program = Fusermount(0)
    monkeypatch.setattr(mounting.subprocess, "run", program)
    mounting.unmount("/-mnt", lazy=lazy)
    ((name, *arguments),) = program.commands
    assert name == "fusermount" and "-u" in arguments and ("-z" in arguments) is lazy
    assert arguments[-2:] == ["--", "/-mnt"]


def test_what_fusermount_says(ordinary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = "fusermount: failed to unmount /mnt: Device or resource busy\n"
    monkeypatch.setattr(mounting.subprocess, "run", Fusermount(1, busy))
    with fails(errno.EBUSY):
        mounting.unmount("/mnt", lazy=False)
    monkeypatch.setattr(mounting.subprocess, "run", Fusermount(1, "fusermount: entry for /mnt not found\n"))
    with pytest.raises(LlloopError, match="not found"):
        mounting.unmount("/mnt", lazy=False)
    monkeypatch.setattr(mounting.subprocess, "run", Fusermount(7))
    with pytest.raises(LlloopError, match="7"):
        mounting.unmount("/mnt", lazy=False)


def test_fusermount_that_is_missing_or_hangs(ordinary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any, **options: Any) -> None:
        raise FileNotFoundError

    def hanging(command: list[str], timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(mounting.subprocess, "run", missing)
    with pytest.raises(HostError, match="fuse3"):
        mounting.unmount("/mnt", lazy=False)
    monkeypatch.setattr(mounting.subprocess, "run", hanging)
    with pytest.raises(LlloopError, match="30 seconds"):
        mounting.unmount("/mnt", lazy=False)


def test_root_unmounts_by_itself(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("root only")
    with fails(errno.EINVAL):
        mounting.unmount(str(tmp_path), lazy=False)
