"""The path of a mount's control socket, and the encoding of its messages; used by client and server.

A message is its length in four bytes (big-endian), followed by a msgpack map. A request has a ``command`` and the
command's arguments. A reply has either a ``result`` or an ``error``, which is an error message.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack

from llloop.linux.trusted_files import is_trusted_directory

SUFFIX = ".sock"
HEADER = struct.Struct("!I")
# In bytes. The largest reply lists every operation of every worker.
MAX_REQUEST = 4096
MAX_REPLY = 1 << 20

ROOT_DIRECTORY = "/run/llloop"
TMP = "/tmp"


class BadMessage(Exception):
    """The received data is not a valid message; the text says why."""


def own_directories() -> list[str]:
    """Return the directories where this user's sockets may be, the preferred one first.

    Some may not exist, or belong to another user.
    """
    uid = os.geteuid()
    found = [ROOT_DIRECTORY] if uid == 0 else []
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        found.append(os.path.join(runtime, "llloop"))
    found.append(f"/run/user/{uid}/llloop")
    return found + shared_directories(uid)


def shared_directories(uid: int) -> list[str]:
    """Return the directories in /tmp for a user without a login session (su, cron), who has no runtime directory.

    Users with the same id in different user namespaces share /tmp. The first gets the short name, others a longer one.
    """
    first = os.path.join(TMP, f"llloop-{uid}")
    return [first, *(str(path) for path in sorted(Path(TMP).glob(f"llloop-{uid}-*")))]


def all_directories() -> list[str]:
    """Return the existing socket directories that this user trusts: its own and root's."""
    found = own_directories()
    if os.geteuid() != 0:
        found.append(ROOT_DIRECTORY)
    return [path for path in dict.fromkeys(found) if _owner(path) in (0, os.geteuid()) and is_trusted_directory(path)]


def directories_of_user(uid: int) -> list[str]:
    """Return the existing socket directories of another user.

    For root, which must not trust their content, but must check which user answers at a socket.
    """
    return [path for path in (f"/run/user/{uid}/llloop", *shared_directories(uid)) if _owner(path) == uid]


def _owner(directory: str) -> int | None:
    try:
        kind = os.lstat(directory)
    except OSError:
        return None
    return kind.st_uid if stat.S_ISDIR(kind.st_mode) else None


def make_directory() -> str:
    """Return a directory for this user's sockets; create it if necessary.

    Raises:
        OSError: no directory can be created.
    """
    problem: OSError | None = None
    for path in own_directories():
        try:
            if is_trusted_directory(os.path.dirname(path), sticky=True):
                os.mkdir(path, 0o700)
                os.chmod(path, 0o755 if path == ROOT_DIRECTORY else 0o700)  # whatever the umask is
        except FileExistsError:
            pass
        except OSError as error:
            problem = problem or error
            continue
        own = _owner(path) == os.geteuid() and is_trusted_directory(path)
        if own and os.access(path, os.W_OK | os.X_OK):
            return path
    try:
        return tempfile.mkdtemp(prefix=f"llloop-{os.geteuid()}-", dir=TMP)
    except OSError as error:
        raise problem or error from None


def socket_name(mountpoint: str, device: tuple[int, int]) -> str:
    """Return the file name of a mount's socket.

    Args:
        mountpoint: an absolute path without symlinks.
        device: the mount's major and minor number. They distinguish it from a mount that was detached from the same
            path and is still in use.
    """
    digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]
    return f"{digest}-{device[0]}-{device[1]}{SUFFIX}"


def sockets() -> Iterator[str]:
    """Yield the paths of all sockets in directories that this user trusts."""
    for directory in all_directories():
        yield from sockets_in(directory)


def sockets_in(directory: str) -> Iterator[str]:
    """Yield the paths of all sockets in *directory*."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return
    # A name with a leading dot is a socket that is being created: its server does not answer yet.
    shown = (name for name in names if name.endswith(SUFFIX) and not name.startswith("."))
    yield from (os.path.join(directory, name) for name in shown)


def has_device(path: str, device: tuple[int, int]) -> bool:
    """Return whether a socket's name contains this device number, whatever mount point it was made for."""
    return path.endswith(f"-{device[0]}-{device[1]}{SUFFIX}")


def encode(message: dict[str, Any]) -> bytes:
    """Return *message* encoded, with its length. Names that are not UTF-8 keep their bytes."""
    body: bytes = msgpack.packb(message, unicode_errors="surrogateescape")
    return HEADER.pack(len(body)) + body


def decode(body: bytes | bytearray) -> dict[str, Any]:
    """Return the message in *body*, the data after the length.

    Raises:
        BadMessage: it is not a valid message.
    """
    try:
        message = msgpack.unpackb(body, unicode_errors="surrogateescape")
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BadMessage(f"not a msgpack message: {error or type(error).__name__}") from None
    except TypeError:  # a map whose key is a map
        raise BadMessage("not a map of names") from None
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise BadMessage("not a map of names")
    return message
