"""The checks before a mount."""

from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from llloop.errors import DeadMountError, HostError, LlloopError, MountpointError, SourceError
from llloop.linux import limits, mount_identity, mounts, syscalls, timed_call
from llloop.supervisor import start_checks
from tests.as_user import MYSELF, Caller, run_as
from tests.unit.linux.test_mounts import config, line, mountinfo

NOBODY = Caller(uid=65534, gid=65534)


# The source


def test_source_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert start_checks.check_source(str(tmp_path / "link")) == os.path.realpath(tmp_path / "real")
    assert start_checks.check_source("/") == "/"


def test_invalid_sources_are_refused(tmp_path: Path) -> None:
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
            start_checks.check_source(str(tmp_path / name))
    with pytest.raises(SourceError):
        start_checks.check_source(str(tmp_path / "loop"))


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_unreadable_source_is_refused(mode: int) -> None:
    # Not below pytest's directory, which other users cannot search.
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        top.chmod(0o755)
        source = top / "source"
        source.mkdir()
        source.chmod(mode)

        def check() -> str:
            with pytest.raises(SourceError) as caught:
                start_checks.check_source(str(source))
            return str(caught.value)

        said = run_as(NOBODY if os.geteuid() == 0 else MYSELF, check)
        assert "needs read and search permission" in said and "r-x" in said


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
    path, dead = start_checks.check_mountpoint(config(mountpoint, **options), os.path.realpath(source))
    assert not dead
    return path


def test_valid_mount_point_is_accepted(source: Path, mountpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("mnt")
    assert check(mountpoint, source) == os.path.realpath(mountpoint)
    assert check(tmp_path / "link", source) == os.path.realpath(mountpoint)


def test_invalid_mount_points_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MountpointError, match="mkdir"):
        check(tmp_path / "missing", source)
    with pytest.raises(MountpointError, match="not a directory"):
        check(tmp_path / "file", source)
    with pytest.raises(MountpointError, match="Not a directory"):
        check(tmp_path / "file" / "below", source)


def test_non_empty_mount_point_is_refused(source: Path, mountpoint: Path) -> None:
    (mountpoint / ".hidden").write_text("")
    with pytest.raises(MountpointError, match="--nonempty"):
        check(mountpoint, source)
    assert check(mountpoint, source, nonempty=True)


def test_nested_source_and_mount_point_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("source/sub")
    for place in (source, source / "sub", source / "sub" / "..", tmp_path / "link"):
        with pytest.raises(MountpointError, match="deadlock"):
            check(place, source, nonempty=True)
    with pytest.raises(MountpointError, match="would hide it"):
        check(tmp_path, source, nonempty=True)
    (tmp_path / "source-2").mkdir()
    assert check(tmp_path / "source-2", source), "only its name begins like the source's"


def test_existing_mount_is_refused(
    source: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.path.realpath(mountpoint)
    mountinfo(monkeypatch, tmp_path, line(path.encode(), b"ext4", b"/dev/sda1"))
    with pytest.raises(MountpointError, match=rf"/dev/sda1 \(ext4\).*llloop umount {path}"):
        check(mountpoint, source)


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch, mountpoint: Path) -> list[str]:
    """The mount point is a mount without a server until it is detached; the list tells what was."""
    detached: list[str] = []
    original = os.statvfs

    def statvfs(path: Any) -> os.statvfs_result:
        if path == os.path.realpath(mountpoint) and not detached:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return original(path)

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(mount_identity, "detach_if_dead", detached.append)
    return detached


def test_dead_mount_is_reported_with_a_remedy(source: Path, mountpoint: Path, dead: list[str]) -> None:
    with pytest.raises(DeadMountError, match=rf"llloop umount --lazy {os.path.realpath(mountpoint)}.*--replace-dead"):
        check(mountpoint, source)
    assert dead == []


