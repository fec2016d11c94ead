"""What is mounted, and how a mount is ended."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llloop.errors import HostError, LlloopError, MountpointError
from llloop.linux import syscalls

# The file system type that mounts of llloop show.
TYPE = "fuse.llloop"

# How far the kernel reads ahead, in KiB: as much as the largest READ request asks for.
_READ_AHEAD = 512
# How long fusermount may take, in seconds, before it is taken to hang.
_FUSERMOUNT_PATIENCE = 30
# Where it is looked for besides PATH.
_SYSTEM_PATH = ("/usr/local/bin", "/usr/bin", "/bin")
# What a FUSE mount without a server says; the second one to who was waiting when it went.
DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


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
    """Return what is mounted in this process's mount namespace, in the order of mounting.

    Raises:
        HostError: the kernel's list of mounts cannot be read.
    """
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise HostError(f"{error.filename}: {error.strerror}; llloop needs /proc (mount -t proc proc /proc)") from None
    entries = []
    for line in lines:
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
        return error.errno in DEAD
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
        raise MountpointError(
            f"{shown}: {entry.source} ({entry.type}) is mounted there, which is not llloop's; use umount"
        )
    return entry


def absolute(path: str, error: LlloopError) -> str:
    """Return *path* as an absolute one.

    Args:
        path: a path.
        error: what to raise if that is impossible; the reason is put behind its text.

    Raises:
        LlloopError: *path* is relative, and the working directory was removed.
    """
    try:
        return os.path.abspath(path)
    except OSError:
        raise type(error)(f"{error}: it is relative, and the working directory does not exist any more") from None


def resolve_mountpoint(mountpoint: str) -> str:
    """Return *mountpoint* as an absolute path without symlinks, not touching the directory itself: it may be dead.

    Raises:
        MountpointError: it is relative, and the working directory was removed.
    """
    path = absolute(mountpoint, MountpointError(f"mount point {mountpoint}"))
    parent, name = os.path.split(path)
    resolved = os.path.join(os.path.realpath(parent), name)
    # What is mounted on is no symlink; whoever looks at it all the same waits for a server that may hang.
    if name and (find_mount(resolved) is not None or not os.path.islink(path)):
        return resolved
    return os.path.realpath(path)


def is_below(path: str, directory: str) -> bool:
    """Whether *path* lies below *directory*, going by their names.

    Raises:
        LlloopError: one is relative, and the working directory was removed.
    """
    parent = os.path.realpath(os.path.dirname(absolute(path, HostError(path))))
    above = resolve_mountpoint(directory)
    return os.path.commonpath([parent, above]) == above


def fusermount() -> str:
    """Return the path of fusermount(1), through which ordinary users mount and unmount.

    Raises:
        HostError: it is not installed.
    """
    # Directories that are not absolute are those of whoever made the working directory.
    places = [place for place in os.get_exec_path() if os.path.isabs(place)]
    found = shutil.which("fusermount", path=os.pathsep.join([*places, *_SYSTEM_PATH]))
    if found is None:
        raise HostError("fusermount is missing, which lets users mount: install Debian's package fuse3 (or fuse)")
    return found


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
    command = [fusermount(), "-u", *(["-z"] if lazy else []), "--", mountpoint]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_FUSERMOUNT_PATIENCE,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
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
