"""What /proc says of the process that makes a request, where its header does not say it.

Reading it costs ten times a system call, so it is for rare cases only. The caller waits for its answer meanwhile: its
number cannot become another process's.
"""

from __future__ import annotations

from contextlib import suppress


def supplementary_groups(pid: int) -> frozenset[int]:
    """Return the supplementary groups of a process or thread (proc_pid_status(5)).

    Args:
        pid: its number; 0 is a process outside of this process's PID namespace.

    Returns:
        The groups; none if the process cannot be seen.
    """
    with suppress(OSError), open(f"/proc/{pid}/status", "rb") as status:
        for line in status:
            if line.startswith(b"Groups:"):
                return frozenset(map(int, line.split()[1:]))
    return frozenset()
