"""The directory of a workload in the mount of a contender, and the measurement of time, CPU time and memory."""

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

# If a single load takes longer than this, in seconds, the server hangs.
_TIMEOUT = 120.0


class Failed(Exception):
    """A load failed; the message says why."""


@dataclass(slots=True)
class Sample:
    """The result of one run of a workload.

    Attributes:
        work: bytes moved, or operations done.
        seconds: how long this took.
        cpu_seconds: the CPU time of all processes of the server.
        peak_memory: the peak memory of all processes of the server, in bytes.
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
    """The directory of a contender for one run of one workload."""

    def __init__(self, server: Server, source: Path, sizes: Sizes, load: Path, number: int) -> None:
        """Create a directory for the files of the workload, and empty the caches.

        Args:
            server: the server of the contender.
            source: the mirrored directory.
            sizes: how much work to do.
            load: the compiled load generator.
            number: the number of the run, so that no name is used twice.
        """
        self.sizes = sizes
        self.sample = Sample()
        self._server = server
        self._load = load
        self.root = server.root
        self.source = source
        own = Path("scratch") / f"{server.contender.name}-{number}"
        self.behind = source / own
        # The directory is created in the source. The contender has never seen its name.
        self.scratch = server.root / own
        self.behind.mkdir(parents=True)
        self.drop()
        processes.forget_peak_memory(server.pids)

    def close(self) -> None:
        """Delete the files; make the kernel forget them first, so that no server holds them."""
        with contextlib.suppress(Failed):
            self.drop()
        shutil.rmtree(self.behind, ignore_errors=True)

    def drop(self) -> None:
        """Empty the kernel's caches of names, attributes and pages of this mount."""
        if self._server.mounted:
            self._run([str(self._load), "drop", str(self.root)])
        self.settle()

    def settle(self) -> None:
        """Wait until the server has finished its work for the last load."""
        processes.settle(self._server.pids)

    def fresh_directory(self) -> Path:
        """Return another empty directory below `scratch` that the contender has not seen."""
        number = str(len(os.listdir(self.behind)))
        (self.behind / number).mkdir()
        return self.scratch / number

    def load(self, *arguments: object, timed: bool = True) -> None:
        """Run the load generator with these arguments. It prints the number of operations and the time."""
        with self._meter(timed):
            output = self._run([str(self._load), *map(str, arguments)])
        if timed:
            self._count(*map(float, output.split()))

    def fio(self, *options: str, work: str = "bytes", timed: bool = True) -> None:
        """Run fio with these options and add up the results of its jobs.

        Args:
            options: options of fio without the leading dashes.
            work: what to count, "bytes" or "operations".
            timed: whether to measure this; False for a preparation.
        """
        common = [
            "name=load",
            "ioengine=psync",
            # Use processes: threads of fio would share one table of descriptors, unlike most programs.
            "group_reporting",
            # The benchmark empties the caches, not fio.
            "invalidate=0",
            "fallocate=none",
            "randrepeat=1",
            # Without latencies and with the clock of the vDSO, fio itself takes the least time.
            "gtod_reduce=1",
            "clocksource=clock_gettime",
            "disk_util=0",
            "output-format=json",
        ]
        with self._meter(timed):
            output = self._run(["fio", *(f"--{option}" for option in [*common, *options])])
        if timed:
            # fio may print messages before the result.
            (job,) = json.loads(output[output.index("{") :])["jobs"]
            parts = [job["read"], job["write"]]
            amount = sum(part["io_bytes"] if work == "bytes" else part["total_ios"] for part in parts)
            self._count(amount, max(part["runtime"] for part in parts) / 1000)

    def program(self, *command: str, directory: Path, work: float = 1, timed: bool = True) -> None:
        """Run a program in a directory of the mount, and measure its time for this amount of work."""
        # env(1) changes the directory, because a mount that hangs must not stop the benchmark.
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
            # Ctrl-C must reach only the benchmark, which then ends the load.
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, self._server.cpus),
        )
        try:
            output, errors = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            # A process that waits for an answer of FUSE ends only after the server.
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
            # The first line contains the cause, the others the consequences.
            lines = errors.strip().splitlines() or [f"{command[0]}: exit code {process.returncode}"]
            raise Failed(lines[0])
        return output