def test_replace_dead_detaches_a_dead_mount(
    source: Path, mountpoint: Path, dead: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_checks, "DEVICE", "/dev/null")
    monkeypatch.setattr(start_checks, "DEVICE_NUMBER", os.stat("/dev/null").st_rdev)
    wanted = config(mountpoint, source=str(source), replace_dead=True, allow_other=False)
    assert start_checks.check(wanted).mountpoint == os.path.realpath(mountpoint)
    assert dead == [], "a check changes nothing"
    assert start_checks.make_way(wanted).mountpoint == os.path.realpath(mountpoint)
    assert dead == [os.path.realpath(mountpoint)]


def test_directory_under_a_dead_mount_is_checked(
    source: Path, mountpoint: Path, dead: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_checks, "DEVICE", "/dev/null")
    monkeypatch.setattr(start_checks, "DEVICE_NUMBER", os.stat("/dev/null").st_rdev)
    (mountpoint / "file").touch()
    with pytest.raises(MountpointError, match="--nonempty"):
        start_checks.make_way(config(mountpoint, source=str(source), replace_dead=True, allow_other=False))


@pytest.mark.parametrize("kind", [b"fuse.llloop", b"ext4"])
def test_check_restart_accepts_only_llloop_mounts(
    source: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    path = os.path.realpath(mountpoint)
    (mountpoint / "file").touch()  # as seen through the mount
    mountinfo(monkeypatch, tmp_path, line(path.encode(), kind))
    wanted = config(mountpoint, source=str(source))
    with pytest.raises(MountpointError, match="already mounted there"):
        start_checks.check_mountpoint(wanted, str(source))
    if kind == b"fuse.llloop":
        assert start_checks.check_mountpoint(wanted, str(source), restart=True) == (path, False)
    else:
        with pytest.raises(MountpointError, match="already mounted there"):
            start_checks.check_mountpoint(wanted, str(source), restart=True)


# The machine


def test_missing_fuse_device_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(start_checks, "DEVICE", str(tmp_path / "missing"))
    with pytest.raises(HostError, match="modprobe fuse"):
        start_checks.check_host(config())
    monkeypatch.setattr(start_checks, "DEVICE", str(tmp_path))
    with pytest.raises(HostError, match="cannot be opened"):
        start_checks.check_host(config())
    for other in ("/dev/null", str(tmp_path / "file")):
        (tmp_path / "file").touch()
        monkeypatch.setattr(start_checks, "DEVICE", other)
        with pytest.raises(HostError, match="is not the FUSE device"):
            start_checks.check_host(config())


def test_root_without_cap_sys_admin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def umount(place: str, flags: int) -> None:
        assert flags == syscalls.MNT_EXPIRE, "it unmounts nothing"
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(syscalls, "umount", umount)
    with pytest.raises(HostError, match="CAP_SYS_ADMIN"):
        start_checks.check_host(config())


def test_missing_proc_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path, mountpoint: Path
) -> None:
    monkeypatch.setattr(mounts, "Path", lambda name: tmp_path / "missing")
    with pytest.raises(HostError, match="needs /proc"):
        start_checks.check(config(mountpoint, source=str(source)))


def test_missing_null_device_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path, mountpoint: Path
) -> None:
    monkeypatch.setattr(os, "devnull", str(tmp_path / "missing"))
    with pytest.raises(HostError, match="missing: No such file"):
        start_checks.check(config(mountpoint, source=str(source)))


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As an ordinary user sees it, with a /etc/fuse.conf of the test's own."""
    monkeypatch.setattr(start_checks, "DEVICE", "/dev/null")
    monkeypatch.setattr(start_checks, "DEVICE_NUMBER", os.stat("/dev/null").st_rdev)
    monkeypatch.setattr(start_checks, "FUSE_CONF", tmp_path / "fuse.conf")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda name, path: f"/usr/bin/{name}")
    return tmp_path / "fuse.conf"


