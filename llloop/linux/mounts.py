"""The list of mounts (/proc/self/mountinfo), unmounting, and the read-ahead of a mount."""

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

# The file system type of llloop's mounts in mountinfo.
TYPE = "fuse.llloop"

# Read-ahead in KiB: the size of the largest READ request.
_READ_AHEAD = 512
# After how many seconds fusermount counts as hanging.
_FUSERMOUNT_TIMEOUT = 30
# Where to look for fusermount after PATH.
_SYSTEM_PATH = ("/usr/local/bin", "/usr/bin", "/bin")
# The errors of a FUSE mount without a server. Requests that were waiting when the server died get ECONNABORTED.
DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of /proc/self/mountinfo (proc(5)).

    Attributes:
        mount_id: the mount ID.
        device: major and minor number, as in st_dev.
        mountpoint: the path of the mount point.
        type: the file system type, such as fuse.llloop.
        source: the mount source.
        owner: for a FUSE mount, the ids of the user and group that mounted it.
    """

    mount_id: int
    device: tuple[int, int]
    mountpoint: str
    type: str
    source: str
    owner: tuple[int, int] | None = None


def mounts() -> list[MountEntry]:
    """Return the mounts of this process's mount namespace, in the order of mounting.

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
    """Return user_id and group_id from a FUSE mount's options, None for other mounts."""
    given = dict(option.partition(b"=")[::2] for option in options.split(b","))
    try:
        return int(given[b"user_id"]), int(given[b"group_id"])
    except (KeyError, ValueError):
        return None


def _unescape(field: bytes) -> str:
    """Decode the octal escapes of mountinfo (space, tab, newline, backslash)."""
    parts = field.split(b"\\")
    decoded = parts[0] + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in parts[1:])
    return os.fsdecode(decoded)


def find_mount(mountpoint: str) -> MountEntry | None:
    """Return the topmost mount at *mountpoint*, an absolute path without symlinks; None if nothing is mounted."""
    found = [entry for entry in mounts() if entry.mountpoint == mountpoint]
    return found[-1] if found else None


def is_dead(mountpoint: str) -> bool:
    """Return whether the server of the FUSE mount at *mountpoint* is gone.

    It asks with statfs(2), because the kernel never answers that call from a cache.
    """
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in DEAD
    return False


def find_llloop(path: str, shown: str) -> MountEntry:
    """Return the llloop mount at *path*.

    Args:
        path: an absolute path without symlinks.
        shown: the path for error messages, as the user gave it.

    Raises:
        MountpointError: nothing or another file system is mounted there.
    """
    entry = find_mount(path)
    if entry is None:
        raise MountpointError(f"{shown}: nothing is mounted there")
    if entry.type != TYPE:
        raise MountpointError(f"{shown}: {entry.source} ({entry.type}) is mounted there, not llloop; use umount")
    return entry


def absolute(path: str, error: LlloopError) -> str:
    """Return *path* as an absolute one.

    Args:
        path: a path.
        error: the error to raise; the reason is appended to its text.

    Raises:
        LlloopError: *path* is relative, and the working directory was removed.
    """
    try:
        return os.path.abspath(path)
    except OSError:
        raise type(error)(f"{error}: the path is relative, and the working directory no longer exists") from None


def resolve_mountpoint(mountpoint: str) -> str:
    """Return *mountpoint* as an absolute path without symlinks. Do not access the mount itself, which may be dead.

    Raises:
        MountpointError: it is relative, and the working directory was removed.
    """
    path = absolute(mountpoint, MountpointError(f"mount point {mountpoint}"))
    parent, name = os.path.split(path)
    resolved = os.path.join(os.path.realpath(parent), name)
    # A mount point is never a symlink. Calling lstat(2) on it would wait for its server, which may hang.
    if name and (find_mount(resolved) is not None or not os.path.islink(path)):
        return resolved
    return os.path.realpath(path)


def is_below(path: str, directory: str) -> bool:
    """Return whether *path* lies below *directory*; compare the resolved paths only.

    Raises:
        LlloopError: one is relative, and the working directory was removed.
    """
    parent = os.path.realpath(os.path.dirname(absolute(path, HostError(path))))
    above = resolve_mountpoint(directory)
    return os.path.commonpath([parent, above]) == above


def fusermount() -> str:
    """Return the path of fusermount(1), with which ordinary users mount and unmount.

    Raises:
        HostError: it is not installed.
    """
    # Ignore relative directories in PATH: the owner of the working directory could put a program there.
    places = [place for place in os.get_exec_path() if os.path.isabs(place)]
    found = shutil.which("fusermount", path=os.pathsep.join([*places, *_SYSTEM_PATH]))
    if found is None:
        raise HostError(
            "fusermount is missing, and ordinary users need it to mount; install Debian's package fuse3 (or fuse)"
        )
    return found


def unmount(mountpoint: str, *, lazy: bool) -> None:
    """Unmount *mountpoint*.

    Args:
        mountpoint: an absolute path without symlinks.
        lazy: detach the mount immediately even if it is busy; programs keep their open files.

    Raises:
        OSError: EBUSY if it is in use, or another error of umount2(2) (as root).
        LlloopError: an error message of fusermount (as an ordinary user).
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
            timeout=_FUSERMOUNT_TIMEOUT,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise LlloopError(f"fusermount did not end within {_FUSERMOUNT_TIMEOUT} seconds") from None
    if done.returncode != 0:
        message = done.stderr.strip() or f"fusermount ended with {done.returncode}"
        if "busy" in message:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), mountpoint)
        raise LlloopError(message)


def raise_read_ahead(device: tuple[int, int]) -> None:
    """Raise the read-ahead of a mount to the size of the largest READ request, if this process may.

    Each request wakes a worker. So fewer and larger requests make sequential reads faster, especially of several
    files at a time. Only root may change the read-ahead; for other users it stays at the kernel's default of 128 KiB.

    Args:
        device: major and minor number of the mount.
    """
    setting = Path("/sys/class/bdi") / f"{device[0]}:{device[1]}" / "read_ahead_kb"
    with suppress(OSError, ValueError):  # containers may lack sysfs, or have it read-only
        if int(setting.read_text()) < _READ_AHEAD:
            setting.write_text(str(_READ_AHEAD))
