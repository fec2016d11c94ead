"""The server of a mount that a program makes with `llloop.mount`: a process of its own, started and ended here.

It runs the interpreter isolated (python -I -S): neither the working directory, nor the environment, nor what start-up
files say, has a part in which code it runs. What it imports are the very files that the program has imported.

The two talk over a socket, in lines of JSON. The program sends what is to be served, and no more: when it shuts the
socket down, the mount is to end. The server sends that it is ready, or why it is not, and at the end its exit code.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from enum import Enum
from typing import Any

from llloop import errors
from llloop.config import ServeConfig
from llloop.errors import HostError, LlloopError
from llloop.linux import syscalls
from llloop.linux.mount_identity import MountIdentity

# How long the mount may take to be unmounted before it is ended all the same, in seconds.
TIMEOUT = 30.0
# How long what outlives a killed server may take to detach its mount, in seconds.
_AFTERMATH = 5.0
_NOT_INHERITED = ("LLLOOP_", "NOTIFY_SOCKET", "WATCHDOG_")

# The modules outside of the standard library that a server imports.
_MODULES = ("llloop", "llloop.workers", "llfuse", "msgpack", "multiprocessing_logging", "setproctitle")
_BOOTSTRAP = """
import importlib.util, json, socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
line = channel.makefile("rb").readline()
if not line:
    sys.exit(1)
told = json.loads(line)
class AsInTheProgram:
    @staticmethod
    def find_spec(name, path=None, target=None):
        file, places = told["modules"].get(name, (None, None))
        return file and importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)
