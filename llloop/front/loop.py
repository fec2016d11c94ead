"""The request loop: one read per request, and a table of handlers."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from contextlib import suppress

from llloop.front.context import Context
from llloop.front.handlers import Handler, handler_table
from llloop.front.in_hand import FrontsInHand
from llloop.front.nowait import LONE_WRITE_LIMIT
from llloop.front.preflight import Preflight
from llloop.front.recovery.takeover import settle
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import is_readable
from llloop.shared import notifications
from llloop.shared.journal import Journal
from llloop.shared.leadership import Postponed
from llloop.shared.metrics import NANOSECONDS
from llloop.shared.negotiation import Feature

_log = logging.getLogger(__name__)

# read(2) from /dev/fuse fails so when a request was withdrawn or a signal came: nothing is wrong.
_AGAIN = frozenset({errno.EINTR, errno.ENOENT, errno.EAGAIN})
# What is not longer lies in its slot as soon as it is received.
_SHORT = fuse.WRITE_HEADER_SIZE + fuse.PAGE_SIZE
# What is longer mostly is a WRITE for a worker, and others like it will follow: from here on a pipe pays.
_LARGE = fuse.WRITE_HEADER_SIZE + LONE_WRITE_LIMIT
# So many descriptors are closed before it is looked whether a request waits.
_CLOSED_AT_ONCE = 64

# So many fronts may die of one request.
_MOST_TRIES = 3
# How long to wait, in milliseconds, between looks whether what was postponed can be done.
_POSTPONED_PAUSE = 20
# What comes between and is never sent again.
_NOT_RESENT = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
# Those whose answer makes the kernel know an inode.
_ENTRIES = frozenset(
    {
        Opcode.LOOKUP,
        Opcode.READDIRPLUS,
        Opcode.CREATE,
        Opcode.TMPFILE,
        Opcode.MKNOD,
        Opcode.MKDIR,
        Opcode.SYMLINK,
        Opcode.LINK,
    }
)


class Loop:
    """Takes requests off /dev/fuse until the file system is unmounted.

    Args:
        mirror: what is served.
        device: the descriptor of /dev/fuse.
        journal: what fronts leave to each other.
        asking: has workers look at the source before requests are served that would touch it; None if nobody need.
    """

    def __init__(self, context: Context, device: int, journal: Journal, preflight: Preflight | None = None) -> None:
        self._journal = journal
        self._context = context
        self._slots = context.router.slots
        self._buffers = self._slots.receive_buffers
        self._offset_of = self._slots.request_offset
        pipes = self._slots.pipes
        self._piped_slots = len(pipes) if pipes is not None else 0
        self._streaming = False
        self._device = device
        self._known = max(Opcode) + 1
        self._rows = self._slots.metrics.front.rows
        self._complained = False
        self._table: list[Handler] = [self._unknown] * self._known
        for opcode, handler in handler_table(context, device).items():
            self._table[opcode] = handler
        # What serves a request that has just come, and what one that was put aside, and whose time has come.
        self._first = self._at_once = self._table
        self._preflight = preflight
        # Requests of which a worker is back, and those for which no thread was left, each with when it was taken.
        self._answered: deque[tuple[bytes, int]] = deque()
        self._postponed: deque[tuple[bytes, int]] = deque()
        self._closing = context.closing
        self._leadership = context.leadership
        self._leadership.in_hand = FrontsInHand(context.intents, context.router)
        if preflight is not None:
            # Between poll(2) and read(2) a request may be withdrawn; the read must not wait for the next then.
            os.set_blocking(device, False)
            context.router.attentive = context.router.backlog = True

    def run(self) -> None:
        """Serve until the file system is unmounted."""
        if self._preflight is not None:
            self._first = self._table = self._by_asking()
        self._leadership.run(self._lead)

    def _lead(self) -> bool:
        """Serve until the file system is unmounted, or another thread does it; return whether it is unmounted."""
        receive = self._receive
        serve = self._serve
        leadership = self._leadership
        while True:
            base, length = receive()
            if not length:
                return True
            serve(base, length)
            if leadership.stalled and leadership.must_leave():
                return False

    def take_up(self) -> None:
        """Have the kernel send again what a dead front left unanswered, and serve that (Linux 6.9, HAS_RESEND).

        It all comes before anything else, but for what the kernel forgets.
        """
        context = self._context
        if Feature.HAS_RESEND not in context.features:
            self._refuse_all()
            settle(context, True)
            return
        notifications.resend(self._device)
        delivered = True
        while True:
            base, length = self._receive()
            if not length:
                return
            self._streaming = False  # what is sent again is not so large that a copy of it counts
            opcode, unique = fuse.OPCODE_AND_UNIQUE.unpack_from(self._slots.memory, base)
            if opcode not in _NOT_RESENT and not unique & fuse.FUSE_UNIQUE_RESEND:
                settle(context, delivered)
                self._serve(base, length)
                return
            delivered = delivered and opcode not in _ENTRIES
            if self._context.router.claim(unique):
                pass
            elif opcode not in _NOT_RESENT and self._journal.serving_again(unique) > _MOST_TRIES:
                _log.error("request %d (opcode %d) has killed %d fronts; it gets EIO", unique, opcode, _MOST_TRIES)
                self._refuse(base, opcode, errno.EIO)
            else:
                self._serve(base, length)
            self._journal.served_again()

    def _receive(self) -> tuple[int, int]:
        """Return where the next request lies and its length, which is 0 if the file system is unmounted."""
        router = self._context.router
        leadership = self._leadership
        while True:
            if router.backlog:
                request = self._wait()
                if request is not None:
                    self._table = self._at_once
                    return request
                self._table = self._first
            slot = router.slot
            try:
                if self._streaming and slot < self._piped_slots:
                    length = self._receive_piped(slot)
                else:
                    if leadership.stalled:
                        length = leadership.wait(os.readv, self._device, self._buffers[slot])
                    else:
                        length = os.readv(self._device, self._buffers[slot])
                    if length > _SHORT:
                        self._slots.complete(slot, length)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return 0, 0
                if error.errno not in _AGAIN:
                    raise
            else:
                router.taken = time.monotonic_ns()
                self._streaming = length > _LARGE
                return self._offset_of(slot), length

    def _by_asking(self) -> list[Handler]:
        """Return a table in which requests that would touch the source are asked about first."""
        preflight = self._preflight
        assert preflight is not None
        table = list(self._at_once)
        for opcode in preflight.opcodes:
            table[opcode] = self._ask
        return table

    def _ask(self, base: int, length: int) -> None:
        """Have a worker look at what a request is about, or serve it if there is nothing to look at."""
        assert self._preflight is not None
        _, opcode = fuse.OPCODE.unpack_from(self._slots.memory, base)
        if not self._preflight.ask(opcode, base, length):
            self._at_once[opcode](base, length)

    def _wait(self) -> tuple[int, int] | None:
        """Wait until there is a request to receive, and return None; or place one that was put aside, and return it.

        Meanwhile workers are given what waits for them.
        """
        preflight, router, device = self._preflight, self._context.router, self._device
        while True:
            if self._postponed and not self._leadership.alone:
                return self._place(*self._postponed.popleft())
            if self._answered:
                return self._place(*self._answered.popleft())
            router.attentive = preflight is not None or bool(self._postponed)
            patience = _POSTPONED_PAUSE if self._postponed else None
            if preflight is None:
                ready = router.wait(device, patience=patience)
                if not self._postponed or device in ready:
                    return None
                continue
            ready = router.wait(device, preflight.answers, patience=patience)
            if preflight.answers in ready:
                self._answered += preflight.answered()
            elif device in ready:
                return None

    def _place(self, request: bytes, taken: int) -> tuple[int, int]:
        """Put a request where one that has just been received would be."""
        router = self._context.router
        base = self._offset_of(router.slot)
        self._slots.memory[base : base + len(request)] = request
        router.taken = taken
        return base, len(request)

    def _postpone(self, base: int, length: int) -> None:
        """Put a request aside that could hold up the last thread that serves."""
        router = self._context.router
        self._postponed.append((self._slots.memory[base : base + length], router.taken))
        self._context.intents.finished()
        router.attentive = router.backlog = router.parked = True

    def _close(self) -> None:
        """Close what is not needed any more. For a large file that was removed, the last close(2) takes long.

        What a call of another thread uses is closed after a later request.
        """
        closing = self._closing
        leadership = self._leadership
        used = []
        done = 0
        while closing and not (leadership.alone and leadership.leads):
            if done and not done % _CLOSED_AT_ONCE and is_readable(self._device):
                break  # many of one user's: they must not keep others waiting
            done += 1
            fd = closing.pop()
            if leadership.uses(fd):
                used.append(fd)
            else:
                with suppress(OSError):  # of a server that is gone; who asked by fsync(2) or close(2) has been told
                    leadership.call(os.close, fd)
        closing += used

    def _receive_piped(self, slot: int) -> int:
        """Receive a request through the pipe of *slot*, where a large payload stays."""
        pipes = self._slots.pipes
        assert pipes is not None
        length = self._leadership.wait(pipes.receive, slot, self._device)
        buffer = self._slots.buffer(slot)
        taken = pipes.take(slot, buffer[: fuse.WRITE_HEADER_SIZE])
        if length > _LARGE and fuse.OPCODE.unpack_from(buffer)[1] == Opcode.WRITE:
            self._context.router.piped = True
        elif taken < length:  # a long BATCH_FORGET, for example
            pipes.take(slot, buffer[taken:length])
        return length

    def _serve(self, base: int, length: int) -> None:
        """Serve the request that was received last."""
        router = self._context.router
        slot = router.slot
        said, opcode = fuse.OPCODE.unpack_from(self._slots.memory, base)
        if opcode >= self._known:
            opcode = 0
        if said != length or length < fuse.MIN_REQUEST_SIZES[opcode]:
            self._malformed(base, opcode, length)
        else:
            try:
                self._table[opcode](base, length)
            except Postponed:
                self._postpone(base, length)
            except OSError as error:
                self._refuse(base, opcode, error.errno or errno.EIO)
            except Exception:
                _log.exception("a request with opcode %d failed", opcode)
                self._refuse(base, opcode, errno.EIO)
        if router.piped:  # nobody took it
            router.piped = False
            self._slots.discard(slot)
        if router.backlog and router.parked:  # a worker will count it, as those that have left the slot
            router.parked = False
        elif router.slot == slot:
            # Inlined ProcessCounters.finished(), because a call costs more than this.
            latency = time.monotonic_ns() - router.taken
            row = self._rows[opcode]
            row[NANOSECONDS] += latency
            row[(latency // 1000).bit_length()] += 1
        if self._closing:
            self._close()

    def _refuse_all(self) -> None:
        """Answer what a dead front had taken and given to nobody with EIO, for nobody else will."""
        for slot, state in enumerate(self._slots.states):
            base = self._offset_of(slot)
            if not state and fuse.UNIQUE.unpack_from(self._slots.memory, base)[0]:  # 0: nothing has ever been there
                self._refuse(base, 0, errno.EIO)

    def _unknown(self, base: int, length: int) -> None:
        """Say that there is no handler, so that the kernel does not send such a request again."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def _malformed(self, base: int, opcode: int, length: int) -> None:
        """Refuse what is no FUSE request, if that much of it is there that an answer finds its way."""
        if not self._complained:
            self._complained = True
            _log.error("the kernel sent a malformed request of %d bytes; llloop refuses it, and logs no others", length)
        if length >= fuse.IN_HEADER_SIZE:
            self._refuse(base, opcode, errno.EINVAL)

    def _refuse(self, base: int, opcode: int, number: int) -> None:
        """Answer a request with an errno."""
        self._slots.metrics.front.failed(opcode, number)
        (unique,) = fuse.UNIQUE.unpack_from(self._slots.memory, base)
        with suppress(OSError):  # mostly it is answered already, or nobody waits for it any more
            os.write(self._device, fuse.error_reply(unique, number))
