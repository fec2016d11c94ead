"""inotify(7) for tests."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

_FLAGS = {
    0x2: "MODIFY",
    0x4: "ATTRIB",
    0x8: "CLOSE_WRITE",
    0x40: "MOVED_FROM",
    0x80: "MOVED_TO",
    0x100: "CREATE",
    0x200: "DELETE",
    0x400: "DELETE_SELF",
    0x800: "MOVE_SELF",
    0x4000: "Q_OVERFLOW",
    0x8000: "IGNORED",
}
_ISDIR = 0x40000000
# Everything but accesses, opens and closes of files that are open for reading.
_MASK = 0xFCE
_HEAD = struct.Struct("=iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class Seen(NamedTuple):
    """An event: the name of the watch, what happened, and the name in the directory.

    Both events of a rename have the same number, by which they belong together; other events have 0.
    """

    watch: str
    what: str
    name: bytes
    pair: int = 0


class Inotify:
    """Watches files and directories."""

    def __init__(self) -> None:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._names: dict[int, str] = {}
        self._cookies: dict[int, int] = {}

    def add(self, path: Path, name: str) -> None:
        watch = _libc.inotify_add_watch(self._fd, os.fsencode(path), _MASK)
        if watch < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
        self._names[watch] = name

    def read(self) -> list[Seen]:
        """The events that have arrived."""
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return []
        found = []
        while data:
            watch, mask, cookie, length = _HEAD.unpack_from(data)
            name = data[_HEAD.size : _HEAD.size + length].rstrip(b"\0")
            data = data[_HEAD.size + length :]
            what = "|".join(text for flag, text in _FLAGS.items() if mask & flag) + ("|ISDIR" if mask & _ISDIR else "")
            pair = self._cookies.setdefault(cookie, len(self._cookies) + 1) if cookie else 0
            found.append(Seen(self._names.get(watch, ""), what, name, pair))
        return found

    def read_until(self, name: bytes, seconds: float = 30.0) -> list[Seen]:
        """The events up to the creation of *name*."""
        found: list[Seen] = []
        end = time.monotonic() + seconds
        while not any(one.name == name and "CREATE" in one.what for one in found):
            assert time.monotonic() < end, f"nobody told of {name!r}, only of {found}"
            select.select([self._fd], [], [], 1.0)
            found += self.read()
        last = next(i for i, one in enumerate(found) if one.name == name and "CREATE" in one.what)
        return found[:last]

    def __enter__(self) -> Inotify:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
