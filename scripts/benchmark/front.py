"""The cost of each kind of request: the microbenchmark of the front.

Load and server are pinned to one CPU, and the load repeats one system call. So the time of the call is the whole cost
of the request: in the kernel, for the context switches, and in the server. The column of the native directory shows
the cost of the same call without FUSE.
"""

from __future__ import annotations

import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import processes
from .bench import Bench
from .placement import REQUESTS
from .progress import Progress
from .report import Table, number
from .servers import Server
from .site import Failed, Site
from .tools import Unavailable, run

# Files to create before operations that remove or rename them.
_BEFORE = {"unlink": "create", "rmdir": "mkdir"}
# Work of the front other than system calls.
_INTERPRETER = "front outside the kernel"
PY_SPY = Path(sys.executable).parent / "py-spy"
# The requests of each operation, as the kernel sends them if it has cached nothing.
REQUESTS_OF = {
    "lookup": "LOOKUP",
    "lookup-missing": "LOOKUP (no entry)",
    "getattr": "GETATTR",
    "open": "OPEN, RELEASE, FLUSH unless declined",
    "read-4k": "READ",
    "read-128k": "READ",
    "write-4k": "WRITE",
    "write-128k": "WRITE",
    "create": "CREATE, RELEASE, FLUSH unless declined",
    "unlink": "UNLINK, FORGET",
    "mkdir": "LOOKUP, MKDIR",
    "rmdir": "RMDIR, FORGET",
    "symlink": "LOOKUP, SYMLINK",
    "rename": "LOOKUP, RENAME",
    "readlink": "READLINK unless cached",
    "chmod": "SETATTR",
    "utimens": "SETATTR",
    "truncate": "SETATTR",
    "fsync": "FSYNC",
    "getxattr": "GETXATTR",
    "statfs": "STATFS",
    "opendir": "OPENDIR, RELEASEDIR",
    "readdir-100": "OPENDIR, READDIR or READDIRPLUS unless cached, RELEASEDIR",
}


@dataclass(slots=True)
class Cost:
    """The cost of one operation, in microseconds and in numbers per operation.

    Attributes:
        elapsed: the time of the call.
        cpu: the CPU time of the server, by the role of its processes.
        wakeups: how often a thread of the server was woken.
    """

    elapsed: float
    cpu: dict[str, float]
    wakeups: float


@dataclass(slots=True)
class Detail:
    """What strace and py-spy show of an operation. They slow it down, so they run separately.

    Attributes:
        calls: the system calls of the server for one operation.
        profile: the functions of the front, each with its share of the samples.
    """

    calls: dict[str, float] = field(default_factory=dict)
    profile: list[tuple[str, float]] = field(default_factory=list)


def operations(load: Path) -> list[str]:
    """Return the names of the operations that the load generator knows."""
    return run([load, "operations"]).split()


def install_py_spy() -> None:
    """Install the sampler into the virtual environment.

    Raises:
        Unavailable: it cannot be installed.
    """
    run([sys.executable, "-m", "pip", "install", "--quiet", "py-spy"])


