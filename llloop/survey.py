"""Every llloop mount on the machine that this user can see, whether or not its server still answers."""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Any

from . import client, mounting, sockets
from .errors import LlloopError
from .mounting import MountEntry

# How long a mount without a control socket may take to say whether it is alive, in seconds.
_PATIENCE = 1.0
_DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


def survey() -> list[dict[str, Any]]:
    """Return what is known of each mount, as `llloop status --json` prints it.

    Each has ``mountpoint``, ``source`` and ``state``; those whose server answers have all that it tells. States are
    "serving", "reloading", "stopping" and "not answering" (its own word), "dead" (the server is gone and the mount
    left behind), "unknown" (it lives, but does not talk to this user: ``reason`` says why).
    """
    entries = [entry for entry in mounting.mounts() if entry.type == mounting.TYPE]
    found = [_of_entry(entry) for entry in entries]
    names = {sockets.socket_name(entry.mountpoint, entry.device) for entry in entries}
    for path in sockets.sockets():
        if os.path.basename(path) not in names:
            try:
                status = client.ask(path, "status")
            except LlloopError:  # nobody's any more, or somebody's whose mount is not this user's to see
                continue
            # Taken from the tree, or in another mount namespace.
            found.append({**status, "visible": False})
    return found


def survey_one(mountpoint: str) -> dict[str, Any]:
    """Return what `survey` says of the mount at *mountpoint*.

    Raises:
        MountpointError: no llloop mount is there.
    """
    return _of_entry(mounting.find_llloop(mounting.resolve_mountpoint(mountpoint), mountpoint))


def _of_entry(entry: MountEntry) -> dict[str, Any]:
    name = sockets.socket_name(entry.mountpoint, entry.device)
    reason = "it has no control socket that this user can see"
    for directory in sockets.all_directories():
        path = os.path.join(directory, name)
        if os.path.lexists(path):
            try:
                return {**client.ask(path, "status"), "visible": True}
            except LlloopError as error:
                reason = str(error)
    told: dict[str, Any] = {"mountpoint": entry.mountpoint, "source": entry.source, "visible": True}
    number = _probe(entry)
    if number in _DEAD:
        return {**told, "state": "dead", "reason": "its server is gone"}
    if number is None:
        return {**told, "state": "not answering", "reason": reason}
    return {**told, "state": "unknown", "reason": reason}


def _probe(entry: MountEntry) -> int | None:
    """Ask the kernel about a mount; return 0 or an errno, None if it does not answer in time.

    In a child, for this can take for ever; as root with the identity of who mounted it, for the kernel talks
    to nobody else without allow_other.
    """
    child = os.fork()
    if child == 0:
        os._exit(_statfs_as_owner(entry))
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)  # not waited for: in the kernel it may hang on
    return None


def _statfs_as_owner(entry: MountEntry) -> int:
    try:
        if os.geteuid() == 0 and entry.owner is not None:
            uid, gid = entry.owner
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        os.statvfs(entry.mountpoint)
    except OSError as error:
        return error.errno or errno.EIO
    return 0
