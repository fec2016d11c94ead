"""The control socket of a mount, from the server's side: it takes requests and never waits for who sends them.

All its descriptors are in one epoll(7) set, so that the supervisor has one descriptor to watch; `handle` does what
can be done at once. Clients that send nonsense get an error and are cut off; those that are slow are cut off after
`PATIENCE` seconds; of too many at a time, some wait in the kernel's queue.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from llloop.control import protocol
from llloop.control.protocol import HEADER, MAX_REQUEST, BadMessage
from llloop.errors import LlloopError

_log = logging.getLogger(__name__)

# Takes the request, returns what the reply's result is to be; LlloopError becomes its error.
Command = Callable[[dict[str, Any]], Any]

# How long a client may take to send a request or to take the reply, in seconds.
PATIENCE = 5.0
MAX_CLIENTS = 16
# At one call of `handle`, so that a flood of clients does not keep the supervisor from its children.
_EVENTS = 32
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class _Client:
    """One connection: what has come, what is still to go, and until when it may take."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = bytearray()
        self.unsent = memoryview(b"")
        self.closing = False
        self.deadline = time.monotonic() + PATIENCE


class Control:
    """The socket.

    Args:
        path: where it is to be; whatever is there is replaced.
        commands: what can be asked for.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: str, commands: Mapping[str, Command]) -> None:
        self.path = path
        self._commands = commands
        self._clients: dict[int, _Client] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        # Bound under another name first: who finds the name that counts finds somebody who listens.
        beginning = os.path.join(os.path.dirname(path), f".{os.getpid()}-{os.path.basename(path)}")
        try:
            os.fchmod(self._listener.fileno(), 0o600)  # the mode that bind(2) gives to the name (unix(7))
            with suppress(FileNotFoundError):
                os.unlink(beginning)
            self._listener.bind(beginning)
            self._listener.listen(MAX_CLIENTS)
            os.rename(beginning, path)
            self._inode = os.lstat(path).st_ino
        except BaseException:
            self._listener.close()
            with suppress(OSError):
                os.unlink(beginning)
            raise
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._listening = True
        self._retry: float | None = None
        _open.add(self)

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is something for `handle` to do."""
        return self._epoll.fileno()

    def due(self) -> float | None:
        """Return when `handle` must be called at the latest (monotonic clock), or None."""
        times = [client.deadline for client in self._clients.values()]
        if self._retry is not None:
            times.append(self._retry)
        return min(times, default=None)

    def handle(self) -> None:
        """Do what can be done without waiting."""
        for fd, _ in self._epoll.poll(0, _EVENTS):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._clients:
                client = self._clients[fd]
                try:
                    self._serve(client)
                except OSError:
                    self._drop(client)  # it has gone
        now = time.monotonic()
        for client in list(self._clients.values()):
            if client.deadline <= now:
                self._drop(client)
        if self._retry is not None and self._retry <= now:
            self._listen(True)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._listen(False)  # else epoll would report it again and again
                self._retry = time.monotonic() + PATIENCE
            return
        connection.setblocking(False)
        _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid not in (0, os.geteuid()):
            connection.close()
            return
        client = _Client(connection)
        self._clients[connection.fileno()] = client
        self._epoll.register(connection, select.EPOLLIN)
        if len(self._clients) >= MAX_CLIENTS:
            self._listen(False)

    def _listen(self, wanted: bool) -> None:
        if wanted != self._listening:
            self._epoll.modify(self._listener, select.EPOLLIN if wanted else 0)
            self._listening = wanted
            self._retry = None

    def _serve(self, client: _Client) -> None:
        if client.unsent:
            self._send(client)
            return
        wanted = HEADER.size
        if len(client.received) >= HEADER.size:
            (length,) = HEADER.unpack_from(client.received)
            wanted += length
        try:
            data = client.connection.recv(wanted - len(client.received))
        except BlockingIOError:
            return
        if not data:
            self._drop(client)
            return
        client.received += data
        if len(client.received) < HEADER.size:
            return
        (length,) = HEADER.unpack_from(client.received)
        if length > MAX_REQUEST:
            problem = f"a request of {length} bytes is too long; at most {MAX_REQUEST}"
            self._answer(client, {"error": problem}, last=True)
        elif len(client.received) == HEADER.size + length:
            body = bytes(client.received[HEADER.size :])
            client.received.clear()
            self._request(client, body)

    def _request(self, client: _Client, body: bytes) -> None:
        try:
            message = protocol.decode(body)
        except BadMessage as error:
            self._answer(client, {"error": str(error)}, last=True)
            return
        name = message.get("command")
        command = self._commands.get(name) if isinstance(name, str) else None
        if command is None:
            known = ", ".join(sorted(self._commands))
            self._answer(client, {"error": f"unknown command {name!r:.80}; there are: {known}"})
            return
        try:
            reply = {"result": command(message)}
        except LlloopError as error:
            reply = {"error": str(error)}
        except Exception:
            _log.exception("the control request %r failed", name)
            reply = {"error": f"{name} failed; the log of the mount has the details"}
        self._answer(client, reply)

    def _answer(self, client: _Client, message: dict[str, Any], last: bool = False) -> None:
        client.unsent = memoryview(protocol.encode(message))
        client.closing = last
        client.deadline = time.monotonic() + PATIENCE
        self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            sent = client.connection.send(client.unsent, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        client.unsent = client.unsent[sent:]
        if client.unsent:
            self._epoll.modify(client.connection, select.EPOLLOUT)
        elif client.closing:
            self._drop(client)
        else:
            self._epoll.modify(client.connection, select.EPOLLIN)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.connection.fileno()]
        self._epoll.unregister(client.connection)
        with suppress(OSError):
            # Not close(2) alone: a child forked meanwhile has the connection too, and the client would go on waiting.
            client.connection.shutdown(socket.SHUT_RDWR)
        client.connection.close()
        self._listen(True)

    def close(self) -> None:
        """Take the socket away, unless another server has taken its place."""
        _open.discard(self)
        for client in list(self._clients.values()):
            self._drop(client)
        self._epoll.close()
        self._listener.close()
        self.remove()

    def remove(self) -> None:
        """Remove the socket's name, unless another server has taken its place."""
        with suppress(OSError):
            if os.lstat(self.path).st_ino == self._inode:
                os.unlink(self.path)

    def abandon(self) -> None:
        """Let go of the socket in a forked child, whose parent goes on with it."""
        for client in self._clients.values():
            client.connection.close()
        self._clients.clear()
        self._epoll.close()
        self._listener.close()


_open: weakref.WeakSet[Control] = weakref.WeakSet()


def _abandon_all() -> None:
    for one in list(_open):
        one.abandon()
    _open.clear()


# A child that outlives the supervisor must not look like one who listens.
os.register_at_fork(after_in_child=_abandon_all)


def remove_stale(directory: str) -> None:
    """Remove sockets in *directory* to which nobody listens any more: their servers were killed."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        if name.endswith(protocol.SUFFIX) and not _is_being_made(name) and is_stale(path):
            with suppress(OSError):
                os.unlink(path)


def _is_being_made(name: str) -> bool:
    """Whether a server that lives has yet to listen there, and to give the socket its name."""
    return name.startswith(".") and os.path.exists(f"/proc/{name[1:].split('-')[0]}")


def is_stale(path: str) -> bool:
    """Whether nobody listens to the socket at *path*."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
