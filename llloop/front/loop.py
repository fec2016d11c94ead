"""The request loop: one read per request, a table of handlers, and libfuse for the rest."""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import suppress

from .. import wire
from ..metrics import ERRORS, NANOSECONDS
from ..session import Session
from ..wire import Opcode
from .mirror import Mirror
from .native import Handler, native_table
from .native.base import malformed

_log = logging.getLogger(__name__)

# read(2) from /dev/fuse fails so when a request was withdrawn or a signal came: nothing is wrong.
_AGAIN = frozenset({errno.EINTR, errno.ENOENT, errno.EAGAIN})
# A request of this many bytes or more is a WRITE, and others like it will follow: from here on a pipe pays.
_LARGE = 96 * 1024


class Loop:
    """Takes requests off /dev/fuse until the file system is unmounted.

    Args:
        mirror: what is served.
        session: llfuse's session, which takes the requests that have no handler here.
        device: the descriptor of /dev/fuse.
    """

    def __init__(self, mirror: Mirror, session: Session, device: int) -> None:
        self._mirror = mirror
        self._device = device
        self._process = session.processor()
        self._complained = False
        self._table: list[Handler] = [self._by_libfuse] * (max(Opcode) + 1)
        for opcode, handler in native_table(mirror, device).items():
            self._table[opcode] = handler

    def run(self) -> None:
        """Serve until the file system is unmounted."""
        router = self._mirror.router
        arena = router.arena
        buffers = arena.receive_buffers
        offset_of = arena.request_offset
        opcode_at = wire.OPCODE.unpack_from
        shortest = wire.SHORTEST
        memory = arena.memory
        table = self._table
        known = len(table)
        device = self._device
        readv = os.readv
        pipes = arena.pipes
        piped_slots = len(pipes) if pipes is not None else 0
        streaming = False
        clock = time.monotonic_ns
        rows = arena.metrics.front.rows
        nanoseconds = NANOSECONDS
        while True:
            if router.backlog:
                router.wait(device)
            slot = router.slot
            try:
                length = self._receive(slot) if streaming and slot < piped_slots else readv(device, buffers[slot])
            except OSError as error:
                if error.errno in _AGAIN:
                    continue
                if error.errno == errno.ENODEV:
                    return
                raise
            router.taken = start = clock()
            streaming = length >= _LARGE
            base = offset_of(slot)
            said, opcode = opcode_at(memory, base)
            if opcode >= known:
                opcode = 0
            if said != length or length < shortest[opcode] or (streaming and opcode != Opcode.WRITE):
                self._malformed(base, opcode, length)
            else:
                try:
                    table[opcode](base, length)
                except OSError as error:
                    self._refuse(base, opcode, error.errno or errno.EIO)
                except Exception:
                    _log.exception("a request with opcode %d failed", opcode)
                    self._refuse(base, opcode, errno.EIO)
            if streaming and router.piped:  # nobody took it
                router.piped = False
                arena.discard(slot)
            if router.backlog and router.parked:  # a worker will count it, as those that have left the slot
                router.parked = False
            elif router.slot == slot:
                # As Sheet.finished() does, whose call would cost more than this.
                latency = clock() - start
                row = rows[opcode]
                row[nanoseconds] += latency
                row[(latency // 1000).bit_length()] += 1

    def _receive(self, slot: int) -> int:
        """Receive a request through the pipe of *slot*, where a large payload stays."""
        router = self._mirror.router
        arena = router.arena
        pipes = arena.pipes
        assert pipes is not None
        length = pipes.receive(slot, self._device)
        buffer = arena.receive_buffers[slot][0]
        if length >= _LARGE:
            pipes.take(slot, buffer[: wire.WRITE_HEADER_SIZE])
            router.piped = True
        else:
            pipes.take(slot, buffer[:length])
        return length

    def _by_libfuse(self, base: int, length: int) -> None:
        """Have libfuse decode a request, which takes on trust that strings end and sizes are right."""
        arena = self._mirror.router.arena
        arena.memory[base + length : base + length + 2] = b"\0\0"
        _, opcode = wire.OPCODE.unpack_from(arena.memory, base)
        if opcode == Opcode.SETXATTR:
            (size,) = wire.SHORT_SETXATTR_REQUEST.unpack_from(arena.memory, base)
            if wire.SHORT_SETXATTR_REQUEST.size + size > length:
                raise malformed()
        self._process(arena.address + base, length)

    def _malformed(self, base: int, opcode: int, length: int) -> None:
        """Refuse what is no FUSE request, if that much of it is there that an answer finds its way."""
        if not self._complained:
            self._complained = True
            _log.error("the kernel sent a malformed request of %d bytes; it is refused, and so are others", length)
        if length >= wire.IN_HEADER_SIZE:
            self._refuse(base, opcode, errno.EINVAL)

    def _refuse(self, base: int, opcode: int, number: int) -> None:
        """Answer a request with an errno."""
        self._mirror.router.arena.metrics.front.add(opcode, ERRORS)
        (unique,) = wire.UNIQUE.unpack_from(self._mirror.router.arena.memory, base)
        with suppress(OSError):  # mostly it is answered already, or nobody waits for it any more
            os.write(self._device, wire.error_reply(unique, number))
