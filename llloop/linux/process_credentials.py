"""The credentials of callers, read from proc(5) because a FUSE request does not contain them.

A request contains the file system ids of its caller, unless its mount can be id-mapped (FUSE_ALLOW_IDMAP): then only
requests that create something contain ids. Groups and capabilities are never in a request.

The thread that a request names waits for the answer. So the kernel cannot give its id to another thread meanwhile.
"""

from __future__ import annotations

import os
import signal
from typing import NamedTuple

from llloop.linux import syscalls
from llloop.linux.id_maps import UNMAPPED, IdMap

_PORTION = 4096  # bytes; only with hundreds of groups is a status file longer


class Credentials(NamedTuple):
    """The credentials of a thread besides its file system ids.

    Attributes:
        groups: its supplementary groups.
        capabilities: its effective capabilities, as a bit set.
        pid: the thread's id.
    """

    groups: tuple[int, ...]
    capabilities: int
    pid: int


class Callers:
    """Tells who makes a request. All ids are those of the source.

    Args:
        maps: the map of the users and that of the groups, if every mount of the connection is id-mapped with these.
    """

    def __init__(self, maps: tuple[IdMap, IdMap] | None = None) -> None:
        self._maps = maps

    @property
    def are_mapped(self) -> bool:
        """Whether the mount is id-mapped."""
        return self._maps is not None

    def ids_of(self, pid: int) -> tuple[int, int]:
        """Return the file system ids of a thread, for a request that does not contain them.

        Args:
            pid: the thread that the request names, or 0 if it has no id in this pid namespace.

        Returns:
            The ids; each is `UNMAPPED` if it has none in the source, or is not known.
        """
        fields = _status(pid)
        try:
            return self._to_source(int(fields[b"Uid"].split()[3]), int(fields[b"Gid"].split()[3]))
        except (KeyError, IndexError):
            return UNMAPPED, UNMAPPED

    def credentials(self, pid: int, uid: int, gid: int) -> Credentials | None:
        """Return the credentials of a thread.

        Args:
            pid: as for `ids_of`.
            uid, gid: its file system ids, as in the request or from `ids_of`.

        Returns:
            The credentials; None if proc(5) does not show the thread, or if the thread temporarily acts with other
            credentials (nfsd, overlayfs), which proc(5) does not show.
        """
        fields = _status(pid)
        try:
            if self._to_source(int(fields[b"Uid"].split()[3]), int(fields[b"Gid"].split()[3])) != (uid, gid):
                return None
            groups = tuple(map(int, fields[b"Groups"].split()))
            if self._maps is not None:
                groups = tuple(one for one in map(self._maps[1].to_source, groups) if one != UNMAPPED)
            return Credentials(groups, int(fields[b"CapEff"], 16), pid)
        except (KeyError, IndexError):
            return None

    def _to_source(self, uid: int, gid: int) -> tuple[int, int]:
        if self._maps is None:
            return uid, gid
        users, groups = self._maps
        return users.to_source(uid), groups.to_source(gid)

    def are_capable(self, pid: int, uid: int, gid: int) -> bool:
        """Return whether a thread's capabilities apply to a file with that owner and group.

        They apply only if both ids are mapped by the mount, and in the thread's user namespace (fs/inode.c,
        inode_owner_or_capable(); kernel/capability.c, privileged_wrt_inode_uidgid()).
        """
        shown: tuple[int | None, int | None] = uid, gid
        if self._maps is not None:
            users, groups = self._maps
            shown = users.to_mount(uid), groups.to_mount(gid)
        return all(
            number is not None and _is_mapped(pid, which, number)
            for which, number in zip(("uid_map", "gid_map"), shown, strict=True)
        )

    @staticmethod
    def is_administrator(pid: int) -> bool:
        """Return whether a thread has CAP_SYS_ADMIN in the user namespace of this process."""
        is_ours = _read(pid, "uid_map") == _read(os.getpid(), "uid_map")
        return is_ours and bool(int(_status(pid).get(b"CapEff", b"0"), 16) >> syscalls.CAP_SYS_ADMIN & 1)


# For a mount whose ids are those of the source.
ANY_IDS = Callers()


def _status(pid: int) -> dict[bytes, bytes]:
    """Return the fields of /proc/PID/status, none if it cannot be read."""
    status = _read(pid, "status") if pid else b""
    return dict(tuple(line.split(b":", 1)) for line in status.splitlines() if b":" in line)  # type: ignore[misc]


def program_of(thread: int) -> tuple[int, bytes]:
    """Return the process of a thread, and the thread's name (proc(5), "Tgid" and "Name" of status).

    Args:
        thread: the id of the thread that a request names, or 0 if it has none in this PID namespace.

    Returns:
        The process id, or *thread* if proc(5) does not show the thread; and the name, or b"".
    """
    status = _read(thread, "status") if thread else b""
    fields = dict(line.split(b":", 1) for line in status.splitlines()[:8] if b":" in line)
    try:
        return int(fields[b"Tgid"]), fields[b"Name"].strip()
    except (KeyError, ValueError):
        return thread, b""


def is_being_killed(thread: int) -> bool:
    """Return whether a thread has a fatal signal pending. The kernel turns every fatal signal into SIGKILL."""
    status = _read(thread, "status") if thread else b""
    _, found, pending = status.partition(b"\nSigPnd:")
    return bool(found) and bool(int(pending.split(None, 1)[0], 16) & 1 << signal.SIGKILL - 1)


def _is_mapped(pid: int, which: str, number: int) -> bool:
    """Return whether an id of this user namespace is mapped in the one of thread *pid* (user_namespaces(7)).

    Args:
        pid: the thread.
        which: ``uid_map`` or ``gid_map``.
        number: the user or group id.
    """
    theirs = _read(pid, which)
    if theirs == _read(os.getpid(), which):  # most likely the same namespace
        return True
    for line in theirs.splitlines():
        _, first, count = map(int, line.split())
        if first <= number < first + count:
            return True
    return False


def _read(pid: int, name: str) -> bytes:
    """Return the content of /proc/PID/NAME (proc(5)), empty if it cannot be read."""
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        data = portion = os.read(fd, _PORTION)
        while len(portion) == _PORTION:
            portion = os.read(fd, _PORTION)
            data += portion
        return data
    except OSError:  # ESRCH: it has ended
        return b""
    finally:
        os.close(fd)
