"""The caller's supplementary groups and capabilities, read from proc(5) because a FUSE request does not contain them.

The thread that a request names waits for the answer. So the kernel cannot give its id to another thread meanwhile.
"""

from __future__ import annotations

import os
from typing import NamedTuple

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

    def covers(self, uid: int, gid: int) -> bool:
        """Return whether the thread's capabilities apply to a file with that owner and group.

        In another user namespace, they apply only if both ids are mapped there (fs/inode.c, inode_owner_or_capable();
        kernel/capability.c, privileged_wrt_inode_uidgid()).
        """
        return _is_mapped(self.pid, "uid_map", uid) and _is_mapped(self.pid, "gid_map", gid)


def credentials_of(pid: int, uid: int, gid: int) -> Credentials | None:
    """Return the credentials of a thread.

    Args:
        pid: the thread that the request names, or 0 if it has no id in this pid namespace.
        uid, gid: the file system ids in the request.

    Returns:
        The credentials; None if proc(5) does not show the thread, or if the thread temporarily acts with other
        credentials (nfsd, overlayfs), which proc(5) does not show.
    """
    status = _read(pid, "status") if pid else b""
    fields = dict(line.split(b":", 1) for line in status.splitlines() if b":" in line)
    try:
        if int(fields[b"Uid"].split()[3]) != uid or int(fields[b"Gid"].split()[3]) != gid:
            return None
        return Credentials(tuple(map(int, fields[b"Groups"].split())), int(fields[b"CapEff"], 16), pid)
    except (KeyError, IndexError):
        return None


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
