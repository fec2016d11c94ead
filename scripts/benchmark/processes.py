"""The processes of a server: their ids, CPU time, memory and CPU affinity."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

# The CPU clock of another process (clock_getcpuclockid(3)). It counts in nanoseconds; /proc counts in units of 10 ms.
_USER_CLOCK, _CPU_CLOCK = 1, 2


def tree(pid: int) -> list[int]:
    """Return the ids of the process and all its descendants, parents first."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time of the processes in seconds, including that of ended threads."""
    return _seconds(pids, _CPU_CLOCK)


def user_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time of the processes in user mode. The kernel samples it with its clock tick."""
    return _seconds(pids, _USER_CLOCK)


def _seconds(pids: Iterable[int], clock: int) -> float:
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | clock)
    return total


def forget_peak_memory(pids: Iterable[int]) -> None:
    """Reset the peak of the memory of each process."""
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_memory(pids: Iterable[int]) -> int:
    """Return the peak memory of the processes since `forget_peak_memory`, in bytes.

    This is the present memory, shared pages counted once (PSS), plus what each process had more at its peak.
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            now = _kilobytes(Path(f"/proc/{pid}/smaps_rollup"))
            status = _kilobytes(Path(f"/proc/{pid}/status"))
            total += now["Pss"] + max(0, status["VmHWM"] - status["VmRSS"])
    return total * 1024


def memory(pids: Iterable[int]) -> int:
    """Return the present memory of the processes in bytes; shared pages are counted once (PSS)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += _kilobytes(Path(f"/proc/{pid}/smaps_rollup"))["Pss"]
    return total * 1024


def _kilobytes(path: Path) -> dict[str, int]:
    fields = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.split()[0])
    return fields


def wakeups(pids: Iterable[int]) -> int:
    """Return how often the threads of the processes have slept, and so had to be woken."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                for line in Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines():
                    if line.startswith("voluntary_ctxt_switches:"):
                        total += int(line.split()[1])
    return total


def title(pid: int) -> str:
    """Return the name of the process in ps(1), without what follows it."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        # A process of llloop writes its mount point behind its name.
        name, _, _ = words[0].partition(b" ")
        return os.path.basename(os.fsdecode(name)) or str(pid)
    return str(pid)


def kill(pids: Iterable[int]) -> None:
    """Kill the processes."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def session(pid: int) -> int | None:
    """Return the session of the process, or None if it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def settle(pids: list[int], patience: float = 5.0) -> None:
    """Wait until the processes are idle, so that the end of one load does not slow the next."""
    end = time.monotonic() + patience
    before = cpu_seconds(pids)
    while time.monotonic() < end:
        time.sleep(0.01)
        now = cpu_seconds(pids)
        # A garbage collector or a watchdog may use some CPU time. A server that works uses far more than 2 % of a CPU.
        if now - before < 0.0002:
            return
        before = now
