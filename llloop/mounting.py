"""What a mount needs before it can be made, and how one is ended.

The checks exist to say what is wrong and what to do in one line, before anything is mounted;
libfuse's own messages come too late and say less.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import mount_options, syscalls
from .config import ServeConfig
from .errors import DeadMountError, HostError, LlloopError, MountpointError, SourceError

# The file system type that mounts of llloop show.
TYPE = "fuse.llloop"

_DEVICE = "/dev/fuse"
# How far the kernel reads ahead, in KiB: as much as the largest READ request asks for.
_READ_AHEAD = 512
_FUSE_CONF = Path("/etc/fuse.conf")
# How long fusermount may take, in seconds, before it is taken to hang.
_FUSERMOUNT_PATIENCE = 30
# What a FUSE mount without a server says; the second one to who was waiting when it went.
_DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of /proc/self/mountinfo (proc(5)).

    Attributes:
        mount_id: the kernel's number of the mount.
        device: major and minor number, as in st_dev.
        mountpoint: where it is.
        type: the file system's type, such as fuse.llloop.
        source: what it shows as mounted.
        owner: the user and group that mounted it, of a FUSE mount.
    """

    mount_id: int
    device: tuple[int, int]
    mountpoint: str
    type: str
    source: str
    owner: tuple[int, int] | None = None


def mounts() -> list[MountEntry]:
    """Return what is mounted in this process's mount namespace, in the order of mounting."""
    entries = []
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n")[:-1]:
        before, _, after = line.partition(b" - ")
        fields = before.split(b" ")
        kind, source, options = after.split(b" ", 2)
        major, minor = fields[2].split(b":")
        entries.append(
            MountEntry(
                int(fields[0]),
                (int(major), int(minor)),
                _unescape(fields[4]),
                os.fsdecode(kind),
                _unescape(source),
                _owner(options),
            )
        )
    return entries


def _owner(options: bytes) -> tuple[int, int] | None:
    """Return user_id and group_id of a FUSE mount's options."""
    given = dict(option.partition(b"=")[::2] for option in options.split(b","))
    try:
        return int(given[b"user_id"]), int(given[b"group_id"])
    except (KeyError, ValueError):
        return None


def _unescape(field: bytes) -> str:
    """Undo the octal escapes of spaces and the like in mountinfo."""
    parts = field.split(b"\\")
    decoded = parts[0] + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in parts[1:])
    return os.fsdecode(decoded)


def find_mount(mountpoint: str) -> MountEntry | None:
    """Return what is mounted at *mountpoint*, an absolute path without symlinks; the topmost if several are."""
    found = [entry for entry in mounts() if entry.mountpoint == mountpoint]
    return found[-1] if found else None


def is_dead(mountpoint: str) -> bool:
    """Return whether the server of the FUSE mount at *mountpoint* is gone.

    statfs(2) is the one question that the kernel never answers from what it has cached.
    """
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in _DEAD
    return False


def find_llloop(path: str, shown: str) -> MountEntry:
    """Return the llloop mount at *path*, an absolute path without symlinks.

    Raises:
        MountpointError: there is none; the message calls it *shown*.
    """
    entry = find_mount(path)
    if entry is None:
        raise MountpointError(f"{shown}: nothing is mounted there")
    if entry.type != TYPE:
        raise MountpointError(f"{shown}: {entry.source} ({entry.type}) is mounted there, which is not llloop's")
    return entry


def resolve_mountpoint(mountpoint: str) -> str:
    """Return *mountpoint* as an absolute path without symlinks, not touching the directory itself: it may be dead."""
    path = os.path.abspath(mountpoint)
    parent, name = os.path.split(path)
    resolved = os.path.join(os.path.realpath(parent), name)
    # What is mounted on is no symlink; whoever looks at it all the same waits for a server that may hang.
    if name and (find_mount(resolved) is not None or not os.path.islink(path)):
        return resolved
    return os.path.realpath(path)


def is_below(path: str, directory: str) -> bool:
    """Whether *path* lies below *directory*, going by their names."""
    parent = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    above = resolve_mountpoint(directory)
    return os.path.commonpath([parent, above]) == above


def check_source(source: str) -> str:
    """Return the absolute path of the source.

    Raises:
        SourceError: it is missing, not a directory, or cannot be read.
    """
    path = os.path.realpath(source)
    try:
        kind = os.stat(path)
    except FileNotFoundError:
        raise SourceError(f"source {source}: there is no such directory") from None
    except OSError as error:
        raise SourceError(f"source {source}: {error.strerror}") from None
    if not stat.S_ISDIR(kind.st_mode):
        raise SourceError(f"source {source}: this is not a directory; llloop mirrors directories")
    if not os.access(path, os.R_OK | os.X_OK):
        raise SourceError(f"source {source}: you may not read it; it needs read and search permission (r-x)")
    return path


