"""System calls made with the credentials of the process that sent a request.

If root mounts for other users, the kernel checks permissions before it sends a request (default_permissions). It uses
cached attributes, which may be out of date. So a server of root makes a system call that depends on a permission
with the caller's credentials, and the kernel checks the permission again in the source. A new file then belongs to
the caller. If the caller lacks CAP_FSETID, a write clears set-user-ID, set-group-ID and file capabilities.

The server of an ordinary user cannot change its credentials. All files that it creates belong to that user.

`drop_capabilities_except` permanently removes the capabilities that the front and the workers do not need.
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

SETID_BITS = stat.S_ISUID | stat.S_ISGID


def _set_of(*capabilities: int) -> int:
    return sum(1 << one for one in capabilities)


# The capabilities that a process of root's server keeps, each with its reason (capabilities(7)). Neither set contains
# CAP_SYS_RESOURCE: with it, writes would ignore quotas and reserved blocks.
FRONT_CAPABILITIES = _set_of(
    syscalls.CAP_CHOWN,  # chown
    syscalls.CAP_DAC_OVERRIDE,  # access to every file that the caller has reached
    syscalls.CAP_DAC_READ_SEARCH,
    syscalls.CAP_FOWNER,  # chmod, times, attributes and sticky directories of other users
    syscalls.CAP_FSETID,  # writes that keep set-ID bits
    syscalls.CAP_SETGID,  # new files belong to the caller
    syscalls.CAP_SETUID,
    syscalls.CAP_SETFCAP,  # the attribute security.capability
    syscalls.CAP_MKNOD,  # devices
    syscalls.CAP_LINUX_IMMUTABLE,  # chattr +i and +a
    syscalls.CAP_SYS_ADMIN,  # the attributes trusted.* and security.*; --io kernel
)
WORKER_CAPABILITIES = _set_of(
    syscalls.CAP_FSETID,
    syscalls.CAP_SETGID,  # quotas and reserved blocks apply to the user who writes
    syscalls.CAP_SETUID,
    syscalls.CAP_SYS_PTRACE,  # pidfd_getfd(2) on the front, which has capabilities that a worker lacks
    syscalls.CAP_DAC_OVERRIDE,  # opening files where pidfd_getfd(2) fails; /proc entries of a dead worker's append
)


# The capabilities with which a process ignores the permissions, owners and flags of files (capabilities(7)).
FILE_CAPABILITIES = _set_of(
    syscalls.CAP_CHOWN,
    syscalls.CAP_DAC_OVERRIDE,
    syscalls.CAP_DAC_READ_SEARCH,
    syscalls.CAP_FOWNER,
    syscalls.CAP_FSETID,
    syscalls.CAP_LINUX_IMMUTABLE,
    syscalls.CAP_SETFCAP,
)


def worker_capabilities() -> int:
    """Return the capabilities that a worker needs on this machine, as a bit set.

    Without CAP_SYS_PTRACE (containers seldom have it), pidfd_getfd(2) requires that the worker has every capability of
    the front (security/commoncap.c, cap_ptrace_access_check()).
    """
    _, permitted, _ = syscalls.get_capabilities()
    return WORKER_CAPABILITIES if permitted >> syscalls.CAP_SYS_PTRACE & 1 else WORKER_CAPABILITIES | FRONT_CAPABILITIES


def drop_capabilities_except(capabilities: int) -> None:
    """Permanently drop all other capabilities and all supplementary groups, and set PR_SET_NO_NEW_PRIVS.

    The groups go because a file system that reserves blocks for a group would count this process's groups as the
    caller's. A process of an ordinary user has no capabilities; it only gets PR_SET_NO_NEW_PRIVS.

    Args:
        capabilities: the capabilities to keep, as a bit set. Those that the process lacks have no effect.
    """
    _keep_capabilities()  # needs CAP_SETPCAP, which is dropped below
    with suppress(PermissionError):
        os.setgroups(())
    # Without CAP_SETPCAP the kernel refuses this. PR_SET_NO_NEW_PRIVS then still prevents that they are regained.
    with suppress(OSError):
        for number in range(64):
            if not capabilities >> number & 1:
                syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
    effective, permitted, inheritable = syscalls.get_capabilities()
    syscalls.set_capabilities(effective & capabilities, permitted & capabilities, inheritable & capabilities)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def _keep_capabilities() -> bool:
    """Make the kernel keep the capabilities when the file system ids change (capabilities(7)).

    Returns:
        Whether the kernel accepted this.
    """
    try:
        bits = syscalls.prctl(syscalls.PR_GET_SECUREBITS)
        if bits & _SECBIT_NO_SETUID_FIXUP:
            return True
        syscalls.prctl(syscalls.PR_SET_SECUREBITS, bits | _SECBIT_NO_SETUID_FIXUP)
    except OSError:
        return False
    return True


def restore_process_attributes() -> None:
    """Set the process attributes again that the kernel resets when the file system ids change (prctl(2)).

    Workers can only take descriptors (pidfd_getfd(2)) from a dumpable process. Without PR_SET_PDEATHSIG this process
    would outlive the supervisor.
    """
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)


class Caller(threading.local):
    """Makes system calls with a caller's credentials: ``with caller(uid, gid, (), 0): os.mkdir(...)``.

    The file system ids decide who owns a new file and whose permissions apply (setfsuid(2)). Of the capabilities
    that override permissions and ownership, only those that the caller has remain effective. Each thread has its own
    credentials.

    Args:
        setid: knows the capabilities that this thread has outside the ``with`` block.

    Attributes:
        can_switch: whether this process can take other credentials. The server of an ordinary user cannot.
    """

    def __init__(self, setid: SetidGuard) -> None:
        self.can_switch = os.geteuid() == 0
        self._setid = setid
        self._own = (os.geteuid(), os.getegid())
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._switched = self._lowered = self._in_groups = False
        if self.can_switch:
            _keep_capabilities()

    def set_umask(self, umask: int) -> None:
        """Set the umask for the next system calls. It stays set, because successive callers mostly have the same."""
        if umask != self._umask:
            os.umask(umask)
            self._umask = umask

    def __call__(self, uid: int, gid: int, groups: tuple[int, ...] = (), capabilities: int | None = None) -> Caller:
        """Act as *uid* and *gid* until the ``with`` block ends.

        Args:
            uid, gid: the file system ids.
            groups: the supplementary groups.
            capabilities: the caller's capabilities as a bit set, of which those in `FILE_CAPABILITIES` count; None to
                keep all that this process has.
        """
        if not self.can_switch:
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
            effective = effective & ~FILE_CAPABILITIES | permitted & capabilities & FILE_CAPABILITIES
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
            restore_process_attributes()
        if self._lowered:
            self._lowered = False
            syscalls.set_capabilities(*self._setid.capabilities)


class Writer(threading.local):
    """Writes with the writing user's ids, for quotas and for blocks that a file system reserves for root.

    The ids stay set until another user writes, because successive writes mostly come from one user. Each thread has
    its own ids.
    """

    def __init__(self) -> None:
        self._able = os.geteuid() == 0 and _keep_capabilities()
        # A thread inherits the ids of the thread that started it. setfsuid(-1) changes nothing and returns the id.
        self._current = (syscalls.setfsuid(-1), syscalls.setfsgid(-1))

    def assume(self, uid: int, gid: int) -> None:
        """Make the next writes count as those of *uid* and *gid* (setfsuid(2))."""
        if self._able and (uid, gid) != self._current:
            syscalls.setfsgid(gid)
            syscalls.setfsuid(uid)
            restore_process_attributes()
            self._current = (uid, gid)


def is_mandatory_lock_mode(mode: int) -> bool:
    """Return whether *mode* is a regular file's with set-group-ID but without group execution.

    These bits once enabled mandatory locking. They give nobody the file's group, so the kernel does not clear them
    when a member of the file's group writes.
    """
    return mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID and stat.S_ISREG(mode)


class SetidGuard(threading.local):
    """Controls whether the next write, truncation or ACL change clears set-ID bits.

    The kernel clears them for a process without CAP_FSETID (capabilities(7)). So this class drops and raises that
    capability as requests demand. While successive requests demand the same, it makes no system call. Each thread has
    its own state.
    """

    def __init__(self) -> None:
        self._effective, self._permitted, self._inheritable = syscalls.get_capabilities()
        self._keeping = bool(self._effective & 1 << syscalls.CAP_FSETID)
        self._able = bool(self._permitted & 1 << syscalls.CAP_FSETID)

    @property
    def capabilities(self) -> tuple[int, int, int]:
        """This thread's effective, permitted and inheritable capabilities, as bit sets."""
        effective = self._effective if self._keeping else self._effective & ~(1 << syscalls.CAP_FSETID)
        return effective, self._permitted, self._inheritable

    def clear(self, clearing: bool) -> None:
        """Make the kernel clear set-ID bits in the next calls if *clearing*, else keep them."""
        if clearing == self._keeping and self._able:
            bit = 1 << syscalls.CAP_FSETID
            effective = self._effective & ~bit if clearing else self._effective | bit
            syscalls.set_capabilities(effective, self._permitted, self._inheritable)
            self._keeping = not clearing
