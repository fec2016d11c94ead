"""The server of a mount's control socket. It never waits for clients.

A client that sends an invalid message gets an error and is disconnected. A slow client is disconnected after `TIMEOUT`
seconds. If there are more than `MAX_CLIENTS`, the oldest one is disconnected that does not read a stream.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from llloop.control import protocol
from llloop.control.protocol import HEADER, MAX_REQUEST, BadMessage
from llloop.errors import LlloopError
from llloop.linux.mount_identity import MountIdentity
from llloop.supervisor.event_loop import EventLoop

_log = logging.getLogger(__name__)

# Takes the request and returns the reply's result, which may be a Stream; an LlloopError becomes the reply's error.
Command = Callable[[dict[str, Any]], Any]


class Stream(NamedTuple):
    """A result that comes with a descriptor (unix(7), SCM_RIGHTS), and a connection that stays open.

    Attributes:
        result: the result.
        descriptor: the descriptor.
        ended: called when the client has closed the connection or is disconnected.
    """

    result: Any
    descriptor: int
    ended: Callable[[], None]


# How long a client may take to send a request or to read the reply, in seconds.
TIMEOUT = 5.0
MAX_CLIENTS = 16
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class _Client:
    """One connection, with the received and the unsent data."""

    def __init__(self, server: ControlServer, loop: EventLoop, connection: socket.socket) -> None:
        self._server = server
        self._loop = loop
        self._connection = connection
        self._received = bytearray()
        self._unsent = memoryview(b"")
        self._begun = False
        self._last = False
        self.stream: Stream | None = None
        self._deadline = loop.deadline(self.drop)
        self._deadline.set_in(TIMEOUT)
        loop.watch(connection.fileno(), self._ready)

    def _ready(self) -> None:
        try:
            if self._unsent:
                self._send()
            elif self.stream is not None:  # the client has closed the connection
                self.drop()
            else:
                self._receive()
        except BlockingIOError:
            pass
        except OSError:  # the client has closed the connection
            self.drop()

    def _receive(self) -> None:
        wanted = HEADER.size
        if len(self._received) >= HEADER.size:
            wanted += HEADER.unpack_from(self._received)[0]
        data = self._connection.recv(wanted - len(self._received))
        if not data:
            self.drop()
            return
        self._received += data
        if len(self._received) < HEADER.size:
            return
        (length,) = HEADER.unpack_from(self._received)
        if length > MAX_REQUEST:
            problem = f"a request of {length} bytes is too long; at most {MAX_REQUEST}"
            self._answer({"error": problem}, last=True)
        elif len(self._received) == HEADER.size + length:
            body = bytes(self._received[HEADER.size :])
            self._received.clear()
            try:
                message = protocol.decode(body)
            except BadMessage as error:
                self._answer({"error": str(error)}, last=True)
            else:
                reply = self._server.reply(message)
                result = reply.get("result")
                if isinstance(result, Stream):
                    self.stream = result
                    reply = {"result": result.result}
                self._answer(reply)

    def _answer(self, message: dict[str, Any], last: bool = False) -> None:
        self._unsent = memoryview(protocol.encode(message))
        self._begun = False
        self._last = last
        self._deadline.set_in(TIMEOUT)
        # Watch before the first attempt, which may raise BlockingIOError.
        self._loop.watch(self._connection.fileno(), self._ready, writing=True)
        self._send()

    def _send(self) -> None:
        fds = [] if self.stream is None or self._begun else [self.stream.descriptor]
        self._unsent = self._unsent[socket.send_fds(self._connection, [self._unsent], fds, socket.MSG_NOSIGNAL) :]
        self._begun = True
        if self._unsent:
            return
        if self.stream is not None:
            self._deadline.cancel()
        if self._last:
            self.drop()
        else:
            self._loop.watch(self._connection.fileno(), self._ready)

    def drop(self) -> None:
        """Close the connection."""
        self._deadline.cancel()
        self._loop.forget(self._connection.fileno())
        with suppress(OSError):
            # close(2) alone does not suffice: a child that was forked meanwhile has a copy, and the client would wait.
            self._connection.shutdown(socket.SHUT_RDWR)
        self.abandon()
        self._server.dropped(self)
        if self.stream is not None:
            self.stream.ended()

    def abandon(self) -> None:
        """Close this process's copy of the connection, in a forked child."""
        self._connection.close()


