"""The server under test: starting, observing and stopping it, and checking that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.syscalls import opened, syncfs
from tests.watchdog import (
    Watchdog,
    abort_connection,
    kill_session,
    mount_entry,
    processes_of_session,
    unmount_lazily,
    wait_for_requests,
)

START_SECONDS = 30.0
STOP_SECONDS = 30.0
READY = "llloop: serving "

# A record begins with a date or a level. Further lines without them, for example a traceback, belong to it.
RECORD_START = re.compile(r"^(\[?\d{4}-\d\d-\d\d|\[?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b)")
GRAVE = re.compile(r"\b(WARNING|ERROR|CRITICAL|FATAL|Traceback|Exception ignored|Segmentation fault)\b")


def reachable_directory(prefix: str, parent: str | None = None) -> Path:
    """Creates a temporary directory that other users can search, unlike that of mkdtemp."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    path.chmod(0o755)
    return path


def remove_tree(path: Path) -> None:
    """Removes a tree, even if its owner may not search some directories."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        for directory, names, _ in os.walk(path):
            for name in names:
                below = os.path.join(directory, name)
                if not os.path.islink(below):
                    os.chmod(below, 0o700)
        shutil.rmtree(path, ignore_errors=True)


def source_parent() -> str | None:
    chosen = os.environ.get("LLLOOP_TEST_SOURCE")
    if chosen:
        return chosen
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def records_in(text: str) -> list[str]:
    records: list[str] = []
    for line in text.splitlines():
        if RECORD_START.match(line) or not records:
            records.append(line)
        else:
            records[-1] += "\n" + line
    return records


@dataclass
class Expectation:
    pattern: re.Pattern[str]
    required: bool
    met: bool = False


@dataclass
class Server:
    """A source, a mount point and the server process. With "native" there is no server, and MNT is the source."""

    via: str
    arguments: Sequence[str]
    watchdog: Watchdog
    source: Path
    mountpoint: Path
    state: Path
    command: Sequence[str] | None = None
    environment: Mapping[str, str] | None = None
    owned: list[Path] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    expectations: list[Expectation] = field(default_factory=list)
    _log_offset: int = 0
    _output_offset: int = 0

    @classmethod
    def prepare(
        cls,
        via: str,
        watchdog: Watchdog,
        arguments: Sequence[str] = (),
        source: Path | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Server:
        """The directories, and nothing started yet. `command` replaces "python -m llloop serve"."""
        state = reachable_directory("llloop-test-")
        owned = [state]
        if source is None:
            holder = reachable_directory("llloop-source-", source_parent())
            owned.append(holder)
            source = holder / "source"
            source.mkdir(mode=0o755)
        mountpoint = source if via == "native" else state / "mnt"
        mountpoint.mkdir(mode=0o755, exist_ok=True)
        (state / "log").touch()
        (state / "output").touch()
        return cls(via, arguments, watchdog, source, mountpoint, state, command, environment, owned)

    @property
    def log(self) -> Path:
        return self.state / "log"

    @property
    def output(self) -> Path:
        """Whatever the server wrote to stdout and stderr."""
        return self.state / "output"

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else os.getpid()

    def start(self) -> None:
        if self.via == "native":
            return
        command = list(self.command or [sys.executable, "-m", "llloop", "serve"])
        if self.via == "llfuse":
            command += ["--loop", "llfuse"]
        command += [str(self.source), str(self.mountpoint), "--log-file", str(self.log), *self.arguments]
        already = self.output.stat().st_size
        with self.output.open("ab") as output:
            # A new session identifies all processes of the server, even if their parent changes.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Warnings, for example of an open descriptor, are printed. The tests check the output.
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "error", **(self.environment or {})},
                cwd="/",
                start_new_session=True,
            )
        self.watchdog.guard(self.process.pid, self.mountpoint)
        deadline = time.monotonic() + START_SECONDS
        while not self._ready(already):
            code = self.process.poll()
            if code is not None or time.monotonic() > deadline:
                self.clean_up()
                how = "took too long to start" if code is None else f"ended with {code} at its start"
                raise AssertionError(f"{' '.join(command)} {how}:\n{self.all_output()}")
            time.sleep(0.02)

    def _ready(self, offset: int) -> bool:
        text = self.output.read_bytes()[offset:].decode(errors="replace")
        return any(line.startswith(READY) for line in text.splitlines())

    def all_output(self) -> str:
        return f"--- output\n{self.output.read_text(errors='replace')}--- log\n{self.log.read_text(errors='replace')}"

    def mounted(self) -> bool:
        return mount_entry(str(self.mountpoint)) is not None

    def alive(self) -> bool:
        return self.process is None or (self.process.poll() is None and self.mounted())

    def processes(self) -> list[int]:
        """Returns all running processes of the server, including the supervisor."""
        return processes_of_session(self.process.pid) if self.process else []

    def expect_log(self, regex: str, required: bool = True) -> None:
        """Allows log records of level WARNING and above that match; if required, at least one must appear."""
        if self.via != "native":
            self.expectations.append(Expectation(re.compile(regex, re.DOTALL), required))

    def wait_for_log(self, regex: str, seconds: float = 30.0) -> str:
        """Waits until the log matches and returns it: records of other processes arrive a moment later."""
        deadline = time.monotonic() + seconds
        while True:
            text = self.log.read_text(errors="replace")
            if re.search(regex, text, re.DOTALL):
                return text
            assert time.monotonic() < deadline, f"no {regex!r} in the log within {seconds} s:\n{self.all_output()}"
            time.sleep(0.05)

    def check_log(self) -> None:
        """Fails if there are unexpected records since the last check."""
        unexpected = []
        fresh_log, self._log_offset = self._since(self.log, self._log_offset)
        fresh_output, self._output_offset = self._since(self.output, self._output_offset)
        for record in [*records_in(fresh_log), *records_in(fresh_output)]:
            matching = [expectation for expectation in self.expectations if expectation.pattern.search(record)]
            for expectation in matching:
                expectation.met = True
            if GRAVE.search(record) and not matching:
                unexpected.append(record)
        missing = [e.pattern.pattern for e in self.expectations if e.required and not e.met]
        self.expectations = []
        assert not unexpected, "unexpected in the log:\n" + "\n".join(unexpected)
        assert not missing, f"expected in the log and not there: {missing}"

    @staticmethod
    def _since(path: Path, offset: int) -> tuple[str, int]:
        # Compare bytes, because the log may contain a name that is not UTF-8.
        content = path.read_bytes()
        return content[offset:].decode(errors="replace"), len(content)

    def stop(self, expected_code: int = 0) -> None:
        """Sends SIGTERM, then checks everything that a clean stop promises."""
        if self.process is None:
            self.check_log()
            return
        problems = []
        process = self.process
        try:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            code: int | None = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(STOP_SECONDS)
            if code is None:
                problems.append(f"did not stop within {STOP_SECONDS} s of SIGTERM")
            elif code != expected_code:
                problems.append(f"ended with {code} instead of {expected_code}")
            if self.mounted():
                problems.append("still mounted")
            left = processes_of_session(process.pid)
            if left:
                problems.append(f"processes left: {left}")
        finally:
            self.clean_up()
        assert not problems, f"the server of {self.mountpoint}: {'; '.join(problems)}\n{self.all_output()}"
        self.check_log()

    def clean_up(self) -> None:
        """Ends all processes and the mount by any means."""
        if self.process is None:
            return
        kill_session(self.process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        if self.mounted():
            abort_connection(str(self.mountpoint))
            unmount_lazily(str(self.mountpoint))
        self.watchdog.release(self.process.pid)
        self.process = None

    def forget_files(self) -> None:
        """Removes the temporary directories, but never through a mount."""
        if not self.mounted() or self.via == "native":
            for path in self.owned:
                remove_tree(path)


@dataclass(frozen=True)
class Tree:
    """The directory of one test: `src` in the source, `mnt` in the mount."""

    behind: Path
    mnt: Path
    server: Server

    @property
    def src(self) -> Path:
        """The directory in the source, after the kernel has written its collected writes to it."""
        if "--writeback" in self.server.arguments:
            with opened(self.server.mountpoint, os.O_RDONLY) as directory:
                syncfs(directory)
            # Since Linux 6.16, syncfs(2) sends the collected writes of a FUSE file system, but waits for no answer.
            wait_for_requests(str(self.server.mountpoint))
        return self.behind
