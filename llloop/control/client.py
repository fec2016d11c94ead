"""Asking a running mount, through its control socket."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

from llloop.control import protocol, validation
from llloop.control.protocol import HEADER, MAX_REPLY, BadMessage
from llloop.control.validation import Unfit
from llloop.errors import LlloopError
from llloop.linux import mounts
from llloop.linux.mounts import MountEntry

# How long to wait for an answer, in seconds: the supervisor does nothing that takes long.
PATIENCE = 5.0
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class NotReachable(LlloopError):
    """Nobody answers at a control socket. Exit code 1."""


def ask(path: str, command: str, *, owner: int | None = None, deadline: float | None = None, **arguments: Any) -> Any:
    """Send a request to the socket at *path* and return the result.

    Args:
        path: the socket.
        command: the name of the command.
        owner: who may answer besides root and this user.
        deadline: until when to wait (monotonic clock); default: `PATIENCE` seconds.
        **arguments: its arguments.

    Raises:
        NotReachable: nobody answers there, not for this user, or with something else than an answer.
        LlloopError: the server's own error.
    """
    if deadline is None:
        deadline = time.monotonic() + PATIENCE
    patience = max(0.0, deadline - time.monotonic())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(patience + 0.001)
            connection.connect(path)
            _check_peer(connection, {0, os.geteuid()} if owner is None else {owner})
            connection.sendall(protocol.encode({"command": command, **arguments}))
            (length,) = HEADER.unpack(_receive(connection, HEADER.size, deadline))
            if length > MAX_REPLY:
                raise BadMessage(f"a reply of {length} bytes")
            reply = protocol.decode(_receive(connection, length, deadline))
        if "error" in reply:
            raise LlloopError(validation.fitting(reply["error"], str, "the error"))
        result = reply.get("result")
        return validation.fitting(result, validation.SHAPES[command]) if command in validation.SHAPES else result
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotReachable("its server is gone") from None
    except PermissionError:
        raise NotReachable("it is another user's, who alone may ask it, besides root") from None
    except TimeoutError:
        raise NotReachable(f"its server has not answered within {patience:.2g} seconds") from None
    except Unfit as error:
        raise NotReachable(f"its server is of another version, or none of llloop's: {error}") from None
    except (OSError, BadMessage) as error:
        raise NotReachable(f"its server does not answer properly: {error}") from None


def _check_peer(connection: socket.socket, users: set[int]) -> None:
    """Believe nobody but *users*."""
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid not in users:
        raise BadMessage(f"it is run by user {uid}")


def _receive(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < length:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise BadMessage("it ended in the middle")
        data += part
    return bytes(data)


def find(entry: MountEntry) -> Iterator[tuple[str, int | None]]:
    """Yield where the control socket of a mount may be, and who may answer there besides root and this user."""
    places: list[tuple[str, int | None]] = [(directory, None) for directory in protocol.all_directories()]
    if os.geteuid() == 0 and entry.owner is not None and entry.owner[0] != 0:
        # Its server may say what it likes of this one mount, which is its own, and of no other.
        places += [(directory, entry.owner[0]) for directory in protocol.directories_of(entry.owner[0])]
    found = [
        (path, owner)
        for directory, owner in places
        for path in protocol.sockets_in(directory)
        if protocol.belongs_to(path, entry.device)
    ]
    # A server that was killed leaves its socket, and the kernel gives the device number again. So the socket of this
    # very place comes first; the others are for a mount that has been moved.
    name = protocol.socket_name(entry.mountpoint, entry.device)
    yield from sorted(found, key=lambda one: os.path.basename(one[0]) != name)


def ask_entry(entry: MountEntry, command: str, *, deadline: float | None = None, **arguments: Any) -> Any:
    """As `ask`, of a mount.

    Raises:
        LlloopError: it does not answer, or answers with an error.
    """
    problem: LlloopError | None = None
    for path, owner in find(entry):
        try:
            found = ask(path, command, owner=owner, deadline=deadline, **arguments)
        except LlloopError as error:
            # The first is the most likely one; the others may have been left by servers that are gone.
            problem = problem or error
            continue
        # Whatever it says, this is the mount that was asked for.
        return (
            {**found, "mountpoint": entry.mountpoint} if "mountpoint" in validation.SHAPES.get(command, ()) else found
        )
    raise problem or NotReachable("it has no control socket here; its server is gone, or another user's")


def ask_mount(mountpoint: str, command: str, **arguments: Any) -> Any:
    """As `ask`, of the mount at *mountpoint*.

    Raises:
        MountpointError: no llloop mount is there.
        LlloopError: it does not answer, or answers with an error.
    """
    entry = mounts.find_llloop(mounts.resolve_mountpoint(mountpoint), mountpoint)
    try:
        return ask_entry(entry, command, **arguments)
    except LlloopError as error:
        raise type(error)(f"{mountpoint}: {error}") from None
