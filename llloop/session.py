"""llfuse's session, found in memory and proven, so that llloop can run the request loop itself.

llfuse keeps libfuse's ``struct fuse_chan *`` and ``struct fuse_session *`` in C variables that
it does not export. `find_session` looks for the channel pointer among the words of llfuse's own
data segments and accepts a candidate only after libfuse's own accessor functions have agreed
with every field of it. If anything does not fit, it raises `SessionNotFound` and the caller
falls back to ``llfuse.main()``: nothing here is needed for correctness.

Sources: libfuse 2.9 ``lib/fuse_session.c`` (``struct fuse_chan``), ``lib/fuse_i.h``
(``struct fuse_session``) and ``include/fuse_common.h`` (``struct fuse_buf``).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import llfuse

# struct fuse_chan begins with struct fuse_chan_ops (three function pointers), then
# struct fuse_session *se; int fd; (padding) size_t bufsize.
_CHANNEL = struct.Struct("=3QQi4xQ")

# MIN_BUFSIZE of libfuse 2.9's lib/fuse_kern_chan.c: 128 KiB and a page.
_LIBFUSE_BUFFER_SIZE = 0x21000

# llfuse's .bss has some ten thousand bytes.
_BSS_LIMIT = 1024 * 1024

_WORD = struct.calcsize("P")


class SessionNotFound(Exception):
    """The session could not be found or proven; the message says at which step."""


class _FuseBuf(ctypes.Structure):
    """``struct fuse_buf`` of libfuse 2.9 (``include/fuse_common.h``)."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("mem", ctypes.c_void_p),
        ("fd", ctypes.c_int),
        ("pos", ctypes.c_longlong),
    )


@dataclass(frozen=True, slots=True)
class Session:
    """A proven pair of libfuse session and channel, with the functions that act on them."""

    _library: ctypes.PyDLL
    _session: int
    _channel: int

    def processor(self) -> _Processor:
        """Return a callable that feeds one raw request to libfuse; see `_Processor`."""
        return _Processor(self._library, self._session, self._channel)


class _Processor:
    """Hands raw requests to libfuse, which decodes them and calls llfuse's handlers.

    Calling it with ``(address, size)`` of a request as read from /dev/fuse returns when the
    handler has returned; libfuse has then written the reply.
    """

    __slots__ = ("_buffer", "_channel", "_pointer", "_process", "_session")

    def __init__(self, library: ctypes.PyDLL, session: int, channel: int) -> None:
        self._buffer = _FuseBuf()
        self._pointer = ctypes.pointer(self._buffer)
        self._process = library.fuse_session_process_buf
        self._process.argtypes = (ctypes.c_void_p, ctypes.POINTER(_FuseBuf), ctypes.c_void_p)
        self._process.restype = None
        self._session = ctypes.c_void_p(session)
        self._channel = ctypes.c_void_p(channel)

    def __call__(self, address: int, size: int) -> None:
        buffer = self._buffer
        buffer.mem = address
        buffer.size = size
        self._process(self._session, self._pointer, self._channel)

    def process_bytes(self, request: bytes) -> None:
        """Feed libfuse a request that does not lie at a fixed address."""
        copy = ctypes.create_string_buffer(request, len(request))
        self(ctypes.addressof(copy), len(request))


def fuse_devices() -> frozenset[int]:
    """Return this process's open descriptors of /dev/fuse (proc(5), /proc/self/fd)."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return frozenset(found)


def find_session(device: int) -> Session:
    """Find llfuse's session for *device* and prove it with libfuse's accessors.

    Args:
        device: the descriptor of /dev/fuse that ``llfuse.init()`` opened, see `fuse_devices`.

    Raises:
        SessionNotFound: no word of llfuse's data leads to a channel of this device, or more than one does.
    """
    try:
        library = ctypes.PyDLL("libfuse.so.2")
    except OSError as error:
        raise SessionNotFound(f"libfuse.so.2 cannot be loaded: {error}") from None
    found: dict[int, int] = {}
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for channel in _candidates(memory.fileno()):
            session = _check(library, memory.fileno(), channel, device)
            if session is not None:
                found[channel] = session
    if len(found) != 1:
        raise SessionNotFound(f"{len(found)} pointers in llfuse's data lead to a channel of descriptor {device}")
    ((channel, session),) = found.items()
    return Session(library, session, channel)


def _candidates(memory: int) -> Iterator[int]:
    """Yield each distinct aligned word of llfuse's writable data that could be a heap pointer."""
    seen = set()
    for start, end in _data_segments():
        try:
            data = os.pread(memory, end - start, start)
        except OSError:
            continue
        for (word,) in struct.iter_unpack("P", data[: len(data) // _WORD * _WORD]):
            if word > 0xFFFF and word % _WORD == 0 and word not in seen:
                seen.add(word)
                yield word


def _data_segments() -> Iterator[tuple[int, int]]:
    """Yield llfuse's writable mappings and the anonymous one right behind them, which is its .bss."""
    library = os.path.realpath(llfuse.__file__)
    name = os.path.basename(library)
    previous_end = 0
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            fields = line.rstrip(b"\n").split(None, 5)
            start, end = (int(part, 16) for part in fields[0].split(b"-"))
            path = os.fsdecode(fields[5]) if len(fields) > 5 else ""
            own = os.path.basename(path) == name and os.path.realpath(path) == library
            if b"w" in fields[1] and own:
                yield start, end
            elif b"w" in fields[1] and not path and start == previous_end:
                yield start, min(end, start + _BSS_LIMIT)  # other anonymous memory may have grown together with it
            previous_end = end if own else 0


def _check(library: ctypes.PyDLL, memory: int, channel: int, device: int) -> int | None:
    """Return the session of *channel* if it is the channel of *device*, else None.

    The memory is read through /proc/self/mem first: there a bad pointer fails a read, in libfuse it would crash.
    """
    try:
        data = os.pread(memory, _CHANNEL.size, channel)
    except (OSError, OverflowError):
        return None
    if len(data) < _CHANNEL.size:
        return None
    *_operations, session, fd, buffer_size = _CHANNEL.unpack(data)
    if fd != device or buffer_size != _LIBFUSE_BUFFER_SIZE or session % _WORD:
        return None
    try:
        os.pread(memory, _WORD, session)
    except (OSError, OverflowError):
        return None
    pointer = ctypes.c_void_p
    for function in (library.fuse_chan_session, library.fuse_session_next_chan):
        function.restype = pointer
    library.fuse_session_next_chan.argtypes = (pointer, pointer)
    library.fuse_chan_session.argtypes = (pointer,)
    library.fuse_chan_fd.argtypes = (pointer,)
    proven = (
        library.fuse_chan_session(channel) == session
        and library.fuse_session_next_chan(session, None) == channel
        and library.fuse_chan_fd(channel) == device
    )
    return session if proven else None
