"""Where a workload does its work: one contender's view of the source, with a clock and a meter on what is timed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import processes
from .servers import Server
from .sizes import Sizes

# A single load that takes longer has met a server that hangs.
_TIMEOUT = 120.0


class Failed(Exception):
    """A load did not get through; the message says why."""


@dataclass(slots=True)
class Sample:
    """What one run of a workload came to.

    Attributes:
        work: bytes moved, or operations done.
        seconds: how long that took.
        cpu_seconds: what all of the server's processes used meanwhile.
        peak_memory: bytes, of all of the server's processes.
    """

    work: float = 0
    seconds: float = 0
    cpu_seconds: float = 0
    peak_memory: int = 0

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.work / self.seconds


class Site:
    """One contender's directory, for one run of one workload."""

    def __init__(self, server: Server, source: Path, sizes: Sizes, load: Path, number: int) -> None:
        """Make a fresh directory for what the workload writes, and the caches cold.

        Args:
            server: the contender's.
            source: the directory that is mirrored.
            sizes: how much work to do.
            load: the compiled load generator.
            number: counts the runs, so that no name is ever used again.
        """
        self.sizes = sizes
        self.sample = Sample()
        self._server = server
        self._load = load
        self.root = server.root
        self.source = source
        own = Path("scratch") / f"{server.contender.name}-{number}"
        self.behind = source / own
        # As the contender shows it: the directory is made in the source, and its name was never used before.
        self.scratch = server.root / own
        self.behind.mkdir(parents=True)
        self.drop()
        processes.forget_peak_memory(server.pids)

    def close(self) -> None:
        """Take away what was written; the mount forgets it first, so that no server keeps it alive."""
        with contextlib.suppress(Failed):
            self.drop()
        shutil.rmtree(self.behind, ignore_errors=True)

    def drop(self) -> None:
        """Make the mount's caches cold: names, attributes and pages of this mount only."""
        if self._server.mounted:
            self._run([str(self._load), "drop", str(self.root)])
        self.settle()

    def settle(self) -> None:
        """Wait until the server has done what it has still to do for the last load."""
        processes.settle(self._server.pids)

    def fresh_directory(self) -> Path:
        """Return another empty directory below `scratch`, which the contender has not seen yet."""
        number = str(len(os.listdir(self.behind)))
        (self.behind / number).mkdir()
        return self.scratch / number

    def load(self, *arguments: object, timed: bool = True) -> None:
        """Run the load generator with these arguments; it says itself how much it did in what time."""
        with self._meter(timed):
            output = self._run([str(self._load), *map(str, arguments)])
        if timed:
            self._count(*map(float, output.split()))

    def fio(self, *options: str, work: str = "bytes", timed: bool = True) -> None:
        """Run fio with these options; jobs are added up.

        Args:
            options: without the leading dashes.
            work: what to count, "bytes" or "operations".
            timed: whether this is what the workload measures, or its preparation.
        """
        common = [
            "name=load",
            "ioengine=psync",
            # Processes are what most programs are; with threads fio would share one table of descriptors.
            "group_reporting",
            # Cold or hot is decided here, not by fio.
            "invalidate=0",
            "fallocate=none",
            "randrepeat=1",
            # Without latencies and with the vDSO's clock, fio costs least of what is to be measured.
            "gtod_reduce=1",
            "clocksource=clock_gettime",
            "disk_util=0",
            "output-format=json",
        ]
        with self._meter(timed):
            output = self._run(["fio", *(f"--{option}" for option in [*common, *options])])
        if timed:
            # Notes may stand before the result.
            (job,) = json.loads(output[output.index("{") :])["jobs"]
            parts = [job["read"], job["write"]]
            amount = sum(part["io_bytes"] if work == "bytes" else part["total_ios"] for part in parts)
            self._count(amount, max(part["runtime"] for part in parts) / 1000)

    def program(self, *command: str, directory: Path, work: float = 1, timed: bool = True) -> None:
        """Run a program in a directory of the mount, and count its time as the time of so much work."""
        # env enters the directory, since a mount that hangs must not hang the benchmark.
        with self._meter(timed):
            output = self._run(["env", "--chdir", str(directory), str(self._load), "program", str(work), *command])
        if timed:
            self._count(*map(float, output.split()))

    def _count(self, work: float, seconds: float) -> None:
        self.sample.work += work
        self.sample.seconds += seconds
        self.sample.peak_memory = max(self.sample.peak_memory, processes.peak_memory(self._server.pids))

    @contextlib.contextmanager
    def _meter(self, timed: bool) -> Iterator[None]:
        before = processes.cpu_seconds(self._server.pids)
        yield
        if timed:
            self.sample.cpu_seconds += processes.cpu_seconds(self._server.pids) - before

    def _run(self, command: Sequence[str]) -> str:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the benchmark, which then ends the load by itself.
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, self._server.cpus),
        )
        try:
            output, errors = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            # A process that waits for an answer of FUSE ends only after the server has.
            self._server.kill()
            raise Failed(f"no end after {_TIMEOUT:.0f} s") from None
        finally:
            if process.returncode is None:
                processes.kill(processes.tree(process.pid))
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    self._server.kill()
                    process.wait()
        if process.returncode:
            # The first line says what went wrong, the others what came of it.
            lines = errors.strip().splitlines() or [f"{command[0]}: exit code {process.returncode}"]
            raise Failed(lines[0])
        return output
