"""Finds all llloop mounts that this user can see, with status and counters, also those whose server is dead."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from llloop.control import client, protocol
from llloop.errors import LlloopError
from llloop.linux import mounts
from llloop.linux.mounts import MountEntry
from llloop.linux.process import Process, fork

# How long to wait for a mount's statfs(2), and for its server's check of the source, in seconds.
_TIMEOUT = 1.0
# Process states (proc_pid_stat(5)) of a process that was stopped by a signal or a tracer.
STOPPED = frozenset("Tt")
# After so many seconds in one request, a worker counts as a problem: the source hangs, or the worker does.
_BUSY_LIMIT = 10.0
# How many mounts are asked at the same time.
_MAX_CONCURRENT = 32
_DEAD = frozenset({errno.ENOTCONN, errno.ECONNABORTED})

_T = TypeVar("_T")


def all_statuses() -> list[dict[str, Any]]:
    """Return the status of each mount, as `llloop status --json` prints it.

    Each has ``mountpoint``, ``source`` and ``state``. If its server answers, it has all fields of the server's status.
    The states:

    * "serving", "reloading", "stopping" and "not answering", as the server says.
    * "degraded": the server answers but has problems; ``problems`` lists them.
    * "dead": the server is gone, but its mount remains.
    * "unknown": the mount is alive, but the server does not answer this user; ``reason`` says why.
    """
    entries = _entries()
    paths = _hidden_sockets(entries)

    def ask(path: str, deadline: float) -> dict[str, Any]:
        return with_problems(lambda command: dict(client.ask(path, command, deadline=deadline)))

    # A socket without an answer was left by a dead server, or belongs to a mount that this user may not see.
    hidden = [one for one in ask_all(ask, paths) if not isinstance(one, LlloopError)]
    return [*_ask_mounts(entries, with_problems), *({**one, "visible": False} for one in hidden)]


def status_of(mountpoint: str) -> dict[str, Any]:
    """Return the status of the mount at *mountpoint*, as `all_statuses` does.

    Raises:
        MountpointError: there is no llloop mount.
    """
    return _ask_mounts([_entry(mountpoint)], with_problems)[0]


def ask_all(ask: Callable[[_T, float], dict[str, Any]], servers: Sequence[_T]) -> list[dict[str, Any] | LlloopError]:
    """Ask several servers at the same time, with one common deadline.

    Args:
        ask: asks one server; takes an item of *servers* and the deadline (monotonic clock, seconds).
        servers: the servers.

    Returns:
        For each item of *servers*, the answer or the error.
    """
    deadline = time.monotonic() + client.TIMEOUT

    def one(whom: _T) -> dict[str, Any] | LlloopError:
        try:
            return ask(whom, deadline)
        except LlloopError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(len(servers), _MAX_CONCURRENT) or 1) as pool:
        return list(pool.map(one, servers))


def with_problems(ask: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return a server's status, with the problems of its processes and its source added as ``problems``.

    Args:
        ask: sends a command to the server and returns the result.

    Raises:
        LlloopError: the server does not answer.
    """
    status = ask("status")
    problems = process_problems(status["processes"])
    source = source_problem(ask)
    if source is not None:
        problems.append(source)
    state = "degraded" if problems and status["state"] == "serving" else status["state"]
    return {**status, "state": state, "problems": problems}


def source_problem(ask: Callable[[str], dict[str, Any]]) -> str | None:
    """Return a description of what is wrong with a mount's source, or None. Wait for `_TIMEOUT` seconds at most.

    Args:
        ask: sends a command to the server and returns the result.
    """
    pause = 0.01
    deadline = time.monotonic() + _TIMEOUT
    while True:
        answer = ask("source")
        if answer["waiting"] is None:
            return None if answer["problem"] is None else str(answer["problem"])
        if time.monotonic() + pause > deadline:
            return f"the source has not answered for {answer['waiting']:.1f} s: it hangs, or is frozen (fsfreeze)"
        time.sleep(pause)
        pause *= 1.5