class Front:
    """Measures single operations on the servers of a bench."""

    def __init__(self, bench: Bench, load: Path, progress: Progress, seconds: float, names: int) -> None:
        """Prepare.

        Args:
            bench: the mounts, for class requests.
            load: the compiled load generator.
            progress: shows the progress.
            seconds: for how long to repeat an operation.
            names: how often to repeat an operation that needs a new name each time.
        """
        self._bench = bench
        self._load = load
        self._progress = progress
        self._seconds = seconds
        self._names = names
        self._runs = 0

    def rounds(self, operations: Sequence[str], count: int) -> dict[str, dict[str, list[Cost]]]:
        """Measure the operations on all servers, round by round."""
        costs: dict[str, dict[str, list[Cost]]] = {}
        servers = list(self._bench.servers[REQUESTS].values())
        total = count * len(operations) * len(servers)
        for turn in range(count):
            for index, operation in enumerate(operations):
                first = (turn + index) % len(servers)
                for place, server in enumerate(servers[first:] + servers[:first]):
                    done = (turn * len(operations) + index) * len(servers) + place
                    name = server.contender.name
                    self._progress.step(done, total, f"round {turn + 1} of {count}, {operation}", name)
                    try:
                        cost = self.once(server, operation)
                    except Failed as reason:
                        self._progress.say(f"{operation} on {name}: {reason}")
                    else:
                        costs.setdefault(operation, {}).setdefault(name, []).append(cost)
        self._progress.clear()
        return costs

    def once(self, server: Server, operation: str) -> Cost:
        """Measure one operation on one server.

        Args:
            server: the server.
            operation: the name of the operation.

        Raises:
            Failed: the operation failed.
        """
        self._runs += 1
        site = Site(server, self._bench.source, self._bench.sizes, self._load, self._runs)
        try:
            self._prepare(site, operation)
            before = _usage(server.pids)
            wakeups = processes.wakeups(server.pids)
            site.load("single", operation, self._seconds, self._names, site.scratch)
            after = _usage(server.pids)
            count = site.sample.work
            cpu = {role: (used - before[role]) / count * 1e6 for role, used in after.items()}
            return Cost(site.sample.seconds / count * 1e6, cpu, (processes.wakeups(server.pids) - wakeups) / count)
        finally:
            site.close()

    def calls(self, server: Server, operation: str) -> dict[str, float]:
        """Return the server's system calls per operation.

        Raises:
            Failed: the operation failed.
            Unavailable: strace is not available or cannot attach.
        """
        self._runs += 1
        site = Site(server, self._bench.source, self._bench.sizes, self._load, self._runs)
        try:
            self._prepare(site, operation)
            with _traced(server.pids) as calls:
                site.load("single", operation, self._seconds, min(self._names, 500), site.scratch)
            return {name: count / site.sample.work for name, count in calls.items()}
        finally:
            site.close()

    def profile(self, server: Server, operation: str) -> list[tuple[str, float]]:
        """Return the functions of the front, each with its share of the samples.

        Raises:
            Failed: the operation failed.
            Unavailable: py-spy is not available or cannot attach.
        """
        self._runs += 1
        front = [pid for pid in server.pids if "front" in processes.title(pid)]
        site = Site(server, self._bench.source, self._bench.sizes, self._load, self._runs)
        try:
            self._prepare(site, operation)
            with _sampled(front[0]) as functions:
                site.load("single", operation, 2.0, self._names, site.scratch)
            total = sum(functions.values()) or 1
            return [(name, count / total) for name, count in functions.most_common(8)]
        finally:
            site.close()

    @property
    def watched(self) -> list[Server]:
        """The servers of llloop, whose functions and system calls are examined."""
        return [s for name, s in self._bench.servers[REQUESTS].items() if name.startswith("llloop")]

    def _prepare(self, site: Site, operation: str) -> None:
        behind = site.behind
        (behind / "file").write_bytes(b"x")
        (behind / "direct").write_bytes(b"x" * 2**20)
        (behind / "moved-a").touch()
        (behind / "symlink").symlink_to("target")
        (behind / "hundred").mkdir()
        for index in range(100):
            (behind / "hundred" / f"{index:03}").touch()
        if operation == "lookup":
            for index in range(self._names):
                (behind / f"have{index:06}").touch()
        site.drop()
        if operation in _BEFORE:
            site.load("single", _BEFORE[operation], 0, self._names, site.scratch, timed=False)
            site.settle()


def _role(pid: int) -> str:
    # The titles of llloop's processes contain their roles. A peer is one process.
    match = re.fullmatch(r"llloop-(\w+?)(-\d+)?", processes.title(pid))
    return match.group(1) if match else "server"


def _usage(pids: Sequence[int]) -> dict[str, float]:
    usage: defaultdict[str, float] = defaultdict(float)
    for pid in pids:
        role = _role(pid)
        usage[role] += processes.cpu_seconds([pid])
        if role == "front":
            usage[_INTERPRETER] += processes.user_seconds([pid])
    return usage


@contextmanager
def _traced(pids: Sequence[int]) -> Iterator[Counter[str]]:
    """Count the system calls of the processes while the body runs."""
    calls: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile("r") as output:
        words = ["strace", "-f", "-c", "-U", "calls,name", "-o", output.name]
        for pid in pids:
            words += ["-p", str(pid)]
        with _attached(words):
            yield calls
        for line in output:
            count, _, name = line.strip().partition(" ")
            if count.isdigit() and name.strip() != "total":
                calls[name.strip()] += int(count)