def check_mountpoint(config: ServeConfig, source: str) -> str:
    """Return the absolute path of the mount point.

    Args:
        config: the mount's options.
        source: the absolute path of the source.

    Raises:
        MountpointError: it is missing, not a directory, in use, or in a place that would deadlock.
        DeadMountError: a mount whose server is gone is in the way.
    """
    path = resolve_mountpoint(config.mountpoint)
    shown = config.mountpoint
    try:
        kind = os.stat(path)
        os.statvfs(path)  # for the attributes of a dead mount may still be cached, as is_dead() says
    except FileNotFoundError:
        raise MountpointError(f"mount point {shown}: there is no such directory; make it first: mkdir {path}") from None
    except OSError as error:
        if error.errno in _DEAD and config.replace_dead:
            unmount(path, lazy=True)
            return check_mountpoint(config, source)
        if error.errno in _DEAD:
            raise DeadMountError(
                f"mount point {shown}: a FUSE mount whose server died is in the way ({error.strerror}); "
                f"detach it with: llloop umount --lazy {path} (or serve with --replace-dead)"
            ) from None
        raise MountpointError(f"mount point {shown}: {error.strerror}") from None
    if not stat.S_ISDIR(kind.st_mode):
        raise MountpointError(f"mount point {shown}: this is not a directory")
    _check_places(path, source)
    mounted = find_mount(path)
    if mounted is not None:
        raise MountpointError(
            f"mount point {shown}: {mounted.source} ({mounted.type}) is mounted there already; "
            f"unmount it first: llloop umount {path}"
        )
    try:
        filled = bool(os.listdir(path))
    except OSError as error:
        raise MountpointError(f"mount point {shown}: {error.strerror}") from None
    if filled and not config.nonempty:
        raise MountpointError(
            f"mount point {shown}: the directory is not empty; a mount would hide its files "
            "(--nonempty mounts all the same)"
        )
    if os.geteuid() != 0 and not os.access(path, os.W_OK):
        raise MountpointError(
            f"mount point {shown}: you may not write to it, so fusermount will not let you mount on it"
        )
    return path


def _check_places(mountpoint: str, source: str) -> None:
    """Refuse a mount point inside the source, where llloop would ask itself and wait for ever, and the reverse."""
    if _is_within(mountpoint, source):
        raise MountpointError(
            f"mount point {mountpoint}: it is the source or lies inside it ({source}); the mirror would contain itself "
            "and deadlock. Choose a mount point outside of the source"
        )
    if _is_within(source, mountpoint):
        raise MountpointError(
            f"mount point {mountpoint}: the source {source} lies inside it and would be hidden by the mount. "
            "Choose a mount point elsewhere"
        )


def _is_within(path: str, directory: str) -> bool:
    """Whether *path* is *directory* or below it, also by way of a bind mount."""
    wanted = os.stat(directory)
    while True:
        try:
            if os.path.samestat(os.stat(path), wanted):
                return True
        except OSError:
            pass
        parent = os.path.dirname(path)
        if parent == path:
            return False
        path = parent


def check_host(config: ServeConfig) -> None:
    """Check that this machine and this user can mount with FUSE.

    Raises:
        HostError: not so; the message says what to do.
    """
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise HostError(
            f"{_DEVICE} is missing: load the kernel module (modprobe fuse), or, in a container, pass the device in"
        ) from None
    except OSError as error:
        raise HostError(
            f"{_DEVICE} cannot be opened ({error.strerror}): this user or container is not allowed to use FUSE"
        ) from None
    mount_options.check_user(config)
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount") is None:
        raise HostError("fusermount is missing, which lets users mount: install Debian's package fuse3 (or fuse)")
    if config.allow_other and not _user_allow_other():
        raise HostError(
            f"--allow-other needs the line user_allow_other in {_FUSE_CONF}, which root can add; "
            "or serve with --no-allow-other"
        )


def _user_allow_other() -> bool:
    try:
        lines = _FUSE_CONF.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def unmount(mountpoint: str, *, lazy: bool) -> None:
    """Unmount *mountpoint*.

    Args:
        mountpoint: an absolute path without symlinks.
        lazy: detach it now even if it is busy; what has files open there keeps them.

    Raises:
        OSError: EBUSY if it is in use, or what umount2(2) says (as root).
        LlloopError: what fusermount says (as an ordinary user).
    """
    if os.geteuid() == 0:
        syscalls.umount(mountpoint, syscalls.UMOUNT_NOFOLLOW | (syscalls.MNT_DETACH if lazy else 0))
        return
    command = ["fusermount", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_FUSERMOUNT_PATIENCE,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise HostError(
            "fusermount is missing, which lets users unmount: install Debian's package fuse3 (or fuse)"
        ) from None
    except subprocess.TimeoutExpired:
        raise LlloopError(f"fusermount did not end within {_FUSERMOUNT_PATIENCE} seconds") from None
    if done.returncode != 0:
        message = done.stderr.strip() or f"fusermount ended with {done.returncode}"
        if "busy" in message:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), mountpoint)
        raise LlloopError(message)


def raise_read_ahead(device: tuple[int, int]) -> None:
    """Have the kernel read further ahead in a mount, in requests of the largest size, where this process may say so.

    Each request wakes a worker, so fewer and larger ones make files that are read through, above all several at a
    time, come faster. Only root may; others keep the kernel's default of 128 KiB.

    Args:
        device: major and minor number of the mount.
    """
    setting = Path("/sys/class/bdi") / f"{device[0]}:{device[1]}" / "read_ahead_kb"
    with suppress(OSError, ValueError):  # no sysfs, or not writable, in a container
        if int(setting.read_text()) < _READ_AHEAD:
            setting.write_text(str(_READ_AHEAD))