def all_stats() -> list[dict[str, Any]]:
    """Return the counters of each mount that this user can see: the server's ``stats`` and a ``source_problem``.

    If a server does not answer, its item only has ``mountpoint``, ``source``, ``state`` and ``reason``, as in
    `all_statuses`.
    """
    entries = _entries()
    found = _ask_mounts(entries, _stats_with_problem)
    paths = _hidden_sockets(entries)

    def ask(path: str, deadline: float) -> dict[str, Any]:
        return _stats_with_problem(lambda command: dict(client.ask(path, command, deadline=deadline)))

    return [*found, *(one for one in ask_all(ask, paths) if not isinstance(one, LlloopError))]


def stats_of(mountpoint: str) -> dict[str, Any]:
    """Return the counters of the mount at *mountpoint*, as `all_stats` does.

    Raises:
        MountpointError: there is no llloop mount.
    """
    return _ask_mounts([_entry(mountpoint)], _stats_with_problem)[0]


def _stats_with_problem(ask: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return {**ask("stats"), "source_problem": source_problem(ask)}


def process_problems(processes: Sequence[dict[str, Any]]) -> list[str]:
    """Return a description of each problem of the processes in a ``status`` answer."""
    found = []
    for one in processes:
        if one["state"] in STOPPED:
            found.append(f"{one['role']} (process {one['pid']}) is stopped (state {one['state']}) and does nothing")
        elif (one["busy"] or 0.0) > _BUSY_LIMIT:
            found.append(f"{one['role']} (process {one['pid']}) has been busy with one request for {one['busy']:.0f} s")
    return found


def _entries() -> list[MountEntry]:
    return [entry for entry in mounts.mounts() if entry.type == mounts.TYPE]


def _entry(mountpoint: str) -> MountEntry:
    return mounts.find_llloop(mounts.resolve_mountpoint(mountpoint), mountpoint)


def _hidden_sockets(entries: Sequence[MountEntry]) -> list[str]:
    """Return the sockets of mounts that are not in *entries*: detached, or in another mount namespace."""
    devices = [entry.device for entry in entries]
    return [path for path in protocol.sockets() if not any(protocol.has_device(path, one) for one in devices)]


def _ask_mounts(
    entries: Sequence[MountEntry], query: Callable[[Callable[[str], dict[str, Any]]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Ask each mount's server, and return the answers.

    Args:
        entries: the mounts.
        query: gets a function that sends a command to one server; returns the item for that mount.

    Returns:
        For each mount the answer, or ``state`` and ``reason`` if its server does not answer.
    """

    def ask(entry: MountEntry, deadline: float) -> dict[str, Any]:
        return query(lambda command: dict(client.ask_entry(entry, command, deadline=deadline)))

    answered = ask_all(ask, entries)
    silent = [index for index, one in enumerate(answered) if isinstance(one, LlloopError)]
    numbers = dict(zip(silent, _statfs_all([entries[index] for index in silent]), strict=True))
    found = []
    for index, (entry, one) in enumerate(zip(entries, answered, strict=True)):
        if not isinstance(one, LlloopError):
            found.append({**one, "visible": True})
            continue
        answer: dict[str, Any] = {"mountpoint": entry.mountpoint, "source": entry.source, "visible": True}
        if numbers[index] in _DEAD:
            found.append({**answer, "state": "dead", "reason": "its server is gone"})
        else:
            state = "not answering" if numbers[index] is None else "unknown"
            found.append({**answer, "state": state, "reason": str(one)})
    return found


def _statfs_all(entries: Sequence[MountEntry]) -> list[int | None]:
    """Call statfs(2) on each mount; return for each 0 or an errno, or None on timeout.

    Child processes make the calls, because a call can hang. If this process is root, they take the ids of the user
    who mounted it: without allow_other, the kernel refuses everybody else, including root.
    """
    found: list[int | None] = [None] * len(entries)
    waiting = list(enumerate(entries))[::-1]
    running: dict[Process, int] = {}
    deadline = time.monotonic() + _TIMEOUT
    while (waiting or running) and time.monotonic() < deadline:
        while waiting and len(running) < _MAX_CONCURRENT:
            index, entry = waiting.pop()
            running[fork(partial(_statfs_as_owner, entry), "llloop-statfs")] = index
        for process in list(running):
            code = process.wait(0)
            if code is not None:
                found[running.pop(process)] = code
        time.sleep(0.005)
    for process in running:
        process.end(0)  # it may hang in the kernel
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
