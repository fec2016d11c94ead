"""The checks before mounting: source, mount point, machine and user.

Each error says in one line what is wrong and what to do. libfuse's own messages come later and say less. `llloop serve`
and `llloop serve --check` make the same checks.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from llloop import mount_options
from llloop.config import IoKind, ServeConfig
from llloop.errors import DeadMountError, HostError, MountpointError, SourceError
from llloop.linux import kernel, limits, mount_identity, mounts, syscalls, user_namespaces
from llloop.linux.timed_call import call_with_timeout
from llloop.supervisor import cpu_latency

DEVICE = "/dev/fuse"
DEVICE_NUMBER = os.makedev(10, 229)  # FUSE_MINOR of MISC_MAJOR, Documentation/admin-guide/devices.txt
# A directory that can never be a mount point.
_NO_MOUNT = "/proc/self/fdinfo"
FUSE_CONF = Path("/etc/fuse.conf")
# How long the source and the mount point may take to answer, in seconds.
TIMEOUT = 20.0
# The first kernel that does the I/O of FUSE files itself, and the first that maps their owners.
_PASSTHROUGH_SINCE = (6, 9)
_ID_MAPS_SINCE = (6, 12)
# The first kernel that says with each write whether it clears set-ID bits, even if the mount does not show them.
_KILLPRIV_SINCE = (5, 12)


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of the checks.

    Attributes:
        source: the source as an absolute path without symlinks.
        mountpoint: the mount point as an absolute path without symlinks.
    """

    source: str
    mountpoint: str


def check(config: ServeConfig, *, restart: bool = False) -> Checked:
    """Check that a mount can be made; change nothing.

    Args:
        config: the mount's options.
        restart: whether to accept an llloop mount at the mount point, which ends before the new one starts.

    Raises:
        LlloopError: it cannot; the subclasses say why.
    """
    try:
        source = _ask_source(config)
        mountpoint, _ = _ask_mountpoint(config, source, restart)
        check_host(config)
        limits.check(config.workers)
    except OSError as error:  # a file that every machine should have is missing, such as /dev/null
        raise HostError(f"{error.filename}: {error.strerror}") from None
    return Checked(source, mountpoint)


def make_way(config: ServeConfig) -> Checked:
    """Check that a mount can be made; first detach dead mounts at the mount point if `config.replace_dead` is set.

    Raises:
        LlloopError: no mount can be made; the subclasses say why.
    """
    checked = check(config)
    while config.replace_dead and _ask_mountpoint(config, checked.source, restart=False)[1]:
        try:
            mount_identity.detach_if_dead(checked.mountpoint)
        except OSError as error:
            raise DeadMountError(
                f"mount point {config.mountpoint}: the dead mount there cannot be detached: {error.strerror}"
            ) from None
    return checked


def _ask_source(config: ServeConfig) -> str:
    late = SourceError(f"source {config.source}: the file system has not answered within {TIMEOUT:g} seconds")
    return call_with_timeout(lambda: check_source(config.source), TIMEOUT, late)


def _ask_mountpoint(config: ServeConfig, source: str, restart: bool) -> tuple[str, bool]:
    """Return the mount point's absolute path, and whether there is a dead mount to replace."""
    late = MountpointError(
        f"mount point {config.mountpoint}: the file system has not answered within {TIMEOUT:g} seconds"
    )
    path, dead = call_with_timeout(lambda: check_mountpoint(config, source, restart=restart), TIMEOUT, late)
    return path, dead


def check_source(source: str) -> str:
    """Return the absolute path of the source.

    Raises:
        SourceError: it is missing, not a directory, cannot be read, or the server of its file system is gone.
    """
    mounts.absolute(source, SourceError(f"source {source}"))
    path = os.path.realpath(source)
    try:
        kind = os.stat(path)
        os.statvfs(path)  # stat(2) may return cached attributes of a dead mount, see mounts.is_dead()
    except FileNotFoundError:
        raise SourceError(f"source {source}: there is no such directory") from None
    except OSError as error:
        hint = "; this is a FUSE mount whose server is gone" if error.errno in mounts.DEAD else ""
        raise SourceError(f"source {source}: {error.strerror}{hint}") from None
    if not stat.S_ISDIR(kind.st_mode):
        raise SourceError(f"source {source}: this is not a directory; llloop mirrors directories")
    if not os.access(path, os.R_OK | os.X_OK):
        raise SourceError(f"source {source}: this user needs read and search permission (r-x)")
    return path