@contextmanager
def _sampled(pid: int) -> Iterator[Counter[str]]:
    """Sample the functions of a Python process while the body runs."""
    functions: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile("r") as output:
        words = [str(PY_SPY), "record", "--pid", str(pid), "--rate", "500", "--format", "raw", "--nonblocking"]
        with _attached([*words, "--duration", "60", "--output", output.name]):
            yield functions
        for line in Path(output.name).read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            functions[stack.rpartition(";")[2]] += int(count)


@contextmanager
def _attached(words: list[str]) -> Iterator[None]:
    """Run a program that watches other processes while the body runs."""
    watcher = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(1)
        if watcher.poll() is not None:
            raise Unavailable(f"{Path(words[0]).name} ended at once")
        yield
    finally:
        watcher.send_signal(signal.SIGINT)
        try:
            watcher.wait(20)
        except subprocess.TimeoutExpired:
            watcher.kill()
            watcher.wait()


def table(costs: dict[str, dict[str, list[Cost]]], names: Sequence[str]) -> str:
    """Return the costs as text: the elapsed times of all contenders, then the parts of llloop's times."""

    def middle(operation: str, name: str, what: Callable[[Cost], float]) -> float | None:
        samples = costs[operation].get(name)
        return statistics.median(map(what, samples)) if samples else None

    parts = ["Microseconds for one operation, load and server on one CPU:"]
    elapsed = Table(["operation", *names, "requests"])
    for operation in costs:
        cells = [number(middle(operation, name, lambda cost: cost.elapsed)) for name in names]
        elapsed.rows.append([operation, *cells, REQUESTS_OF.get(operation, "")])
    parts.append(elapsed.text())
    for name in names:
        if not name.startswith("llloop"):
            continue
        roles = sorted({role for samples in costs.values() for cost in samples.get(name, []) for role in cost.cpu})
        inside = Table(["operation", *(f"{role} CPU" for role in roles), "wake-ups"])
        for operation in costs:
            cpu = [number(middle(operation, name, _used_by(role))) for role in roles]
            inside.rows.append([operation, *cpu, number(middle(operation, name, lambda cost: cost.wakeups))])
        parts += [f"{name}: microseconds of CPU time of its processes, and wake-ups, for one operation:", inside.text()]
    return "\n\n".join(parts) + "\n"


def _used_by(role: str) -> Callable[[Cost], float]:
    return lambda cost: cost.cpu.get(role, 0)


def details(
    meter: Front, names: Sequence[str], syscalls: bool, profile: bool, progress: Progress
) -> dict[str, dict[str, Detail]]:
    """Watch llloop's servers at each operation, by contender and operation."""
    found: dict[str, dict[str, Detail]] = {}
    if not (syscalls or profile):
        return found
    for server in meter.watched:
        for place, operation in enumerate(names):
            progress.step(place, len(names), f"watching {server.contender.name}", operation)
            detail = found.setdefault(server.contender.name, {})[operation] = Detail()
            try:
                if syscalls:
                    detail.calls = meter.calls(server, operation)
                if profile:
                    detail.profile = meter.profile(server, operation)
            except (Failed, Unavailable) as reason:
                progress.say(f"{operation} on {server.contender.name}: {reason}")
    progress.clear()
    return found


def detail_tables(found: dict[str, dict[str, Detail]]) -> str:
    """Return the observations as text."""
    parts = []
    for name, by_operation in found.items():
        if any(detail.calls for detail in by_operation.values()):
            parts.append(f"\n{name}: system calls of all its processes for one operation:\n")
            for operation, detail in by_operation.items():
                calls = sorted(detail.calls.items(), key=lambda item: -item[1])
                text = ", ".join(f"{call} {count:.2f}" for call, count in calls if count >= 0.02)
                parts.append(f"{operation:16}{sum(detail.calls.values()):6.2f}  {text}")
        if any(detail.profile for detail in by_operation.values()):
            parts.append(
                f"\n{name}: where the front was found (where it reads or writes, the load may have been running):\n"
            )
            for operation, detail in by_operation.items():
                parts.append(f"{operation:16}" + ", ".join(f"{where} {share:.0%}" for where, share in detail.profile))
    return "\n".join(parts) + "\n" if parts else ""
