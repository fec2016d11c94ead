"""The server process of `llloop.mount`, and the messages between it and the program.

The server runs an isolated interpreter (python -I -S). So neither the working directory, nor the environment, nor
start-up files influence which code it runs. It imports the same files as the program.

Both exchange lines of JSON over a socket. The program sends the configuration; when it shuts down the socket, the mount
must end. The server sends that it is ready, or why it failed, and at the end its exit code.
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

# How long unmounting may take, in seconds. Then the server ends without waiting for data to be written back.
TIMEOUT = 30.0
# How long to wait until the descriptor keeper of a killed server has detached the mount, in seconds.
_DETACH_TIMEOUT = 5.0
_NOT_INHERITED = ("LLLOOP_", "NOTIFY_SOCKET", "WATCHDOG_")

# The modules that a server imports, apart from the standard library.
_MODULES = ("llloop", "llloop.workers", "llfuse", "msgpack", "multiprocessing_logging", "setproctitle")
_BOOTSTRAP = """
import importlib.util, json, socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
line = channel.makefile("rb").readline()
if not line:
    sys.exit(1)
told = json.loads(line)
class ProgramModules:
    @staticmethod
    def find_spec(name, path=None, target=None):
        file, places = told["modules"].get(name, (None, None))
        return file and importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)
sys.meta_path.insert(0, ProgramModules)
from llloop.server_process import serve
serve(channel, told)
"""


class ServerProcess:
    """A server process. The constructor starts it and waits until the mount is ready.

    Args:
        config: the mount's options, with absolute paths.
        log_level: the minimum level of messages on standard error.

    Attributes:
        pid: the process id of the server.
        description: the line that `llloop serve` would print.

    Raises:
        LlloopError: the server could not be started, or mounting failed. Nothing remains then.
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
        self._received = b""
        try:
            self._send({"modules": _module_files(), "config": _plain(config), "log_level": log_level})
            told = self._receive()
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
        """Start the process, which waits for its configuration.

        Raises:
            OSError: there are no free descriptors or processes. Nothing remains then.
            HostError: there is no Python interpreter.
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
                        # The program handles Ctrl-C in its terminal.
                        start_new_session=True,
                        cwd="/",
                        # Without NOTIFY_SOCKET: the program itself notifies the service manager.
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
        """The mount point as an absolute path without symlinks."""
        assert self._mount is not None
        return self._mount.mountpoint

    def end(self) -> int:
        """Unmount and end the server. On return, the mount does not exist any more.

        In a forked child of the program, this does nothing.

        Returns:
            0 after a clean end, else the server's exit code.

        Raises:
            LlloopError: the server left a mount that could not be detached.
        """
        if os.getpid() != self._owner:
            return 0
        with suppress(OSError):  # the other end is gone
            # Not close(2), because forked children of the program have copies of the socket.
            self._channel.shutdown(socket.SHUT_WR)
            # If it was stopped by a signal, it would never end.
            signal.pidfd_send_signal(self._ended, signal.SIGCONT)
        if not syscalls.is_readable(self._ended, TIMEOUT):
            # A second request to stop: the server does not wait for writeback any more.
            signal.pidfd_send_signal(self._ended, signal.SIGTERM)
        returned = self._process.wait()
        told = self._receive()
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
        """Wait for the other processes of a killed server: the descriptor keeper detaches the mount."""
        deadline = time.monotonic() + _DETACH_TIMEOUT
        with suppress(OSError):
            while syscalls.is_readable(self._channel.fileno(), max(0.0, deadline - time.monotonic())):
                if not self._channel.recv(4096):  # the last process has closed its copy of the socket
                    return

    def _send(self, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # the server has ended; `_receive` reports why
            self._channel.sendall(_line(message))

    def _receive(self) -> dict[str, Any]:
        """Return the server's next message, or an empty one if the server has ended."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._ended, select.POLLIN)
        while b"\n" not in self._received:
            # A child that was forked meanwhile may have a copy of the other end, so the socket alone does not suffice.
            if self._channel.fileno() not in [fd for fd, _ in poll.poll()]:
                return {}
            try:
                data = self._channel.recv(65536)
            except OSError:
                return {}
            if not data:
                return {}
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
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
    """Return the path of the Python interpreter of this program.

    Raises:
        HostError: there is none.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [sys.executable] if os.path.basename(sys.executable or "").startswith("python") else []
    # In a program that embeds Python, sys.executable is the program.
    candidates += [f"{prefix}/bin/python{version}" for prefix in (sys.prefix, sys.base_prefix)]
    for candidate in candidates:
        if os.path.isabs(candidate) and os.access(candidate, os.X_OK):
            return candidate
    raise HostError(f"no Python interpreter to start the server with: {' and '.join(candidates)} do not exist")


def _module_files() -> dict[str, tuple[str, list[str] | None]]:
    """Return for each module of `_MODULES` its file, and the directories of a package."""
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
    """Return the fields of *config* as JSON values."""
    values = {one.name: getattr(config, one.name) for one in fields(config)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def _above_standard_descriptors(end: socket.socket) -> socket.socket:
    return socket.socket(fileno=_above(end.detach()))


def _above(fd: int) -> int:
    """Return *fd* or a duplicate above 2. A program may have closed 0 to 2, which the server needs itself."""
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
    """Return a pidfd of *process*, or another readable descriptor if it has ended and was reaped (SIGCHLD ignored).

    Raises:
        OSError: there are no free descriptors. The process, which serves nothing yet, is ended.
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
    """Run as the server process; do not return.

    Args:
        channel: the socket to the program.
        told: the program's message with the configuration.
    """
    from llloop.logging import setup as log
    from llloop.supervisor import supervisor
    from llloop.supervisor.process_state import keep_ended_children
    from llloop.supervisor.supervisor import Supervisor

    def tell(**message: Any) -> None:
        with suppress(OSError):  # the program has ended, and the supervisor notices that
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
        # Forked children of the program keep the socket open, so watch the program's pidfd, too.
        lifelines = (channel.fileno(), int(sys.argv[2]))
        code = supervisor.serve(ServeConfig(**told["config"]), on_ready, lifelines=lifelines)
    except LlloopError as error:
        tell(failed=str(error), code=error.exit_code)
        sys.exit(error.exit_code)
    tell(ended=code)
    sys.exit(code)
