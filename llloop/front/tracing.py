"""Tracing in the front: writes each request into the trace while somebody reads it.

Without a reader this costs nothing: the handlers in the loop's tables are the handlers themselves. While somebody
reads, each is wrapped in a function that writes a record before and after it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from struct import Struct

from llloop.front.handlers import Handler
from llloop.front.inodes import ROOT, Inodes
from llloop.front.request import FuseRequest
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.linux.process_credentials import program_of
from llloop.shared.leadership import Postponed
from llloop.shared.trace import Trace

# Requests that no program waits for.
_UNTRACED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
_FIRST_NUMBER = Struct("=16xQ")  # the first field of several replies, behind their header: a nodeid, or a size
_MAX_PATH = 4096  # bytes; of a longer one, the end is shown


class Tracer:
    """Writes requests into the trace.

    Args:
        trace: the trace.
        memory: the memory of the slots.
        inodes: the inodes, for the paths.
    """

    def __init__(self, trace: Trace, memory: mmap.mmap, inodes: Inodes) -> None:
        self._ring = trace.front()
        self._memory = memory
        self._inodes = inodes

    def traced(self, opcode: int, handler: Handler) -> Handler:
        """Return a handler that does the same as *handler* and traces it."""
        if opcode in _UNTRACED:
            return handler

        def traced(request: FuseRequest) -> None:
            self._begin(request)
            try:
                handler(request)
            except Postponed:
                raise
            except OSError as error:
                self._failed(request, error.errno or errno.EIO)
                raise
            except Exception:
                self._failed(request, errno.EIO)
                raise

        return traced

    def replied(self, reply: bytes | bytearray | memoryview) -> None:
        """Trace a reply that the kernel has accepted."""
        length, error, unique = fuse.OUT_HEADER.unpack_from(reply)
        size = length - fuse.OUT_HEADER_SIZE
        (value,) = _FIRST_NUMBER.unpack_from(reply) if size >= 8 else (0,)
        self._ring.answered(unique, -error, size, value, time.monotonic_ns())

    def _begin(self, request: FuseRequest) -> None:
        uid = request.caller().uid
        pid, program = program_of(request.pid())
        path, target = self._paths(request)
        self._ring.begun(request.unique, request.taken, request.opcode, pid, uid, program, path, target)

    def _failed(self, request: FuseRequest, number: int) -> None:
        self._ring.answered(request.unique, fuse.known_errno(number), 0, 0, time.monotonic_ns())

    def _paths(self, request: FuseRequest) -> tuple[bytes, bytes]:
        """Return the path that a request is about, and the second one if it has two."""
        opcode, nodeid = request.opcode, request.nodeid
        offset = fuse.NAME_OFFSETS.get(opcode)  # type: ignore[call-overload]
        try:
            if opcode in (Opcode.RENAME, Opcode.RENAME2):
                (new_parent,) = fuse.RENAME_REQUEST.unpack_from(self._memory, request.base)
                name, new_name = request.strings(offset)
                return self._path(nodeid, name), self._path(new_parent, new_name)
            if opcode == Opcode.LINK:
                (linked,) = fuse.LINK_REQUEST.unpack_from(self._memory, request.base)
                return self._path(linked), self._path(nodeid, request.string(offset))
            return self._path(nodeid, b"" if offset is None else request.string(offset)), b""
        except OSError:  # the names are malformed; the handler refuses the request
            return b"", b""

    def _path(self, nodeid: int, name: bytes = b"") -> bytes:
        """Return the path of *name* in an inode, or of the inode, as the kernel knows it."""
        names = [name] if name else []
        length = 0
        while nodeid > ROOT and length < _MAX_PATH:
            if nodeid not in self._inodes:
                return b"/".join([b"(unknown)", *reversed(names)])
            inode = self._inodes.get(nodeid)
            if not inode.parent:
                return b"/".join([b"(removed)", *reversed(names)])
            names.append(inode.name)
            length += len(inode.name)
            nodeid = inode.parent
        return (b"/" if nodeid <= ROOT else b".../") + b"/".join(reversed(names))


class TraceSwitch:
    """Starts and ends the tracing of a front.

    The supervisor writes a byte into a pipe when the first reader has come or the last one has left. A thread waits for
    it, because the thread that serves may be in a system call that takes long.

    Args:
        trace: the trace.
        pipe: the read end of that pipe.
        tracer: traces requests.
        set_tracer: the loop's method that takes the tracer, or None to end tracing.
    """

    def __init__(self, trace: Trace, pipe: int, tracer: Tracer, set_tracer: Callable[[Tracer | None], None]) -> None:
        self._trace = trace
        self._pipe = pipe
        self._tracer = tracer
        self._set_tracer = set_tracer
        self._on = False
        self._trace.note_writing(False)
        self.look()

    def look(self) -> None:
        """Start or end tracing, if that is not done yet."""
        wanted = self._trace.wanted
        if wanted != self._on:
            self._set_tracer(self._tracer if wanted else None)
            self._on = wanted
            self._trace.note_writing(wanted)

    def start(self) -> None:
        """Follow the readers from now on."""
        with suppress(RuntimeError):  # no more threads are allowed (ulimit -u); the trace stays empty
            threading.Thread(target=self._follow, name="trace-switch", daemon=True).start()

    def _follow(self) -> None:
        self.look()
        while os.read(self._pipe, 64):
            self.look()
