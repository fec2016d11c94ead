"""The machine, its kernel and the date, on which a result depends besides the contenders."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and the time of a measurement."""

    date: str
    kernel: str
    cpu: str
    cpus: int
    memory_gib: float
    python: str


def this_machine() -> Machine:
    """Describe this machine."""
    return Machine(
        date=time.strftime("%Y-%m-%d %H:%M"),
        kernel=f"{platform.system()} {platform.release()}",
        cpu=_cpu_model(),
        cpus=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        python=platform.python_version(),
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        # The architecture decides which of these fields exist.
        if name.strip() in ("model name", "Model", "Processor", "cpu model"):
            return value.strip()
    return platform.machine()
