"""What a FUSE request does not say of its caller: supplementary groups and capabilities, read from proc(5).

A request names the thread that waits for its answer, so the number cannot belong to another thread meanwhile.
"""

from __future__ import annotations

import os
from typing import NamedTuple

_PORTION = 4096  # bytes; only a thread with hundreds of groups has more to say


class Credentials(NamedTuple):
    """What a thread may do besides what its file system ids allow.

    Attributes:
        groups: its supplementary groups.
        capabilities: its effective capabilities, as a set of bits.
        pid: the thread.
    """

    groups: tuple[int, ...]
    capabilities: int
    pid: int

    def covers(self, uid: int, gid: int) -> bool:
        """Whether its capabilities count for a file of that owner and group.

        In a user namespace of its own they do only if both are mapped there (fs/inode.c, inode_owner_or_capable();
        kernel/capability.c, privileged_wrt_inode_uidgid()).
        """
        return _is_mapped(self.pid, "uid_map", uid) and _is_mapped(self.pid, "gid_map", gid)


def credentials_of(pid: int, uid: int, gid: int) -> Credentials | None:
    """Return the credentials of a thread.

    Args:
        pid: the thread that a request names, 0 if the kernel cannot name it here.
        uid, gid: the file system ids that the request names.

    Returns:
        None if they cannot be known: proc(5) does not show the thread, or the thread acts with credentials that are
        not its own (nfsd, overlayfs), which proc(5) does not show.
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
    """Whether an id has a number in the user namespace of a thread (user_namespaces(7))."""
    theirs = _read(pid, which)
    if theirs == _read(os.getpid(), which):  # most likely the same namespace, which can name all ids that this one can
        return True
    for line in theirs.splitlines():
        _, first, count = map(int, line.split())
        if first <= number < first + count:
            return True
    return False


def _read(pid: int, name: str) -> bytes:
    """Return a file of a thread's directory in proc(5), empty if there is none."""
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