class ControlServer:
    """The socket and its clients.

    Args:
        loop: the supervisor's event loop.
        path: the path of the socket; an existing file is replaced.
        commands: the commands by name.

    Raises:
        OSError: the socket cannot be created.
    """

    def __init__(self, loop: EventLoop, path: str, commands: Mapping[str, Command]) -> None:
        self.path = path
        self._commands = commands
        self._loop = loop
        self._clients: dict[_Client, None] = {}  # the one that came first is the first
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        # Bind it with a temporary name first, so that the server already listens when the final name appears.
        temporary = os.path.join(os.path.dirname(path), f".{os.getpid()}-{os.path.basename(path)}")
        try:
            os.fchmod(self._listener.fileno(), 0o600)  # the mode that bind(2) gives to the name (unix(7))
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            self._listener.bind(temporary)
            self._listener.listen(MAX_CLIENTS)
            os.rename(temporary, path)
            self._inode = os.lstat(path).st_ino
        except BaseException:
            self._listener.close()
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._retry = loop.deadline(self._listen)
        self._listen()
        _open.add(self)

    def _listen(self) -> None:
        self._retry.cancel()
        self._loop.watch(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._loop.forget(self._listener.fileno())  # otherwise the loop would report it continuously
                self._retry.set_in(TIMEOUT)
            return
        connection.setblocking(False)
        _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid not in (0, os.geteuid()):
            connection.close()
            return
        self._clients[_Client(self, self._loop, connection)] = None
        if len(self._clients) > MAX_CLIENTS:
            next((one for one in self._clients if one.stream is None), next(iter(self._clients))).drop()

    def dropped(self, client: _Client) -> None:
        """Note that a client is disconnected, so that a descriptor is free for another."""
        self._clients.pop(client, None)
        self._listen()

    def reply(self, message: dict[str, Any]) -> dict[str, Any]:
        """Run a client's command; return the reply."""
        name = message.get("command")
        command = self._commands.get(name) if isinstance(name, str) else None
        if command is None:
            known = ", ".join(sorted(self._commands))
            return {"error": f"unknown command {name!r:.80}; there are: {known}"}
        try:
            return {"result": command(message)}
        except LlloopError as error:
            return {"error": str(error)}
        except Exception:
            _log.exception("the control request %r failed", name)
            return {"error": f"{name} failed; the log of the mount has the details"}

    def close(self) -> None:
        """Disconnect all clients and close the socket; remove its name unless another server has replaced it."""
        _open.discard(self)
        for client in list(self._clients):
            client.drop()
        self._retry.cancel()
        self._loop.forget(self._listener.fileno())
        self._listener.close()
        self.remove()

    def remove(self) -> None:
        """Remove the socket's name unless another server has replaced it."""
        with suppress(OSError):
            if os.lstat(self.path).st_ino == self._inode:
                os.unlink(self.path)

    def abandon(self) -> None:
        """Close this process's copies of the sockets, in a forked child."""
        for client in self._clients:
            client.abandon()
        self._listener.close()


_open: weakref.WeakSet[ControlServer] = weakref.WeakSet()


def _abandon_all() -> None:
    for one in list(_open):
        one.abandon()
    _open.clear()


# A child that outlives the supervisor must not keep the socket open, because clients would wait for it.
os.register_at_fork(after_in_child=_abandon_all)


def open_for(mount: MountIdentity, loop: EventLoop, commands: Mapping[str, Command]) -> ControlServer | None:
    """Create the control socket of a mount. If that fails, log it and return None; the mount serves without it."""
    try:
        directory = protocol.make_directory()
        remove_stale(directory)
        name = protocol.socket_name(mount.mountpoint, mount.device)
        return ControlServer(loop, os.path.join(directory, name), commands)
    except OSError as error:
        _log.warning("llloop status, stats and control will not work: the control socket cannot be created: %s", error)
        return None


def remove_stale(directory: str) -> None:
    """Remove sockets in *directory* whose servers were killed."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name.endswith(protocol.SUFFIX) and not _is_being_made(name) and is_stale(path):
            with suppress(OSError):
                os.unlink(path)


def _is_being_made(name: str) -> bool:
    """Return whether *name* is the temporary name of a socket whose server is still running."""
    return name.startswith(".") and os.path.exists(f"/proc/{name[1:].split('-')[0]}")


def is_stale(path: str) -> bool:
    """Return whether no server listens at the socket *path*."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
