"""Every llloop mount on the machine that this user can see, whether or not its server still answers."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from llloop.control import client, protocol
from llloop.errors import LlloopError
from llloop.linux import mounts
from llloop.linux.mounts import MountEntry

# How long a mount without a control socket may take to say whether it is alive, in seconds.
_PATIENCE = 1.0
# Process states (proc_pid_stat(5)) in which nothing is done: stopped by a signal, or by a tracer.
STOPPED = frozenset("Tt")
# A worker that has had one request for longer than this, in seconds, waits for the source, or something is wrong.
_LONG = 10.0
# So many mounts are asked at the same time.
_AT_ONCE = 32
_DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED})

_T = TypeVar("_T")


def survey() -> list[dict[str, Any]]:
    """Return what is known of each mount, as `llloop status --json` prints it.

    Each has ``mountpoint``, ``source`` and ``state``; those whose server answers have all that it tells. States are
    "serving", "reloading", "stopping" and "not answering" (its own word), "degraded" (it serves, but not all of it:
    ``problems`` says why), "dead" (the server is gone and the mount left behind), "unknown" (it lives, but does not
    talk to this user: ``reason`` says why).
    """
    entries = _entries()
    paths = _hidden(entries)

    def ask(path: str, deadline: float) -> dict[str, Any]:
        return examined(lambda command: dict(client.ask(path, command, deadline=deadline)))

    # Those that do not answer are nobody's any more, or somebody's whose mount is not this user's to see.
    hidden = [one for one in together(ask, paths) if not isinstance(one, LlloopError)]
    return [*_asked(entries, examined), *({**one, "visible": False} for one in hidden)]


def survey_one(mountpoint: str) -> dict[str, Any]:
    """Return what `survey` says of the mount at *mountpoint*.

    Raises:
        MountpointError: no llloop mount is there.
    """
    return _asked([_entry(mountpoint)], examined)[0]


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


def examined(ask: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return a server's status, with what is wrong with it and its source as ``problems``.

    Args:
        ask: asks the server for something.

    Raises:
        LlloopError: it does not answer.
    """
    status = ask("status")
    problems = process_problems(status["processes"])
    source = source_problem(ask)
    if source is not None:
        problems.append(source)
    state = "degraded" if problems and status["state"] == "serving" else status["state"]
    return {**status, "state": state, "problems": problems}


def source_problem(ask: Callable[[str], dict[str, Any]]) -> str | None:
    """Return what is wrong with a mount's source, a text for people, or None. Waits no longer than a second.

    Args:
        ask: asks the server for something.
    """
    pause = 0.01
    deadline = time.monotonic() + _PATIENCE
    while True:
        told = ask("source")
        if told["waiting"] is None:
            return None if told["problem"] is None else str(told["problem"])
        if time.monotonic() + pause > deadline:
            return f"the source has not answered for {told['waiting']:.1f} s: it hangs, or is frozen (fsfreeze)"
        time.sleep(pause)
        pause *= 1.5


def measure() -> list[dict[str, Any]]:
    """Return the counters of each mount that this user can see, as the server answers ``stats``.

    Each has ``source_problem``, too. Of a server that does not answer there are ``mountpoint``, ``source``, ``state``
    and ``reason`` only, as in `survey`.
    """
    entries = _entries()
    found = _asked(entries, _measured)
    paths = _hidden(entries)

    def ask(path: str, deadline: float) -> dict[str, Any]:
        return _measured(lambda command: dict(client.ask(path, command, deadline=deadline)))

    return [*found, *(one for one in together(ask, paths) if not isinstance(one, LlloopError))]


def measure_one(mountpoint: str) -> dict[str, Any]:
    """Return what `measure` says of the mount at *mountpoint*.

    Raises:
        MountpointError: no llloop mount is there.
    """
    return _asked([_entry(mountpoint)], _measured)[0]


def _measured(ask: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return {**ask("stats"), "source_problem": source_problem(ask)}


def process_problems(processes: Sequence[dict[str, Any]]) -> list[str]:
    """Return what is wrong with the processes that ``status`` tells of."""
    found = []
    for one in processes:
        if one["state"] in STOPPED:
            found.append(f"{one['role']} (process {one['pid']}) is stopped (state {one['state']}) and does nothing")
        elif (one["busy"] or 0.0) > _LONG:
            found.append(f"{one['role']} (process {one['pid']}) has been at one request for {one['busy']:.0f} s")
    return found


def _entries() -> list[MountEntry]:
    return [entry for entry in mounts.mounts() if entry.type == mounts.TYPE]


def _entry(mountpoint: str) -> MountEntry:
    return mounts.find_llloop(mounts.resolve_mountpoint(mountpoint), mountpoint)


def _hidden(entries: Sequence[MountEntry]) -> list[str]:
    """Return the sockets of mounts that are not in *entries*: taken from the tree, or in another mount namespace."""
    devices = [entry.device for entry in entries]
    return [path for path in protocol.sockets() if not any(protocol.belongs_to(path, one) for one in devices)]


def _asked(
    entries: Sequence[MountEntry], question: Callable[[Callable[[str], dict[str, Any]]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the answers of mounts to *question*, or what can be said of those that do not answer."""

    def ask(entry: MountEntry, deadline: float) -> dict[str, Any]:
        return question(lambda command: dict(client.ask_entry(entry, command, deadline=deadline)))

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