def test_missing_fusermount_is_reported(ordinary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_checks.check_host(config())
    monkeypatch.setattr(syscalls, "prctl", lambda option: int(option == syscalls.PR_GET_NO_NEW_PRIVS))
    with pytest.raises(HostError, match="no_new_privs"):
        start_checks.check_host(config())
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with pytest.raises(HostError, match="fuse3"):
        start_checks.check_host(config())


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
def test_allow_other_needs_user_allow_other(ordinary: Path, text: str | None, allowed: bool) -> None:
    if text is not None:
        ordinary.write_text(text)
    start_checks.check_host(config(allow_other=False))
    if allowed:
        start_checks.check_host(config(allow_other=True))
    else:
        with pytest.raises(HostError, match=r"user_allow_other in .*fuse\.conf.*--no-allow-other"):
            start_checks.check_host(config(allow_other=True))


def test_kernel_io_is_refused_if_unsupported(ordinary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match="--io kernel is not possible: it needs root"):
        start_checks.check_host(config(io="kernel", allow_other=False))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(platform, "release", lambda: "6.8.12-generic")
    with pytest.raises(HostError, match=r"Linux 6\.9"):
        start_checks.check_host(config(io="kernel"))
    monkeypatch.setattr(platform, "release", lambda: "6.9.0")
    start_checks.check_host(config(io="kernel"))


# Checks that may hang


def test_timed_call_returns_results_and_errors() -> None:
    late = LlloopError("late")
    assert timed_call.call_with_timeout(lambda: ["/a", "\udcff", 5], 10, late) == ["/a", "\udcff", 5]

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(DeadMountError, match="why"):
        timed_call.call_with_timeout(lambda: fail(DeadMountError("why")), 10, late)
    with pytest.raises(FileNotFoundError) as raised:
        timed_call.call_with_timeout(lambda: fail(FileNotFoundError(errno.ENOENT, "", "/a\udcff")), 10, late)
    assert raised.value.filename == "/a\udcff"


def test_timed_call_times_out(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    begun = time.monotonic()
    with pytest.raises(SourceError, match="late"):
        timed_call.call_with_timeout(lambda: os.open(fifo, os.O_RDONLY), 0.2, SourceError("late"))
    assert time.monotonic() - begun < 10


def test_timed_call_leaves_the_caller_unchanged() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    timed_call.call_with_timeout(lambda: 1, 10, LlloopError("late"))
    assert sorted(os.listdir("/proc/self/fd")) == before


# The limits of the process


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """The limits of a process that may not raise them."""
    values = {
        resource.RLIMIT_FSIZE: (resource.RLIM_INFINITY,) * 2,
        resource.RLIMIT_NOFILE: (1024, 4096),
        resource.RLIMIT_NPROC: (resource.RLIM_INFINITY,) * 2,
    }

    def setrlimit(which: int, limit: tuple[int, int]) -> None:
        if limit[1] % 2**64 > values[which][1] % 2**64:  # RLIM_INFINITY is -1
            raise ValueError("not allowed to raise maximum limit")
        values[which] = limit

    monkeypatch.setattr(resource, "getrlimit", lambda which: values[which])
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    return values


def test_open_file_limit_is_checked(allowed: dict[int, tuple[int, int]]) -> None:
    limits.check(128)
    needed = limits.needed_descriptors(8)
    allowed[resource.RLIMIT_NOFILE] = (20, needed)
    limits.check(8)
    assert allowed[resource.RLIMIT_NOFILE] == (20, needed), "a check changes nothing"
    allowed[resource.RLIMIT_NOFILE] = (20, needed - 1)
    with pytest.raises(
        HostError, match=rf"8 workers need {needed} open files.*may have {needed - 1}.*ulimit -n {needed}"
    ):
        limits.check(8)
    limits.check(7)


def test_file_size_limit_is_checked(allowed: dict[int, tuple[int, int]]) -> None:
    allowed[resource.RLIMIT_FSIZE] = (0, resource.RLIM_INFINITY)
    limits.check(1)
    assert allowed[resource.RLIMIT_FSIZE] == (0, resource.RLIM_INFINITY), "a check changes nothing"
    allowed[resource.RLIMIT_FSIZE] = (4096, 8192)
    with pytest.raises(HostError, match=r"8192 bytes.*ulimit -f unlimited"):
        limits.check(1)


def test_process_limit_is_checked(allowed: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    allowed[resource.RLIMIT_NPROC] = (10, 10)
    limits.check(5)
    with pytest.raises(HostError, match=r"6 workers need 11 processes.*ulimit -u"):
        limits.check(6)
