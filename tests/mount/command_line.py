"""Runs the llloop command as a shell does, and checks errors, exit codes and clean stops."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.server import Server
from tests.watchdog import kill_session, mount_entry, processes_of_session

SECONDS = 30.0


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str

    def complaint(self) -> str:
        """The one line that says what is wrong; click puts the usage before its own."""
        lines = self.stderr.splitlines()
        if self.code == 2 and lines and lines[0].startswith("Usage: "):
            assert [line for line in lines if line.startswith("Error: ")] == lines[-1:], self.stderr
            return lines[-1]
        assert len(lines) == 1, f"not one clear line:\n{self.stderr}"
        return lines[0]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without a user's own LLLOOP_ settings; warnings of Python are errors."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLLOOP_", "_LLLOOP"))}
    return {**kept, "PYTHONWARNINGS": "error", **(extra or {})}


def llloop(
    *arguments: str | bytes | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | str = "/",
    prefix: Sequence[str] = (),
) -> Ended:
    """Runs llloop to its end, which must come by itself and leave no process behind."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "llloop", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(env),
        cwd=cwd,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=SECONDS)
        left = processes_of_session(process.pid)
        assert not left, f"processes left: {left}\n{stderr.decode(errors='replace')}"
    finally:
        kill_session(process.pid)
        process.wait()
    return Ended(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


@dataclass(frozen=True)
class Ground:
    """A source and a mount point with nothing started."""

    source: Path
    mountpoint: Path
    state: Path
    loop: tuple[str, ...]

    def serve(self, *arguments: str | bytes | Path, **how: object) -> Ended:
        return llloop("serve", *self.loop, self.source, self.mountpoint, *arguments, **how)  # type: ignore[arg-type]

    def refused(self, code: int, pattern: str, *arguments: str | bytes | Path, **how: object) -> str:
        """`llloop serve SRC MNT` with these arguments says this, ends with this code, and has done nothing."""
        return self.check_refused(self.serve(*arguments, **how), code, pattern)

    def check_refused(self, ended: Ended, code: int, pattern: str) -> str:
        before = mount_entry(str(self.mountpoint))
        assert before is None, f"mounted: {before}\n{ended.stderr}"
        return check_complaint(ended, code, pattern)


def check_refused(place: Path, *cases: tuple[list[str], str]) -> None:
    """Check that `llloop serve` refuses arguments as invalid; each case has a part of what it says to them."""
    for name in ("src", "mnt"):
        (place / name).mkdir()
    for arguments, part in cases:
        ended = llloop("serve", place / "src", place / "mnt", *arguments)
        assert (ended.code, part in ended.complaint()) == (2, True), ended


def check_complaint(ended: Ended, code: int, pattern: str) -> str:
    assert ended.code == code, f"exit code {ended.code} instead of {code}:\n{ended.stderr}"
    assert ended.stdout == ""
    complaint = ended.complaint()
    assert re.search(pattern, complaint, re.IGNORECASE), f"{complaint!r} says nothing of {pattern!r}"
    return complaint


@contextlib.contextmanager
def ground(server: Server, via: str) -> Iterator[Ground]:
    try:
        loop = ("--loop", "llfuse") if via == "llfuse" else ()
        yield Ground(server.source, server.mountpoint, server.state, loop)
    finally:
        server.forget_files()


def stopped(server: Server) -> None:
    """The server has been told to stop in some way: it ends with 0, unmounted, with all its processes."""
    assert server.process
    code = server.process.wait(SECONDS)
    assert code == 0, f"exit code {code}\n{server.all_output()}"
    assert not server.mounted()
    assert server.processes() == []


def process_titles(session: int) -> list[str]:
    """The processes of a session by the names that ps shows."""
    titles = []
    for pid in processes_of_session(session):
        with contextlib.suppress(OSError):
            titles.append(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().split(" ")[0])
    return sorted(titles)


# The new namespace has a copy of every mount. Copies of other tests' mounts would prevent the end of their servers.
_LET_GO = "umount --lazy --all --types fuse.llloop || true"


def in_other_mounts(script: str = "", user: int | None = None) -> list[str]:
    """A command's prefix, for root: it runs where this script has mounted things, out of everybody else's sight."""
    become = f"setpriv --reuid={user} --regid={user} --clear-groups" if user else ""
    inside = f'{_LET_GO}\n{script}\nexec {become} "$@"'
    return ["unshare", "--mount", "--propagation=slave", "sh", "-ec", inside, "sh"]