sys.meta_path.insert(0, AsInTheProgram)
from llloop.server_process import serve
serve(channel, told)
"""


class ServerProcess:
    """A server, from its start to its end.

    Args:
        config: what is to be served; its paths are absolute.
        log_level: the least severe messages that go to standard error.

    Attributes:
        pid: its process id.
        description: the line that `llloop serve` would print.

    Raises:
        LlloopError: it could not be started, or the mount could not be made. Nothing is left then.
    """

    def __init__(self, config: ServeConfig, log_level: str) -> None:
        self._owner = os.getpid()
        self._mount: MountIdentity | None = None
        try:
            self._start()
        except OSError as error:
            file = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            raise HostError(f"the server cannot be started: {file}{error.strerror}") from None
        self.pid = self._process.pid
        self._heard = b""
        try:
            self._tell({"modules": _module_files(), "config": _plain(config), "log_level": log_level})
            told = self._hear()
            if "ready" not in told:
                raise self._failure(told)
            self.description: str = told["ready"]
            self.source: str = told["source"]
            self._mount = MountIdentity(
                told["mountpoint"], tuple(told["device"]), told["mount_id"], told["unique_mount_id"]
            )
        except BaseException:
            self.end()
            raise

    def _start(self) -> None:
        """Start the process, which waits to be told what to serve.

        Raises:
            OSError: it cannot be started, for want of descriptors or processes. Nothing is left then.
            HostError: no interpreter is known.
        """
        self._channel, theirs = (_above_standard_descriptors(end) for end in socket.socketpair())
        try:
            with theirs:
                alive = _above(os.pidfd_open(os.getpid()))
                try:
                    self._process = subprocess.Popen(
                        [_interpreter(), "-I", "-S", "-c", _BOOTSTRAP, str(theirs.fileno()), str(alive)],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=None if _is_open(2) else subprocess.DEVNULL,
                        pass_fds=(theirs.fileno(), alive),
                        # Ctrl-C at the program's terminal is the program's to handle.
                        start_new_session=True,
                        cwd="/",
                        # A service manager waits for the program's own word.
                        env={name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)},
                    )
                finally:
                    os.close(alive)
            self._ended = _pidfd_of(self._process)
        except BaseException:
            self._channel.close()
            raise

    @property
    def mountpoint(self) -> str:
        """Where it serves, an absolute path without symlinks."""
        assert self._mount is not None
        return self._mount.mountpoint

    def end(self) -> int:
        """Unmount and end the server. When this returns, the mount is not there any more.

        In a fork of the program nothing is ended.

        Returns:
            0 after a clean end.

        Raises:
            LlloopError: what the server left behind could not be detached.
        """
        if os.getpid() != self._owner:
            return 0
        with suppress(OSError):  # the other end is gone
            # Not close(2): forks of the program have the socket, too.
            self._channel.shutdown(socket.SHUT_WR)
            # Somebody may have stopped it, and then it would never end.
            signal.pidfd_send_signal(self._ended, signal.SIGCONT)
        if not syscalls.is_readable(self._ended, TIMEOUT):
            # A second request: it no longer waits for what is still to be written back.
            signal.pidfd_send_signal(self._ended, signal.SIGTERM)
        returned = self._process.wait()
        told = self._hear()
        if "ended" not in told:
            self._wait_for_others()
        self._channel.close()
        os.close(self._ended)
        if self._mount is not None:
            try:
                self._mount.unmount(lazy=True)
            except OSError as error:
                raise LlloopError(f"mount point {self.mountpoint}: it cannot be detached: {error}") from None
        code: int = told.get("ended", returned or 1)
        return code

    def _wait_for_others(self) -> None:
        """Wait for the processes of a server that was killed: one of them detaches the mount."""
        deadline = time.monotonic() + _AFTERMATH
        with suppress(OSError):
            while syscalls.is_readable(self._channel.fileno(), max(0.0, deadline - time.monotonic())):
                if not self._channel.recv(4096):  # the last of them has let go of it
                    return

    def _tell(self, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # it has ended, and `_hear` finds out why
            self._channel.sendall(_line(message))

    def _hear(self) -> dict[str, Any]:
        """Return the next message, an empty one if the server has ended without."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._ended, select.POLLIN)
        while b"\n" not in self._heard:
            # A fork made while the socket was made may have the other end as well, and keep it open.
            if self._channel.fileno() not in [fd for fd, _ in poll.poll()]:
                return {}
            try:
                data = self._channel.recv(65536)
            except OSError:
                return {}
            if not data:
                return {}
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        return told

    def _failure(self, told: Mapping[str, Any]) -> LlloopError:
        if "failed" in told:
            return errors.of_code(told["code"], told["failed"])
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return LlloopError(f"the server {how} before the mount was ready")


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _interpreter() -> str:
    """Return the Python interpreter that this program runs on.

    Raises:
        HostError: none is known.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [sys.executable] if os.path.basename(sys.executable or "").startswith("python") else []
    # A program that embeds Python has its own name there.
    candidates += [f"{prefix}/bin/python{version}" for prefix in (sys.prefix, sys.base_prefix)]
    for candidate in candidates:
        if os.path.isabs(candidate) and os.access(candidate, os.X_OK):
            return candidate
    raise HostError(f"no Python interpreter to start the server with: {' and '.join(candidates)} do not exist")


def _module_files() -> dict[str, tuple[str, list[str] | None]]:
    """Return where the modules that a server needs lie: of each its file, and the directories of a package."""
    found = {}
    for name in _MODULES:
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None) or importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise HostError(f"the server cannot be started: the file of the module {name} is unknown")
        places = spec.submodule_search_locations
        found[name] = os.path.abspath(spec.origin), None if places is None else [os.path.abspath(one) for one in places]
    return found


def _plain(config: ServeConfig) -> dict[str, Any]:
    """Return the fields of *config* as values that JSON has."""
    values = {one.name: getattr(config, one.name) for one in fields(config)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def _above_standard_descriptors(end: socket.socket) -> socket.socket:
    return socket.socket(fileno=_above(end.detach()))


def _above(fd: int) -> int:
    """Return *fd* or a duplicate: not 0, 1 or 2, which a program may have closed, and which the server needs."""
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _pidfd_of(process: subprocess.Popen[bytes]) -> int:
    """Return a pidfd of *process*; of one that has ended and was reaped already (SIGCHLD ignored), one as readable.

    Raises:
        OSError: there can be none. The process, which serves nothing yet, was ended.
    """
    try:
        try:
            return os.pidfd_open(process.pid)
        except ProcessLookupError:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            os.close(writer)
            return reader
    except OSError:
        process.kill()
        process.wait()
        raise


# ---- In the server


def serve(channel: socket.socket, told: dict[str, Any]) -> None:
    """Be the server; does not return.

    Args:
        channel: the socket to the program.
        told: its message.
    """
    from llloop.logging import setup as log
    from llloop.supervisor import supervisor
    from llloop.supervisor.process_state import keep_ended_children
    from llloop.supervisor.supervisor import Supervisor

    def tell(**message: Any) -> None:
        with suppress(OSError):  # the program has ended, which the supervisor sees
            channel.sendall(_line(message))

    def on_ready(served: Supervisor) -> None:
        mount = served.mount
        tell(
            ready=served.description,
            source=served.source,
            mountpoint=mount.mountpoint,
            device=mount.device,
            mount_id=mount.mount_id,
            unique_mount_id=mount.unique_id,
        )

    keep_ended_children()
    channel.set_inheritable(False)
    try:
        log.configure(told["log_level"], None)
        # Forks of the program keep the socket open, so its end is watched, too.
        lifelines = (channel.fileno(), int(sys.argv[2]))
        code = supervisor.serve(ServeConfig(**told["config"]), on_ready, lifelines=lifelines)
    except LlloopError as error:
        tell(failed=str(error), code=error.exit_code)
        sys.exit(error.exit_code)
    tell(ended=code)
    sys.exit(code)
