"""Asking a running mount, through its control socket."""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import Any

from . import mounting, sockets
from .errors import LlloopError, MountpointError
from .sockets import HEADER, MAX_REPLY, BadMessage

# How long to wait for an answer, in seconds: the supervisor does nothing that takes long.
PATIENCE = 5.0
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class NotReachable(LlloopError):
    """Nobody answers at a control socket. Exit code 1."""


def ask(path: str, command: str, **arguments: Any) -> Any:
    """Send a request to the socket at *path* and return the result.

    Args:
        path: the socket.
        command: the name of the command.
        **arguments: its arguments.

    Raises:
        NotReachable: nobody answers there, or not for this user.
        LlloopError: the server's own error.
    """
    deadline = time.monotonic() + PATIENCE
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(path)
            _check_peer(connection)
            connection.sendall(sockets.encode({"command": command, **arguments}))
            (length,) = HEADER.unpack(_receive(connection, HEADER.size, deadline))
            if length > MAX_REPLY:
                raise BadMessage(f"a reply of {length} bytes")
            reply = sockets.decode(_receive(connection, length, deadline))
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotReachable("its server is gone") from None
    except PermissionError:
        raise NotReachable("it is another user's, who alone may ask it, besides root") from None
    except TimeoutError:
        raise NotReachable(f"its server has not answered within {PATIENCE:g} seconds") from None
    except (OSError, BadMessage) as error:
        raise NotReachable(f"its server does not answer properly: {error}") from None
    if "error" in reply:
        raise LlloopError(str(reply["error"]))
    return reply.get("result")


def _check_peer(connection: socket.socket) -> None:
    """Refuse to believe an ordinary user who is not this one."""
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if os.geteuid() != 0 and uid not in (0, os.geteuid()):
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


def find(mountpoint: str) -> str:
    """Return the path of the control socket of the llloop mount at *mountpoint*.

    Raises:
        MountpointError: no llloop mount is there.
        NotReachable: it has no socket that this user can see.
    """
    path = mounting.resolve_mountpoint(mountpoint)
    entry = mounting.find_llloop(path, mountpoint)
    name = sockets.socket_name(path, entry.device)
    for directory in sockets.all_directories():
        candidate = os.path.join(directory, name)
        if os.path.lexists(candidate):
            return candidate
    raise NotReachable(f"{mountpoint}: it has no control socket here; its server is gone, or another user's")


def ask_mount(mountpoint: str, command: str, **arguments: Any) -> Any:
    """As `ask`, of the mount at *mountpoint*.

    Raises:
        MountpointError: no llloop mount is there.
        LlloopError: it does not answer, or answers with an error.
    """
    path = find(mountpoint)
    try:
        return ask(path, command, **arguments)
    except MountpointError:
        raise
    except LlloopError as error:
        raise type(error)(f"{mountpoint}: {error}") from None
