"""The server's processes, as /proc shows them."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.server import Server
from tests.watchdog import kill_session


def titles(server: Server) -> dict[str, int]:
    """Returns process ids by process title; waits for new processes to set their title."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return _titles(server)
        except (AssertionError, OSError):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _titles(server: Server) -> dict[str, int]:
    found: dict[str, int] = {}
    for pid in server.processes():
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        match = re.match(r"llloop-(supervisor|keeper|front|invalidator|relay|watcher|worker-\d+)\b", title)
        assert match, f"process {pid} of the server is called {title!r}"
        assert match[0] not in found, f"two processes are called {match[0]}"
        found[match[0]] = pid
    return found


def kill_all_at_once(server: Server) -> None:
    """Leaves a dead mount: the keeper, which would detach it, is killed first."""
    assert server.process
    os.kill(server.pid, signal.SIGSTOP)
    os.kill(titles(server)["llloop-keeper"], signal.SIGKILL)
    kill_session(server.pid)
    server.process.wait(30)


def process_ids(server: Server, role: str) -> list[int]:
    """Returns the running processes with this title; a new process has none yet."""
    found = []
    for pid in server.processes():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"llloop-{role}".encode()):
                found.append(pid)
    return found


def workers(server: Server) -> dict[str, int]:
    return {title: pid for title, pid in titles(server).items() if title.startswith("llloop-worker-")}


class Report(NamedTuple):
    """The report that the front writes on SIGUSR1."""

    inodes: int
    handles: int
    directories: int
    slots: int


_REPORTS = re.compile(r"(\d+) inodes, (\d+) open handles, (\d+) directories kept open, (\d+) of \d+ slots in use")


def front_report(server: Server) -> Report:
    """Request the report of the front and wait for it. If the front dies meanwhile, ask the next one."""
    last = server.log.stat().st_size
    found: list[tuple[str, ...]] = []

    def is_there() -> bool:
        text = server.log.read_bytes()[last:].decode(errors="replace")
        found[:] = _REPORTS.findall(text)
        return bool(found)

    def asked() -> bool:
        os.kill(server.pid, signal.SIGUSR1)
        return wait_until(is_there, 2)

    assert wait_until(asked, 30), f"the front does not report:\n{server.all_output()}"
    return Report(*map(int, found[-1]))


def descriptors(pid: int) -> list[str]:
    """Returns the targets of a process's descriptors."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
    return found


def private_memory(pid: int) -> int:
    """Returns the bytes that only this process uses, without memory shared since the fork."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(kib) for kib in re.findall(r"^Private_(?:Dirty|Clean): +(\d+) kB", text, re.MULTILINE))


def bytes_moved(pid: int) -> int:
    """Returns the bytes of all read and write calls of a process."""
    text = Path(f"/proc/{pid}/io").read_text()
    return sum(int(count) for count in re.findall(r"^[rw]char: (\d+)", text, re.MULTILINE))


def stop_process(pid: int) -> None:
    """Sends SIGSTOP and waits until each thread has stopped.

    The kernel delivers the signal to one thread, which stops the others. Until it runs, they go on with their work.
    """
    os.kill(pid, signal.SIGSTOP)

    def has_stopped() -> bool:
        stats = []
        for path in Path(f"/proc/{pid}/task").glob("*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
                stats.append(path.read_text())
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    assert wait_until(has_stopped)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Waits for a condition, e.g. for effects of RELEASE and FORGET, which arrive after the caller's system call."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def switches(server: Server) -> dict[str, int]:
    """How often each thread of the server has gone to sleep or been interrupted (proc_pid_status(5))."""
    found = {}
    for pid in server.processes():
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            counts = re.findall(r"^(?:non)?voluntary_ctxt_switches:\s*(\d+)$", status.read_text(), re.MULTILINE)
            found[str(status)] = sum(map(int, counts))
    return found


def is_replaced(server: Server, role: str, old: int, seconds: float = 30.0) -> bool:
    """Wait until another process than *old* has this role; return whether there is one before *seconds* are over."""
    return wait_until(lambda: process_ids(server, role) not in ([], [old]), seconds)


def wait_until_quiet(server: Server, seconds: float) -> None:
    """Waits until no thread of the server runs for a second. Another user of the machine may request a status."""
    awake = []

    def is_quiet() -> bool:
        before = switches(server)
        time.sleep(1)
        awake.append(switches(server).items() - before.items())
        return not awake[-1]

    assert wait_until(is_quiet, seconds), awake
