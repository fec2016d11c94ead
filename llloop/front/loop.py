"""The request loop: one read per request, and a table of handlers."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from contextlib import suppress

from llloop.front.context import Context
from llloop.front.handlers import Handler, Handlers
from llloop.front.nowait import LONE_WRITE_LIMIT
from llloop.front.preflight import Preflight
from llloop.front.recovery.replay import Replay
from llloop.front.recovery.takeover import settle
from llloop.front.request import FuseRequest
from llloop.linux import fuse
from llloop.linux.credentials import restore_process_attributes
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import is_readable
from llloop.shared import notifications
from llloop.shared.journal import Journal
from llloop.shared.leadership import MOST_THREADS, TICK, Postponed
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
        self._router = context.router
        self._slots = context.router.slots
        self._buffers = self._slots.receive_buffers
        self._bases = [self._slots.request_offset(slot) for slot in range(self._slots.count)]
        pipes = self._slots.pipes
        self._piped_slots = len(pipes) if pipes is not None else 0
        self._streaming = False
        self._device = device
        self._known = max(Opcode) + 1
        self._rows = self._slots.metrics.front.rows
        self._complained = False
        self._table: list[Handler] = [self._unknown] * self._known
        self._handlers = Handlers(context, device)
        for opcode, handler in self._handlers.table.items():
            self._table[opcode] = handler
        # What serves a request that has just come, and what one that was put aside, and whose time has come.
        self._first = self._at_once = self._table
        self._preflight = preflight
        # Requests of which a worker is back, and those for which no thread was left, each with when it was taken.
        self._answered: deque[tuple[bytes, int]] = deque()
        self._postponed: deque[tuple[bytes, int]] = deque()
        # Whether the request at hand is a portion of what is to be forgotten. Then the device has its turn next.
        self._forgets = False
        self._closing = context.closing
        self._leadership = context.leadership
        self._leadership.set_aside = self._set_aside
        # Each thread's, and that of the one that leads.
        self._requests = [
            FuseRequest(self._slots.memory, context.intents.note(thread)) for thread in range(MOST_THREADS)
        ]
        self._leaders = self._requests[0]
        if preflight is not None:
            # Between poll(2) and read(2) a request may be withdrawn; the read must not wait for the next then.
            os.set_blocking(device, False)
            context.router.attentive = context.router.backlog = True

    def run(self) -> None:
        """Serve until the file system is unmounted."""
        if self._preflight is not None:
            self._first = self._table = self._by_asking()
        self._leadership.run(self._lead)

    def _lead(self, thread: int) -> bool:
        """Serve until the file system is unmounted, or another thread does it; return whether it is unmounted."""
        request = self._leaders = self._requests[thread]
        request.slot = self._free_slot()
        receive = self.receive
        serve = self.serve
        leadership = self._leadership
        while True:
            if not receive(request):
                return True
            serve(request)
            if leadership.stalled and not leadership.leads:
                request.note.finished()
                if request.slot == request.held:
                    self._slots.let_go(request.slot)
                leadership.leave()
                return False

    def _set_aside(self) -> None:
        """Keep the request of the old leader where it is while another thread leads."""
        restore_process_attributes()  # the thread that is held up may act as somebody else
        request = self._leaders
        self._slots.metrics.begun[request.slot] = request.taken
        self._slots.hold(request.slot)
        request.held = request.slot

    def _free_slot(self) -> int:
        """Return a slot in which a request can be received."""
        while (slot := self._slots.free_slot()) < 0:  # workers have all others, and give them back
            time.sleep(TICK)
        return slot

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
        served = self._table
        self._first = self._at_once = self._table = Replay(context, self._device, self._handlers).before(served)
        request = self._leaders
        request.slot = self._free_slot()
        while self.receive(request):
            self._streaming = False  # what is sent again is not so large that a copy of it counts
            opcode, unique = request.opcode, request.unique
            if opcode not in _NOT_RESENT and not unique & fuse.FUSE_UNIQUE_RESEND:
                settle(context, delivered)
                self._first = self._at_once = self._table = served
                self.serve(request)
                return
            delivered = delivered and opcode not in _ENTRIES
            if self._router.claim(unique):
                pass
            elif opcode not in _NOT_RESENT and self._journal.serving_again(unique) > _MOST_TRIES:
                _log.error("request %d (opcode %d) has killed %d fronts; it gets EIO", unique, opcode, _MOST_TRIES)
                self._refuse(unique, opcode, errno.EIO)
            else:
                own, request.note = request.note, context.intents.note_of(unique)
                request.note.unique = unique
                self.serve(request)
                request.note.finished()
                request.note = own
            self._journal.served_again()

    def receive(self, request: FuseRequest) -> bool:
        """Receive the next request in its slot; return False if the file system is unmounted."""
        router = self._router
        leadership = self._leadership
        while True:
            if router.backlog:
                if self._wait(request):
                    self._table = self._at_once
                    return True
                self._table = self._first
                request.slot = self._free_slot()
            slot = request.slot
            try:
                if self._streaming and slot < self._piped_slots:
                    length = self._receive_piped(request)
                else:
                    if leadership.stalled:
                        length = leadership.wait(os.readv, self._device, self._buffers[slot])
                    else:
                        length = os.readv(self._device, self._buffers[slot])
                    if length > _SHORT:
                        self._slots.complete(slot, length)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return False
                if error.errno not in _AGAIN:
                    raise
            else:
                if not length:
                    return False
                request.is_received(self._bases[slot], length, time.monotonic_ns())
                self._streaming = length > _LARGE
                return True

    def _by_asking(self) -> list[Handler]:
        """Return a table in which requests that would touch the source are asked about first."""
        preflight = self._preflight
        assert preflight is not None
        table = list(self._at_once)
        for opcode in preflight.opcodes:
            table[opcode] = self._ask
        return table

    def _ask(self, request: FuseRequest) -> None:
        """Have a worker look at what a request is about, or serve it if there is nothing to look at."""
        assert self._preflight is not None
        if not self._preflight.ask(request):
            self._at_once[request.opcode](request)

    def _wait(self, request: FuseRequest) -> bool:
        """Wait until there is a request to receive, and return False; or take one that was put aside, and return True.

        Meanwhile workers are given what waits for them.
        """
        preflight, router, device = self._preflight, self._router, self._device
        unfinished = self._context.forgetting.unfinished
        while True:
            if self._postponed and not self._leadership.alone:
                return self._place(request, *self._postponed.popleft())
            if self._answered:
                return self._place(request, *self._answered.popleft())
            self._forgets = bool(unfinished) and not self._forgets
            if self._forgets:
                base, length = unfinished.popleft()
                request.slot = self._slots.slot_of(base)
                request.is_received(base, length, time.monotonic_ns())
                return True
            router.attentive = preflight is not None or bool(self._postponed) or bool(unfinished)
            patience = 0 if unfinished else _POSTPONED_PAUSE if self._postponed else None
            if preflight is None:
                ready = router.wait(device, patience=patience)
                if not router.attentive or device in ready:
                    return False
                continue
            ready = router.wait(device, preflight.answers, patience=patience)
            if preflight.answers in ready:
                self._answered += preflight.answered()
            elif device in ready:
                return False

    def _place(self, request: FuseRequest, data: bytes, taken: int) -> bool:
        """Put a request that was put aside where one that has just been received would be; return True."""
        request.slot = self._free_slot()
        base = self._bases[request.slot]
        self._slots.memory[base : base + len(data)] = data
        request.is_received(base, len(data), taken)
        return True

    def _postpone(self, request: FuseRequest) -> None:
        """Put a request aside that could hold up the last thread that serves."""
        self._postponed.append((request.data(), request.taken))
        request.note.finished()
        request.entrusted = True
        self._router.attentive = self._router.backlog = True

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

    def _receive_piped(self, request: FuseRequest) -> int:
        """Receive a request through the pipe of its slot, where a large payload stays; return its length."""
        pipes = self._slots.pipes
        assert pipes is not None
        slot = request.slot
        length = self._leadership.wait(pipes.receive, slot, self._device)
        buffer = self._slots.buffer(slot)
        taken = pipes.take(slot, buffer[: fuse.WRITE_HEADER_SIZE])
        if length > _LARGE and fuse.OPCODE.unpack_from(buffer)[1] == Opcode.WRITE:
            request.piped = True
        elif taken < length:  # a long BATCH_FORGET, for example
            pipes.take(slot, buffer[taken:length])
        return length

    def serve(self, request: FuseRequest) -> None:
        """Serve a request that was received."""
        slot = request.slot
        opcode = request.opcode
        length = request.received
        if opcode >= self._known:
            opcode = 0
        if request.length != length or length < fuse.MIN_REQUEST_SIZES[opcode]:
            self._malformed(request, opcode)
        else:
            try:
                self._table[opcode](request)
            except Postponed:
                self._postpone(request)
            except OSError as error:
                self._refuse(request.unique, opcode, error.errno or errno.EIO)
            except Exception:
                _log.exception("a request with opcode %d failed", opcode)
                self._refuse(request.unique, opcode, errno.EIO)
        if request.piped:  # nobody took it
            request.piped = False
            self._slots.discard(slot)
        if request.entrusted:  # a worker counts it
            request.entrusted = False
        else:
            # Inlined ProcessCounters.finished(), because a call costs more than this.
            latency = time.monotonic_ns() - request.taken
            row = self._rows[opcode]
            row[NANOSECONDS] += latency
            row[(latency // 1000).bit_length()] += 1
        if self._closing:
            self._close()

    def _refuse_all(self) -> None:
        """Answer what a dead front had taken and given to nobody with EIO, for nobody else will."""
        for slot, state in enumerate(self._slots.states):
            (unique,) = fuse.UNIQUE.unpack_from(self._slots.memory, self._bases[slot])
            if not state and unique:  # 0: nothing has ever been there
                self._refuse(unique, 0, errno.EIO)

    def _unknown(self, request: FuseRequest) -> None:
        """Say that there is no handler, so that the kernel does not send such a request again."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def _malformed(self, request: FuseRequest, opcode: int) -> None:
        """Refuse what is no FUSE request, if that much of it is there that an answer finds its way."""
        if not self._complained:
            self._complained = True
            _log.error(
                "the kernel sent a malformed request of %d bytes; llloop refuses it, and logs no others",
                request.received,
            )
        if request.received >= fuse.IN_HEADER_SIZE:
            self._refuse(request.unique, opcode, errno.EINVAL)

    def _refuse(self, unique: int, opcode: int, number: int) -> None:
        """Answer a request with an errno."""
        self._slots.metrics.front.failed(opcode, number)
        with suppress(OSError):  # mostly it is answered already, or nobody waits for it any more
            os.write(self._device, fuse.error_reply(unique, number))
