"""Where a mount's control socket is, and how messages look on it: one place for both sides.

A message is a msgpack map after its length in four bytes, big end first. A request names a ``command`` and its
arguments; a reply has either a ``result`` or an ``error``, a text for people.
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
# In bytes. A request is a name and a few words; a reply lists every operation of every worker.
MAX_REQUEST = 4096
MAX_REPLY = 1 << 20

_ROOT_DIRECTORY = "/run/llloop"
_SHARED = "/tmp"


class BadMessage(Exception):
    """What came is no message; the text says why."""


def own_directories() -> list[str]:
    """Return where sockets of this user may be, the best place first; some are not there, or not to be trusted."""
    uid = os.geteuid()
    found = [_ROOT_DIRECTORY] if uid == 0 else []
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        found.append(os.path.join(runtime, "llloop"))
    found.append(f"/run/user/{uid}/llloop")
    return found + _shared_directories(uid)


def _shared_directories(uid: int) -> list[str]:
    """Return the places of users without a login session, for whom systemd makes no directory (su, cron).

    Several users may be called the same, each in a user namespace of his own; whoever comes late has a longer name.
    """
    first = os.path.join(_SHARED, f"llloop-{uid}")
    return [first, *(str(path) for path in sorted(Path(_SHARED).glob(f"llloop-{uid}-*")))]


def all_directories() -> list[str]:
    """Return the directories of sockets that this user trusts: its own and root's."""
    found = own_directories()
    if os.geteuid() != 0:
        found.append(_ROOT_DIRECTORY)
    return [path for path in dict.fromkeys(found) if _owner(path) in (0, os.geteuid()) and is_trusted_directory(path)]


def directories_of(uid: int) -> list[str]:
    """Return where the sockets of another user may be, for root, who is to trust nothing there but who answers."""
    return [path for path in (f"/run/user/{uid}/llloop", *_shared_directories(uid)) if _owner(path) == uid]


def _owner(directory: str) -> int | None:
    try:
        kind = os.lstat(directory)
    except OSError:
        return None
    return kind.st_uid if stat.S_ISDIR(kind.st_mode) else None


def make_directory() -> str:
    """Return a directory for this user's sockets, made if need be.

    Raises:
        OSError: there is no place where one can be made.
    """
    problem: OSError | None = None
    for path in own_directories():
        try:
            if is_trusted_directory(os.path.dirname(path), sticky=True):
                os.mkdir(path, 0o700)
                os.chmod(path, 0o755 if path == _ROOT_DIRECTORY else 0o700)  # whatever the umask is
        except FileExistsError:
            pass
        except OSError as error:
            problem = problem or error
            continue
        own = _owner(path) == os.geteuid() and is_trusted_directory(path)
        if own and os.access(path, os.W_OK | os.X_OK):
            return path
    try:
        return tempfile.mkdtemp(prefix=f"llloop-{os.geteuid()}-", dir=_SHARED)
    except OSError as error:
        raise problem or error from None


def socket_name(mountpoint: str, device: tuple[int, int]) -> str:
    """Return the file name of a mount's socket.

    Args:
        mountpoint: an absolute path without symlinks.
        device: major and minor number of the mount, by which it differs from another of that place that was
            detached and is still in use.
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
    # Those that begin with a dot are being made: nobody answers there yet, and nobody is to take them for stale.
    shown = (name for name in names if name.endswith(SUFFIX) and not name.startswith("."))
    yield from (os.path.join(directory, name) for name in shown)


def belongs_to(path: str, device: tuple[int, int]) -> bool:
    """Whether the name of a socket says that it is of a mount with that device number, wherever that has been moved."""
    return path.endswith(f"-{device[0]}-{device[1]}{SUFFIX}")


def encode(message: dict[str, Any]) -> bytes:
    """Return *message* as it is sent. Names that are not UTF-8 travel as they are."""
    body: bytes = msgpack.packb(message, unicode_errors="surrogateescape")
    return HEADER.pack(len(body)) + body


def decode(body: bytes | bytearray) -> dict[str, Any]:
    """Return the message in *body*, which follows its length.

    Raises:
        BadMessage: it is none.
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
