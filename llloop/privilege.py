"""Acting with the caller's rights where the source must see them.

Mounted by root for others, the kernel has checked permissions before a request arrives
(default_permissions). Two things remain the server's: a new file belongs to who made it, and
set-user-ID, set-group-ID and file capabilities go when somebody without CAP_FSETID writes.
An ordinary user's server has no such powers, and its source needs none: all files become the user's.

What the front and the workers do not need for that, `keep_only` takes from them, for good.
"""

from __future__ import annotations

import logging
import os
import signal
import stat
import threading
from contextlib import suppress
from types import TracebackType

from . import syscalls

_log = logging.getLogger(__name__)

_SECBIT_NO_SETUID_FIXUP = 1 << 2  # <linux/securebits.h>

SETID = stat.S_ISUID | stat.S_ISGID


def _set_of(*capabilities: int) -> int:
    return sum(1 << one for one in capabilities)


# What a process of root's server may keep, each capability with its reason (capabilities(7)). CAP_SYS_RESOURCE is in
# neither set also because writes would pass over quotas and reserved blocks with it.
FRONT = _set_of(
    syscalls.CAP_CHOWN,  # chown
    syscalls.CAP_DAC_OVERRIDE,  # the kernel has checked who may do what, SRC must not ask again
    syscalls.CAP_DAC_READ_SEARCH,
    syscalls.CAP_FOWNER,  # chmod, times, attributes and sticky directories of others
    syscalls.CAP_FSETID,  # set-ID bits stay when they are to stay
    syscalls.CAP_SETGID,  # new files are their makers'
    syscalls.CAP_SETUID,
    syscalls.CAP_SETFCAP,  # the attribute security.capability
    syscalls.CAP_MKNOD,  # devices
    syscalls.CAP_SYS_ADMIN,  # the attributes trusted.* and security.*; --io kernel
)
WORKER = _set_of(
    syscalls.CAP_FSETID,
    syscalls.CAP_SETGID,  # quotas and reserved blocks are the writers'
    syscalls.CAP_SETUID,
    syscalls.CAP_SYS_PTRACE,  # descriptors are pulled from the front, which has capabilities that a worker has not
    syscalls.CAP_DAC_OVERRIDE,  # where descriptors cannot be pulled, and to see how far a dead worker's append came
)


def worker_capabilities() -> int:
    """Return what a worker needs here.

    Who may not trace (containers are seldom allowed to) may pull descriptors only from a process that has no
    capability which it has not itself (security/commoncap.c, cap_ptrace_access_check()).
    """
    _, permitted, _ = syscalls.get_capabilities()
    return WORKER if permitted >> syscalls.CAP_SYS_PTRACE & 1 else WORKER | FRONT


def keep_only(capabilities: int) -> None:
    """Give up, for good, all capabilities but some, the groups, and whatever a program executed from here could gain.

    The source would take this process's supplementary groups for the caller's: file systems can reserve blocks for a
    group, too. An ordinary user's process has none; it only loses the way to set-ID programs (PR_SET_NO_NEW_PRIVS).

    Args:
        capabilities: what to keep of what there is, as a set of bits.
    """
    _keep_capabilities()  # while that is still allowed
    with suppress(PermissionError):
        os.setgroups(())
    # Not allowed without CAP_SETPCAP; then this process has little to lose, and no_new_privs bars the way back anyway.
    with suppress(OSError):
        for number in range(64):
            if not capabilities >> number & 1:
                syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
    effective, permitted, inheritable = syscalls.get_capabilities()
    syscalls.set_capabilities(effective & capabilities, permitted & capabilities, inheritable & capabilities)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def _keep_capabilities() -> bool:
    """Have a change of the file system ids leave the capabilities alone (capabilities(7)); return whether it will."""
    try:
        bits = syscalls.prctl(syscalls.PR_GET_SECUREBITS)
        if bits & _SECBIT_NO_SETUID_FIXUP:
            return True
        syscalls.prctl(syscalls.PR_SET_SECUREBITS, bits | _SECBIT_NO_SETUID_FIXUP)
    except OSError:
        return False
    return True


def after_change_of_ids() -> None:
    """Set again what the kernel resets when a process's file system ids change (prctl(2)).

    An undumpable process's descriptors could not be pulled by the workers, and without the signal at the
    parent's death this process would outlive the supervisor.
    """
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)


class Caller(threading.local):
    """Makes new files the caller's: ``with caller(uid, gid, umask): os.mkdir(...)``.

    The file system ids decide the owner (setfsuid(2)); the supplementary groups and the mode of the
    directory play no part any more, since the kernel has checked them and this process keeps CAP_DAC_OVERRIDE.
    The umask stays as the last caller's, because callers rarely differ. All of this is each thread's own.
    """

    def __init__(self) -> None:
        self._able = os.geteuid() == 0
        self._own = (os.geteuid(), os.getegid())
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._switched = False
        if self._able and not _keep_capabilities():
            _log.info("the source checks a caller's permission to create again, without supplementary groups")

    def __call__(self, uid: int, gid: int, umask: int | None = None) -> Caller:
        """Act as *uid* and *gid* until the ``with`` block ends, with *umask* if something is created."""
        if umask is not None and umask != self._umask:
            os.umask(umask)
            self._umask = umask
        if self._able and (uid, gid) != self._own:
            syscalls.setfsgid(gid)
            syscalls.setfsuid(uid)
            self._switched = True
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._switched:
            self._switched = False
            uid, gid = self._own
            syscalls.setfsuid(uid)
            syscalls.setfsgid(gid)
            after_change_of_ids()


class Writer(threading.local):
    """Lets the source see who writes, for quotas and for the blocks that file systems reserve for root.

    The identity stays until another comes, for a stream of requests mostly has one writer. Each thread has its own.
    """

    def __init__(self) -> None:
        self._able = os.geteuid() == 0 and _keep_capabilities()
        self._current = (os.geteuid(), os.getegid())

    def assume(self, uid: int, gid: int) -> None:
        """Make the next writes count as those of *uid* and *gid* (setfsuid(2))."""
        if self._able and (uid, gid) != self._current:
            syscalls.setfsgid(gid)
            syscalls.setfsuid(uid)
            after_change_of_ids()
            self._current = (uid, gid)


def has_locking_mark(mode: int) -> bool:
    """Whether a mode has set-group-ID without group execution.

    That lends nobody a group: it was the mark of mandatory locks. A member of the file's group does not clear it.
    """
    return mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID and stat.S_ISREG(mode)


class SetidGuard(threading.local):
    """Decides whether the next write, truncation or ACL change clears set-ID bits.

    The kernel clears them for a process without CAP_FSETID (capabilities(7)), so the capability is
    lowered and raised as the request says; in a stream of requests alike nothing is done. Each thread has its own.
    """

    def __init__(self) -> None:
        self._effective, self._permitted, self._inheritable = syscalls.get_capabilities()
        self._keeping = bool(self._effective & 1 << syscalls.CAP_FSETID)
        self._able = bool(self._permitted & 1 << syscalls.CAP_FSETID)

    def clear(self, clearing: bool) -> None:
        """Make the next calls clear set-ID bits, or keep them."""
        if clearing == self._keeping and self._able:
            bit = 1 << syscalls.CAP_FSETID
            effective = self._effective & ~bit if clearing else self._effective | bit
            syscalls.set_capabilities(effective, self._permitted, self._inheritable)
            self._keeping = not clearing
