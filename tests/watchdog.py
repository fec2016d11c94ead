"""Ends servers that hang, so that a test blocked in the kernel gets ENOTCONN instead of blocking the machine.

A process of its own, not a thread: a page fault on a hung mount holds the GIL of the process that runs the tests.
It also ends the servers when that process is gone without having stopped them.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path


def processes_of_session(session: int) -> list[int]:
    """Returns the running processes of a session; /proc/PID/stat never blocks, unlike cmdline."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            # The name of the command may contain spaces and parentheses. The fields after the last ")" do not.
            fields = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry))
    return found


def kill_session(session: int) -> None:
    # Stop all before the first one dies. Otherwise the keeper notices its death and cleans up.
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in processes_of_session(session):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def unescaped(field: str) -> str:
    """Decodes the octal escapes of mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), field)


def mount_entry(mountpoint: str) -> list[str] | None:
    """Returns the mountinfo fields of the mount at a path, or None; stat(2) would hang with the server."""
    for line in reversed(Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()):
        fields = line.split(" ")
        if unescaped(fields[4]) == mountpoint:
            return fields
    return None


def abort_connection(mountpoint: str) -> None:
    """Makes the kernel fail every request of this mount, whichever process has /dev/fuse open."""
    entry = mount_entry(mountpoint)
    if entry:
        minor = entry[2].partition(":")[2]
        with contextlib.suppress(OSError):
            Path("/sys/fs/fuse/connections", minor, "abort").write_text("1")


def wait_for_requests(mountpoint: str, seconds: float = 1.0) -> None:
    """Waits until no request of this mount is unanswered, with a limit for requests that hang."""
    entry = mount_entry(mountpoint)
    deadline = time.monotonic() + seconds
    while entry and time.monotonic() < deadline:
        waiting = Path("/sys/fs/fuse/connections", entry[2].partition(":")[2], "waiting")
        try:
            if waiting.read_text().strip() == "0":
                return
        except OSError:  # not mounted here, or not readable for this user
            # The server receives all earlier requests before this one.
            os.statvfs(mountpoint)
            time.sleep(0.002)
            return
        time.sleep(0.001)


def unmount_lazily(mountpoint: str) -> None:
    command = ["umount", "-l", mountpoint] if os.geteuid() == 0 else ["fusermount", "-u", "-z", mountpoint]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(command, timeout=10, capture_output=True)


class Watchdog:
    """The interface for the test process: sets what to guard, and how long a test may take."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, start_new_session=True, cwd="/", text=True, bufsize=1
        )

    def _tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def guard(self, session: int, mountpoint: Path) -> None:
        self._tell(f"guard {session} {mountpoint}")

    def release(self, session: int) -> None:
        self._tell(f"release {session}")

    def expect_within(self, seconds: float) -> None:
        self._tell(f"within {seconds}")

    def rest(self) -> None:
        self._tell("rest")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


def main() -> None:
    guarded: dict[int, str] = {}
    deadline: float | None = None
    pending = b""
    while True:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select([0], [], [], remaining)
        if not readable:
            deadline = None
            for session, mountpoint in guarded.items():
                print(f"watchdog: the test took too long, ending the server of {mountpoint}", file=sys.stderr)
                kill_session(session)
                abort_connection(mountpoint)
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            break
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            verb, _, rest = os.fsdecode(line).partition(" ")
            if verb == "guard":
                session_text, _, mountpoint = rest.partition(" ")
                guarded[int(session_text)] = mountpoint
            elif verb == "release":
                guarded.pop(int(rest), None)
            elif verb == "within":
                deadline = time.monotonic() + float(rest)
            elif verb == "rest":
                deadline = None
    for session, mountpoint in guarded.items():
        kill_session(session)
        abort_connection(mountpoint)
        if mount_entry(mountpoint):
            unmount_lazily(mountpoint)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