def check_mountpoint(config: ServeConfig, source: str, *, restart: bool = False) -> tuple[str, bool]:
    """Check the mount point.

    Args:
        config: the mount's options.
        source: the absolute path of the source.
        restart: as for `check`.

    Returns:
        Its absolute path, and whether there is a dead mount to replace.

    Raises:
        MountpointError: it is missing, not a directory, in use, or nested with the source.
        DeadMountError: there is a dead mount.
    """
    path = mounts.resolve_mountpoint(config.mountpoint)
    shown = config.mountpoint
    try:
        kind = os.stat(path)
        os.statvfs(path)  # stat(2) may return cached attributes of a dead mount, see mounts.is_dead()
    except FileNotFoundError:
        raise MountpointError(
            f"mount point {shown}: there is no such directory; create it with: mkdir {path}"
        ) from None
    except OSError as error:
        if error.errno in mounts.DEAD and config.replace_dead:
            return path, True
        if error.errno in mounts.DEAD:
            raise DeadMountError(
                f"mount point {shown}: there is a dead FUSE mount, whose server is gone ({error.strerror}); "
                f"detach it with: llloop umount --lazy {path}, or serve with --replace-dead"
            ) from None
        raise MountpointError(f"mount point {shown}: {error.strerror}") from None
    if not stat.S_ISDIR(kind.st_mode):
        raise MountpointError(f"mount point {shown}: this is not a directory")
    _check_places(path, source)
    mounted = mounts.find_mount(path)
    if mounted is not None and restart and mounted.type == mounts.TYPE:
        return path, False
    if mounted is not None:
        raise MountpointError(
            f"mount point {shown}: {mounted.source} ({mounted.type}) is already mounted there; "
            f"unmount it first: llloop umount {path}"
        )
    try:
        filled = bool(os.listdir(path))
    except OSError as error:
        raise MountpointError(f"mount point {shown}: {error.strerror}") from None
    if filled and not config.nonempty:
        raise MountpointError(
            f"mount point {shown}: the directory is not empty, and the mount would hide its files; "
            "use an empty directory, or --nonempty"
        )
    if os.geteuid() != 0 and not os.access(path, os.W_OK):
        raise MountpointError(
            f"mount point {shown}: this user needs write permission; fusermount does not mount on it otherwise"
        )
    return path, False


def _check_places(mountpoint: str, source: str) -> None:
    """Check that source and mount point are not inside each other: llloop would wait for itself.

    Raises:
        MountpointError: one is inside the other.
    """
    if _is_within(mountpoint, source):
        raise MountpointError(
            f"mount point {mountpoint}: this is the source ({source}) or a directory inside it; the mount would "
            "contain itself and deadlock; choose a mount point outside the source"
        )
    if _is_within(source, mountpoint):
        raise MountpointError(
            f"mount point {mountpoint}: the source {source} is inside this directory, and the mount would hide it; "
            "choose another mount point"
        )


def _is_within(path: str, directory: str) -> bool:
    """Return whether *path* is *directory* or below it, also through a bind mount."""
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
        HostError: they cannot; the message says what to do.
    """
    if config.id_maps is not None:
        _check_id_maps()
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise HostError(
            f"{DEVICE} is missing; load the kernel module (modprobe fuse), or give the device to this container"
        ) from None
    except OSError as error:
        raise HostError(
            f"{DEVICE} cannot be opened ({error.strerror}): this user or container may not use FUSE"
        ) from None
    kind = os.fstat(device)
    os.close(device)
    if not stat.S_ISCHR(kind.st_mode) or kind.st_rdev != DEVICE_NUMBER:
        raise HostError(
            f"{DEVICE} is not the FUSE device (character device 10, 229); create it with: mknod {DEVICE} c 10 229"
        )
    mount_options.check_user(config)
    for option, value in (("--create-user", config.create_user), ("--create-group", config.create_group)):
        if value and os.geteuid() != 0:
            raise HostError(f"{option}: only root may use it; the files that an ordinary user's mount creates are his")
    if config.shows_other_attributes and kernel.release() < _KILLPRIV_SINCE:
        raise HostError("--force-user, --force-group and --mode need Linux 5.12")
    if config.io is IoKind.KERNEL:
        _check_passthrough()
    cpu_latency.check(config.wake_latency)
    if os.geteuid() == 0:
        _check_may_mount()
        return
    mounts.fusermount()
    if syscalls.prctl(syscalls.PR_GET_NO_NEW_PRIVS):
        raise HostError(
            "this process has no_new_privs set (prctl(2)), so fusermount cannot mount for it; start llloop without that"
        )
    if config.allow_other and not _user_allow_other():
        raise HostError(
            f"--allow-other needs the line user_allow_other in {FUSE_CONF}; ask root to add it, or serve with "
            "--no-allow-other"
        )


def _check_may_mount() -> None:
    """Check that this process, which runs as root, may mount (CAP_SYS_ADMIN).

    It calls umount2(2) for a directory that is not a mount point. The errno shows whether this process may unmount, and
    the call changes nothing.

    Raises:
        HostError: it may not.
    """
    try:
        syscalls.umount(_NO_MOUNT, syscalls.MNT_EXPIRE)
    except PermissionError:
        raise HostError(
            "this process runs as root but may not mount: it lacks CAP_SYS_ADMIN; start the container with --cap-add "
            "SYS_ADMIN, or unshare(1) with --mount"
        ) from None
    except OSError:
        pass


def _user_allow_other() -> bool:
    try:
        lines = FUSE_CONF.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _check_passthrough() -> None:
    """Check that --io kernel may be possible; the kernel's INIT shows the rest later.

    Raises:
        HostError: it is certainly not possible.
    """
    reason = None
    if os.geteuid() != 0:
        reason = "it needs root"
    elif kernel.release() < _PASSTHROUGH_SINCE:
        reason = "it needs Linux 6.9"
    if reason is not None:
        raise HostError(f"--io kernel is not possible: {reason}; use --io auto or --io workers")


def _check_id_maps() -> None:
    """Check that --map-users and --map-groups may be possible; the kernel's INIT shows the rest later.

    Raises:
        HostError: they are certainly not possible.
    """
    reason = None
    if os.geteuid() != 0:
        reason = "they need root"
    elif kernel.release() < _ID_MAPS_SINCE:
        reason = "they need Linux 6.12"
    elif not user_namespaces.has_all_ids():
        reason = "this container has a user namespace of its own; llloop needs to be root of the machine for them"
    if reason is not None:
        raise HostError(f"--map-users and --map-groups are not possible: {reason}")
