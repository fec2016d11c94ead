"""The server of a contender: it is mounted, watched, and always unmounted in the end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

from . import processes
from .contenders import Contender
from .tools import Unavailable

# The maximum time for the start or the end of a server, in seconds.
_TIMEOUT = 20.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Server:
    """The mount and the processes of a contender. The native directory has neither.

    Attributes:
        contender: the contender.
        root: the directory for the load.
        cpus: the CPUs for the server and the load.
        pids: the process ids of the server.
    """

    def __init__(self, contender: Contender, source: Path, mountpoint: Path, log: Path, cpus: set[int]) -> None:
        """Mount, and wait until the mount answers.

        Args:
            contender: what to serve.
            source: the directory to mirror.
            mountpoint: an empty directory.
            log: the file for the output of the server.
            cpus: the CPUs for its processes.

        Raises:
            Unavailable: the server did not start.
        """
        self.contender = contender
        self.cpus = cpus
        self.root = source if contender.command is None else mountpoint
        self.pids: list[int] = []
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        if contender.command is None:
            return
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                contender.command(source, mountpoint),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C must reach only the benchmark, which then stops the servers in the right order.
                start_new_session=True,
                preexec_fn=lambda: _prepare_server(cpus),
            )
        try:
            self._await_mount()
        except BaseException:
            self.stop()
            raise

    @property
    def mounted(self) -> bool:
        """Whether there is a mount; the native directory has none."""
        return self._process is not None

    def alive(self) -> bool:
        """Return whether the server is running; always True for the native directory."""
        return self._process is None or self._process.poll() is None

    def _await_mount(self) -> None:
        end = time.monotonic() + _TIMEOUT
        while not _is_mounted(self.root):
            if not self.alive():
                raise Unavailable(f"it ended at once: {self.last_words()}")
            if time.monotonic() > end:
                raise Unavailable(f"it did not mount within {_TIMEOUT:.0f} s: {self.last_words()}")
            time.sleep(0.02)
        if self._patiently(["stat", str(self.root)]):
            raise Unavailable(f"the mount does not answer: {self.last_words()}")
        assert self._process is not None
        # Some servers start threads and workers after the mount.
        time.sleep(0.3)
        self.pids = processes.tree(self._process.pid)

    def last_words(self) -> str:
        """Return the last line of output of the server, or how it ended."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
        return f"exit code {self._process.poll() if self._process else None}"

    def kill(self) -> None:
        """Kill the processes; needed if the mount hangs."""
        if self._process is not None:
            processes.kill(processes.tree(self._process.pid))

    def stop(self) -> None:
        """Unmount, and end the processes: with SIGTERM first, then with SIGKILL."""
        process = self._process
        if process is None:
            return
        known = processes.tree(process.pid)
        for command in (["umount"], ["umount", "--lazy"]):
            if _is_mounted(self.root):
                self._patiently([*command, str(self.root)])
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        process.kill()
        process.wait()
        # Kill a child that outlived its parent. Another process may have its id by now, but not its session.
        processes.kill(pid for pid in known if processes.session(pid) == process.pid)

    def _patiently(self, command: list[str]) -> int:
        """Run a command that uses the mount and return its exit code. If the command hangs, kill the server first."""
        toucher = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            return toucher.wait(_TIMEOUT)
        except subprocess.TimeoutExpired:
            # A process that waits for an answer of FUSE ends only after the server.
            self.kill()
            toucher.kill()
            return toucher.wait()


def _prepare_server(cpus: set[int]) -> None:
    os.sched_setaffinity(0, cpus)
    # Some peers keep a descriptor for each file that the kernel knows, and end if they have no more descriptors.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # If the benchmark is killed, its servers get SIGTERM and unmount.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_mounted(path: Path) -> bool:
    wanted = os.fsencode(path).replace(b" ", b"\\040")
    with open("/proc/self/mountinfo", "rb") as mounts:
        return any(line.split(b" ")[4] == wanted for line in mounts)
