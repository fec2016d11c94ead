"""Every llloop mount on the machine that this user can see, whether or not its server still answers."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from . import client, mounting, sockets
from .errors import LlloopError
from .mounting import MountEntry

# How long a mount without a control socket may take to say whether it is alive, in seconds.
_PATIENCE = 1.0
# So many mounts are asked at the same time.
_AT_ONCE = 32
_DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED})

_T = TypeVar("_T")


def survey() -> list[dict[str, Any]]:
    """Return what is known of each mount, as `llloop status --json` prints it.

    Each has ``mountpoint``, ``source`` and ``state``; those whose server answers have all that it tells. States are
    "serving", "reloading", "stopping" and "not answering" (its own word), "dead" (the server is gone and the mount
    left behind), "unknown" (it lives, but does not talk to this user: ``reason`` says why).
    """
    entries = [entry for entry in mounting.mounts() if entry.type == mounting.TYPE]
    names = {sockets.socket_name(entry.mountpoint, entry.device) for entry in entries}
    # Taken from the tree, or in another mount namespace.
    hidden = [path for path in sockets.sockets() if os.path.basename(path) not in names]
    return [*_of_entries(entries), *_of_hidden(hidden)]


def survey_one(mountpoint: str) -> dict[str, Any]:
    """Return what `survey` says of the mount at *mountpoint*.

    Raises:
        MountpointError: no llloop mount is there.
    """
    return _of_entries([mounting.find_llloop(mounting.resolve_mountpoint(mountpoint), mountpoint)])[0]


def together(ask: Callable[[_T, float], dict[str, Any]], asked: Sequence[_T]) -> list[dict[str, Any] | LlloopError]:
    """Ask several servers at the same time, all of which together may take no longer than one.

    Args:
        ask: asks one, until a point in time (monotonic clock).
        asked: whom.

    Returns:
        The answers, or the errors.
    """
    deadline = time.monotonic() + client.PATIENCE

    def one(whom: _T) -> dict[str, Any] | LlloopError:
        try:
            return ask(whom, deadline)
        except LlloopError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(len(asked), _AT_ONCE) or 1) as pool:
        return list(pool.map(one, asked))


def _of_entries(entries: Sequence[MountEntry]) -> list[dict[str, Any]]:
    def ask(entry: MountEntry, deadline: float) -> dict[str, Any]:
        return dict(client.ask_entry(entry, "status", deadline=deadline))

    answered = together(ask, entries)
    silent = [index for index, one in enumerate(answered) if isinstance(one, LlloopError)]
    numbers = dict(zip(silent, _probe([entries[index] for index in silent]), strict=True))
    found = []
    for index, (entry, one) in enumerate(zip(entries, answered, strict=True)):
        if not isinstance(one, LlloopError):
            found.append({**one, "visible": True})
            continue
        told: dict[str, Any] = {"mountpoint": entry.mountpoint, "source": entry.source, "visible": True}
        if numbers[index] in _DEAD:
            found.append({**told, "state": "dead", "reason": "its server is gone"})
        else:
            state = "not answering" if numbers[index] is None else "unknown"
            found.append({**told, "state": state, "reason": str(one)})
    return found


def _of_hidden(paths: Sequence[str]) -> list[dict[str, Any]]:
    def ask(path: str, deadline: float) -> dict[str, Any]:
        return dict(client.ask(path, "status", deadline=deadline))

    # Those that do not answer are nobody's any more, or somebody's whose mount is not this user's to see.
    return [{**one, "visible": False} for one in together(ask, paths) if not isinstance(one, LlloopError)]


def _probe(entries: Sequence[MountEntry]) -> list[int | None]:
    """Ask the kernel about mounts; return of each 0 or an errno, None if it does not answer in time.

    In children, for this can take for ever; as root with the identity of who mounted it, for the kernel talks
    to nobody else without allow_other.
    """
    found: list[int | None] = [None] * len(entries)
    waiting = list(enumerate(entries))[::-1]
    running: dict[int, int] = {}
    deadline = time.monotonic() + _PATIENCE
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < _AT_ONCE:
            index, entry = waiting.pop()
            child = os.fork()
            if child == 0:
                os._exit(_statfs_as_owner(entry))
            running[child] = index
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                found[running.pop(child)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for child in running:
        os.kill(child, signal.SIGKILL)  # not waited for: in the kernel it may hang on
    return found


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
