"""A server's processes seen from outside: which they are, what they have used, where they may run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

# The clocks of another process (see clock_getcpuclockid(3)): nanoseconds, where /proc counts in 10 ms.
_USER_CLOCK, _CPU_CLOCK = 1, 2


def tree(pid: int) -> list[int]:
    """Return the process and all its descendants, parents first."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time that the processes have used so far, their ended threads included."""
    return _seconds(pids, _CPU_CLOCK)


def user_seconds(pids: Iterable[int]) -> float:
    """Return how much of their CPU time the processes have used outside of the kernel, as its clock tick sees it."""
    return _seconds(pids, _USER_CLOCK)


def _seconds(pids: Iterable[int], clock: int) -> float:
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | clock)
    return total


def forget_peak_memory(pids: Iterable[int]) -> None:
    """Let the peak of each process's memory start anew."""
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_memory(pids: Iterable[int]) -> int:
    """Return the bytes of memory that the processes have used at most since `forget_peak_memory`.

    What processes share is counted once (PSS); what each had more at its peak than it has now is counted on top.
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            now = _kilobytes(Path(f"/proc/{pid}/smaps_rollup"))
            status = _kilobytes(Path(f"/proc/{pid}/status"))
            total += now["Pss"] + max(0, status["VmHWM"] - status["VmRSS"])
    return total * 1024


def memory(pids: Iterable[int]) -> int:
    """Return the bytes of memory that the processes use now, what they share counted once (PSS)."""
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
    """Return how often the processes' threads have gone to sleep so far: each time somebody had to wake them."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                for line in Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines():
                    if line.startswith("voluntary_ctxt_switches:"):
                        total += int(line.split()[1])
    return total


def title(pid: int) -> str:
    """Return the name by which ps shows the process."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return os.path.basename(os.fsdecode(words[0])).strip() or str(pid)
    return str(pid)


def kill(pids: Iterable[int]) -> None:
    """End the processes at once."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def session(pid: int) -> int | None:
    """Return the process's session, or None if it is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def settle(pids: list[int], patience: float = 5.0) -> None:
    """Wait until the processes rest: what they have still to do for the last load is not to slow the next."""
    end = time.monotonic() + patience
    before = cpu_seconds(pids)
    while time.monotonic() < end:
        time.sleep(0.01)
        now = cpu_seconds(pids)
        # A garbage collector or a watchdog may tick over; a server at work uses far more than 2 % of a CPU.
        if now - before < 0.0002:
            return
        before = now
