"""The client of a mount's control socket."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

from llloop.control import protocol, validation
from llloop.control.protocol import HEADER, MAX_REPLY, BadMessage
from llloop.control.validation import ShapeMismatch
from llloop.errors import LlloopError
from llloop.linux import mounts
from llloop.linux.mounts import MountEntry

# How long to wait for an answer, in seconds. The supervisor answers quickly unless it hangs.
TIMEOUT = 5.0
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class NotReachable(LlloopError):
    """A server does not answer at its control socket. Exit code 1."""


def ask(path: str, command: str, *, owner: int | None = None, deadline: float | None = None, **arguments: Any) -> Any:
    """Send a command to a control socket and return its result.

    Args:
        path: the socket's path.
        command: the command's name.
        owner: id of the only user whose server may answer; default: root and this user.
        deadline: until when to wait (monotonic clock, seconds); default: `TIMEOUT` seconds from now.
        **arguments: the command's arguments.

    Raises:
        NotReachable: no server answers, it refuses this user, or its answer is invalid.
        LlloopError: the server answered with an error.
    """
    with open_stream(path, command, owner=owner, deadline=deadline, **arguments) as stream:
        return stream.result


class Stream:
    """A result, with the descriptors that came with it and the connection, which stays open until `close`.

    Attributes:
        result: the result.
        descriptors: the descriptors.
        connection: the connection; it becomes readable when the server has ended the stream.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.result: Any = None
        self.descriptors: list[int] = []
        self.connection = connection

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and the descriptors."""
        self.connection.close()
        while self.descriptors:
            os.close(self.descriptors.pop())


def open_stream(
    path: str, command: str, *, owner: int | None = None, deadline: float | None = None, **arguments: Any
) -> Stream:
    """Send a command to a control socket; return its result and the open connection; otherwise as `ask`."""
    if deadline is None:
        deadline = time.monotonic() + TIMEOUT
    timeout = max(0.0, deadline - time.monotonic())
    stream = Stream(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
    try:
        _exchange(stream, path, {"command": command, **arguments}, owner, deadline)
    except BaseException as error:
        stream.close()
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            raise NotReachable("its server is gone") from None
        if isinstance(error, PermissionError):
            raise NotReachable("it belongs to another user; only that user and root may ask its server") from None
        if isinstance(error, TimeoutError):
            raise NotReachable(f"its server has not answered within {timeout:.2g} seconds") from None
        if isinstance(error, ShapeMismatch):
            raise NotReachable(f"its server is another version of llloop, or not llloop: {error}") from None
        if isinstance(error, (OSError, BadMessage)):
            raise NotReachable(f"its server gave an invalid answer: {error}") from None
        raise
    return stream


def _exchange(stream: Stream, path: str, request: dict[str, Any], owner: int | None, deadline: float) -> None:
    """Send a request to the socket at *path*, and put what comes back into *stream*."""
    connection = stream.connection
    connection.settimeout(max(0.0, deadline - time.monotonic()) + 0.001)
    connection.connect(path)
    _check_peer(connection, {0, os.geteuid()} if owner is None else {owner})
    connection.sendall(protocol.encode(request))
    (length,) = HEADER.unpack(_receive(stream, HEADER.size, deadline))
    if length > MAX_REPLY:
        raise BadMessage(f"a reply of {length} bytes")
    reply = protocol.decode(_receive(stream, length, deadline))
    if "error" in reply:
        raise LlloopError(validation.validated(reply["error"], str, "the error"))
    shape = validation.SHAPES.get(request["command"])
    stream.result = reply.get("result") if shape is None else validation.validated(reply.get("result"), shape)


def _check_peer(connection: socket.socket, users: set[int]) -> None:
    """Check that the server runs as one of *users* (unix(7), SO_PEERCRED).

    Raises:
        BadMessage: it runs as another user.
    """
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid not in users:
        raise BadMessage(f"it runs as user {uid}")


def _receive(stream: Stream, length: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < length:
        stream.connection.settimeout(max(0.001, deadline - time.monotonic()))
        part, descriptors, *_ = socket.recv_fds(stream.connection, min(length - len(data), 1 << 20), 1)
        stream.descriptors += descriptors
        if not part:
            raise BadMessage("the answer is cut short")
        data += part
    return bytes(data)


def socket_candidates(entry: MountEntry) -> Iterator[tuple[str, int | None]]:
    """Yield each path where a mount's control socket may be, and the `owner` argument for `ask`."""
    places: list[tuple[str, int | None]] = [(directory, None) for directory in protocol.all_directories()]
    if os.geteuid() == 0 and entry.owner is not None and entry.owner[0] != 0:
        # The mount belongs to this user, so the user's server may answer for it, and for no other mount.
        places += [(directory, entry.owner[0]) for directory in protocol.directories_of_user(entry.owner[0])]
    found = [
        (path, owner)
        for directory, owner in places
        for path in protocol.sockets_in(directory)
        if protocol.has_device(path, entry.device)
    ]
    # A killed server leaves its socket behind, and the kernel reuses device numbers. So the socket with this mount
    # point in its name comes first. The others matter if the mount has been moved.
    name = protocol.socket_name(entry.mountpoint, entry.device)
    yield from sorted(found, key=lambda one: os.path.basename(one[0]) != name)


def ask_entry(entry: MountEntry, command: str, *, deadline: float | None = None, **arguments: Any) -> Any:
    """Send a command to the server of a mount, and return its result; arguments and errors as for `stream_of_entry`."""
    with stream_of_entry(entry, command, deadline=deadline, **arguments) as stream:
        return stream.result


def stream_of_entry(entry: MountEntry, command: str, *, deadline: float | None = None, **arguments: Any) -> Stream:
    """Send a command to the server of a mount; return its result and the open connection; arguments as for `ask`.

    All sockets that can be the mount's share the time until *deadline*: a user can make any number of them.

    Raises:
        LlloopError: the server does not answer, or answers with an error.
    """
    problem: LlloopError | None = None
    if deadline is None:
        deadline = time.monotonic() + TIMEOUT
    for path, owner in socket_candidates(entry):
        try:
            stream = open_stream(path, command, owner=owner, deadline=deadline, **arguments)
        except LlloopError as error:
            # Report the first error: the first socket is the most likely one, others may be left from dead servers.
            problem = problem or error
            continue
        if "mountpoint" in validation.SHAPES.get(command, ()):
            stream.result["mountpoint"] = entry.mountpoint  # do not trust the server's own statement
        return stream
    raise problem or NotReachable("it has no control socket; its server is gone, or belongs to another user")


def ask_mount(mountpoint: str, command: str, **arguments: Any) -> Any:
    """Send a command to the server of the mount at *mountpoint*, and return its result; otherwise as `stream_of`."""
    with stream_of(mountpoint, command, **arguments) as stream:
        return stream.result


def stream_of(mountpoint: str, command: str, **arguments: Any) -> Stream:
    """Send a command to the server of the mount at *mountpoint*; return its result and the open connection.

    Raises:
        MountpointError: there is no llloop mount.
        LlloopError: the server does not answer, or answers with an error.
    """
    entry = mounts.find_llloop(mounts.resolve_mountpoint(mountpoint), mountpoint)
    try:
        return stream_of_entry(entry, command, **arguments)
    except LlloopError as error:
        raise type(error)(f"{mountpoint}: {error}") from None
