"""Acting with the caller's rights where the source must see them.

Mounted by root for others, the kernel checks permissions before it sends a request (default_permissions), but by the
attributes that it keeps, which may be old. So a system call that depends on a right is made as the caller, and the
source's own kernel checks again. A new file belongs to who made it, and set-user-ID, set-group-ID and file
capabilities go when somebody without CAP_FSETID writes.
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

from llloop.linux import syscalls

_log = logging.getLogger(__name__)

_SECBIT_NO_SETUID_FIXUP = 1 << 2  # <linux/securebits.h>

SETID = stat.S_ISUID | stat.S_ISGID


def _set_of(*capabilities: int) -> int:
    return sum(1 << one for one in capabilities)


# What a process of root's server may keep, each capability with its reason (capabilities(7)). CAP_SYS_RESOURCE is in
# neither set also because writes would pass over quotas and reserved blocks with it.
FRONT = _set_of(
    syscalls.CAP_CHOWN,  # chown
    syscalls.CAP_DAC_OVERRIDE,  # to reach whatever the caller has reached
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


# Those by which a process passes over the permissions and owners of files (capabilities(7)).
FILES = _set_of(
    syscalls.CAP_CHOWN,
    syscalls.CAP_DAC_OVERRIDE,
    syscalls.CAP_DAC_READ_SEARCH,
    syscalls.CAP_FOWNER,
    syscalls.CAP_FSETID,
    syscalls.CAP_SETFCAP,
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
    """Lets the source judge and see a system call as the caller's: ``with caller(uid, gid, (), 0): os.mkdir(...)``.

    The file system ids decide the owner of a new file and whose rights count (setfsuid(2)). Of the capabilities by
    which a process passes over a file's permissions and owner, only the caller's own stay. All of this is each
    thread's own.

    Args:
        setid: knows which capabilities this thread has in effect otherwise.

    Attributes:
        is_able: whether this process may act as others at all; an ordinary user's server acts with that user's rights.
    """

    def __init__(self, setid: SetidGuard) -> None:
        self.is_able = os.geteuid() == 0
        self._setid = setid
        self._own = (os.geteuid(), os.getegid())
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._switched = self._lowered = self._in_groups = False
        if self.is_able:
            _keep_capabilities()

    def set_umask(self, umask: int) -> None:
        """Set the umask of the next system calls; it stays as the last caller's, because callers rarely differ."""
        if umask != self._umask:
            os.umask(umask)
            self._umask = umask

    def __call__(self, uid: int, gid: int, groups: tuple[int, ...] = (), capabilities: int | None = None) -> Caller:
        """Act as *uid* and *gid* until the ``with`` block ends.

        Args:
            uid, gid: the file system ids.
            groups: the supplementary groups.
            capabilities: those of `FILES` that the caller has, as a set of bits; None for all that this process has.
        """
        if not self.is_able:
            return self
        if groups:
            with suppress(PermissionError):  # not allowed in some user namespaces (user_namespaces(7))
                syscalls.setgroups(groups)
                self._in_groups = True
        if (uid, gid) != self._own:
            syscalls.setfsgid(gid)
            syscalls.setfsuid(uid)
            self._switched = True
        if capabilities is not None:
            effective, permitted, inheritable = self._setid.capabilities
            effective = effective & ~FILES | permitted & capabilities & FILES
            syscalls.set_capabilities(effective, permitted, inheritable)
            self._lowered = True
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._in_groups:
            self._in_groups = False
            syscalls.setgroups(())
        if self._switched:
            self._switched = False
            uid, gid = self._own
            syscalls.setfsuid(uid)
            syscalls.setfsgid(gid)
            after_change_of_ids()
        if self._lowered:
            self._lowered = False
            syscalls.set_capabilities(*self._setid.capabilities)


class Writer(threading.local):
    """Lets the source see who writes, for quotas and for the blocks that file systems reserve for root.

    The identity stays until another comes, for a stream of requests mostly has one writer. Each thread has its own.
    """

    def __init__(self) -> None:
        self._able = os.geteuid() == 0 and _keep_capabilities()
        # A thread begins with the ids of the one that started it. -1 is no id: it only asks for the one there is.
        self._current = (syscalls.setfsuid(-1), syscalls.setfsgid(-1))

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

    @property
    def capabilities(self) -> tuple[int, int, int]:
        """The capabilities that are effective now, permitted and inheritable, as sets of bits."""
        effective = self._effective if self._keeping else self._effective & ~(1 << syscalls.CAP_FSETID)
        return effective, self._permitted, self._inheritable

    def clear(self, clearing: bool) -> None:
        """Make the next calls clear set-ID bits, or keep them."""
        if clearing == self._keeping and self._able:
            bit = 1 << syscalls.CAP_FSETID
            effective = self._effective & ~bit if clearing else self._effective | bit
            syscalls.set_capabilities(effective, self._permitted, self._inheritable)
            self._keeping = not clearing
