"""llloop's own request loop: it reads each request from /dev/fuse and calls the handler of its opcode."""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import suppress

from llloop.config import WakeLatency, usable_cpus
from llloop.front.context import Context
from llloop.front.handlers import Handler, Handlers
from llloop.front.handlers.relayed import RelayedRequests
from llloop.front.interrupts import CHANGES_DATA, INTERVAL, Interrupts
from llloop.front.nowait import LONE_WRITE_LIMIT
from llloop.front.preflight import Preflight
from llloop.front.recovery.replay import Replay
from llloop.front.recovery.takeover import finish_takeover
from llloop.front.request import FuseRequest
from llloop.front.set_aside import Received, SetAside
from llloop.front.tracing import Tracer
from llloop.front.waiting import Waiting
from llloop.linux import fuse
from llloop.linux.credentials import restore_process_attributes
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import is_readable
from llloop.shared import notifications
from llloop.shared.journal import Journal
from llloop.shared.leadership import CHECK_INTERVAL, MAX_THREADS, Postponed
from llloop.shared.metrics import NANOSECONDS
from llloop.shared.negotiation import Feature
from llloop.shared.relay import RelayState

_log = logging.getLogger(__name__)

# Errors of read(2) from /dev/fuse after an unmount, and after an abort (umount -f, fusectl; fs/fuse/dev.c).
_ENDED = frozenset({errno.ENODEV, errno.ECONNABORTED})
# Errors of read(2) from /dev/fuse if a request was withdrawn or a signal arrived. They are harmless.
_AGAIN = frozenset({errno.EINTR, errno.ENOENT, errno.EAGAIN})
# A request up to this size is completely in its slot when it is received.
_SHORT = fuse.WRITE_HEADER_SIZE + fuse.PAGE_SIZE
# A request above this size mostly is a WRITE for a worker, and more will follow. From this size on, a pipe is faster.
_LARGE = fuse.WRITE_HEADER_SIZE + LONE_WRITE_LIMIT
# After closing so many descriptors, check whether a request waits.
_CLOSED_AT_ONCE = 64

# How many fronts may die while they serve the same request.
_MAX_ATTEMPTS = 3
# The interval of checks whether postponed requests can be served, in milliseconds.
_POSTPONED_PAUSE = 20
# Requests that the kernel never sends again.
_NOT_RESENT = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})


class Loop:
    """Reads requests from /dev/fuse and serves them until the file system is unmounted.

    Args:
        context: the objects that handlers work on.
        device: a descriptor of /dev/fuse.
        journal: the records that survive the front.
        preflight: makes workers access the source before a request is served; None without preflight checks.
        relay: what the event relay does; None without one.
        awake: the write end of the pipe for asking the supervisor to keep idle CPUs awake, or None.
    """

    def __init__(
        self,
        context: Context,
        device: int,
        journal: Journal,
        preflight: Preflight | None = None,
        relay: RelayState | None = None,
        awake: int | None = None,
    ) -> None:
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
        self._waiting = Waiting(
            device,
            context.router.slots.metrics,
            context.config.wake_latency is not WakeLatency.NEVER and usable_cpus() > 1,
            awake,
        )
        self._known = max(Opcode) + 1
        self._rows = self._slots.metrics.front.rows
        self._complained = False
        self._table: list[Handler] = [self._unknown] * self._known
        self._handlers = Handlers(context, device)
        for opcode, handler in self._handlers.table.items():
            self._table[opcode] = handler
        self._set_aside = SetAside()
        self._interrupts = Interrupts(context, device, self._set_aside, preflight)
        self._handlers.responders += (self._interrupts,)
        self._table[Opcode.INTERRUPT] = self._interrupts.interrupt
        if relay is not None and context.callers.are_mapped:
            raise ValueError("the event relay is recognised by the uid in each request, which an id-mapped mount lacks")
        if relay is not None:
            relayed = RelayedRequests(
                relay, device, self._slots.memory, context.inodes, context.tree.getattr, context.attribute_fields
            )
            self._handlers.responders += (relayed,)
            self._table = relayed.before(self._table)
        self._preflight = preflight
        # The handlers for a request that was just received, and for one that was set aside before.
        self._table_for_set_aside = self._table
        self._table_for_new = self._table = self._table if preflight is None else self._with_preflight(preflight)
        # The handlers of the current request, and what calls them while a left request changes inodes.
        self._in_order: list[Handler] = [self._serve_in_order] * self._known
        self._unordered = self._table
        # The tables without a tracer, while there is one.
        self._untraced: list[tuple[list[Handler], list[Handler]]] = []
        # Whether the current request is a portion of a BATCH_FORGET. Then a request from the device is next.
        self._forgets = False
        self._closing = context.closing
        self._may_close = True  # False until there are other threads, because the last close(2) of a file may block
        self._leadership = context.leadership
        self._leadership.on_new_leader = self._hold_old_request
        # The request of each thread, and that of the leader.
        self._requests = [
            FuseRequest(self._slots.memory, context.intents.note(thread), context.callers)
            for thread in range(MAX_THREADS)
        ]
        self._leader_request = self._requests[0]
        if preflight is not None:
            # A request may be withdrawn between poll(2) and read(2). The read must not wait for the next one then.
            os.set_blocking(device, False)
            context.router.attentive = context.router.backlog = True

    def run(self) -> None:
        """Serve until the file system is unmounted."""
        self._leadership.run(self._lead)

    def trace(self, tracer: Tracer | None) -> None:
        """Trace requests from the next one on, or with None no more. Another thread may call this."""
        for responder in self._handlers.responders:
            responder.trace(None if tracer is None else tracer.replied)
        # Change the tables in place, because the leader may be switching from one to another.
        for table, untraced in self._untraced:
            table[:] = untraced
        self._untraced = []
        if tracer is not None:
            tables = [self._table_for_set_aside]
            if self._table_for_new is not self._table_for_set_aside:
                tables.append(self._table_for_new)
            self._untraced = [(table, list(table)) for table in tables]
            for table, untraced in self._untraced:
                table[:] = [tracer.traced(opcode, handler) for opcode, handler in enumerate(untraced)]

    def _lead(self, thread: int) -> bool:
        """Serve as the leader; return True after the unmount, False if another thread has become the leader."""
        request = self._leader_request = self._requests[thread]
        request.slot = self._free_slot()
        receive = self.receive
        serve = self.serve
        leadership = self._leadership
        while True:
            if not receive(request):
                return True
            serve(request)
            if leadership.stalled and not leadership.is_leader:
                request.note.finished()
                if request.slot == request.held:
                    self._slots.free_if_held(request.slot)
                leadership.become_follower()
                return False

    def _hold_old_request(self) -> None:
        """Keep the old leader's request in its slot while another thread leads."""
        restore_process_attributes()  # the stalled thread may have changed the file system ids
        request = self._leader_request
        self._slots.metrics.begun[request.slot] = request.taken
        self._slots.hold(request.slot)
        request.held = request.slot

    def _free_slot(self) -> int:
        """Return a free slot; wait until there is one."""
        while (slot := self._slots.free_slot()) < 0:  # workers give slots back
            time.sleep(CHECK_INTERVAL)
        return slot

    def serve_resent(self) -> None:
        """Make the kernel send the dead front's unanswered requests again, and serve them (Linux 6.9, HAS_RESEND).

        The kernel sends them before all others, except FORGET requests.
        """
        context = self._context
        if Feature.HAS_RESEND not in context.features:
            self._refuse_all()
            finish_takeover(context, True)
            return
        notifications.resend(self._device)
        self._may_close = False
        delivered = True
        new, set_aside, in_order = self._table_for_new, self._table_for_set_aside, self._in_order
        self._table_for_new = self._table_for_set_aside = self._table = Replay(
            context, self._device, self._handlers
        ).before(set_aside)
        # What the dead front may have begun must be replayed now; none of that changes data of files.
        self._in_order = [
            self._serve_in_order if opcode in CHANGES_DATA else handler for opcode, handler in enumerate(self._table)
        ]
        self._interrupts.inherit()
        request = self._leader_request
        request.slot = self._free_slot()
        while self.receive(request):
            self._streaming = False  # copying these few requests is fast enough
            opcode, unique = request.opcode, request.unique
            if opcode not in _NOT_RESENT and not unique & fuse.FUSE_UNIQUE_RESEND:
                if context.intents.unasked:
                    # The dead front may have answered a killed program with EINTR, and have done the request then.
                    notifications.expire_all_entries(self._device)
                finish_takeover(context, delivered)
                self._table_for_new = self._table = new
                self._table_for_set_aside = set_aside
                self._in_order = in_order
                self._postpone(request)  # until there are other threads: it may block
                self._may_close = True
                return
            delivered = delivered and opcode not in fuse.MAKES_ENTRIES
            if self._router.claim(unique):
                self._interrupts.is_claimed(unique)
            elif opcode not in _NOT_RESENT and self._journal.serving_again(unique) > _MAX_ATTEMPTS:
                _log.error("request %d (opcode %d) has killed %d fronts; it gets EIO", unique, opcode, _MAX_ATTEMPTS)
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
        waiting = self._waiting
        while True:
            if router.backlog:
                self._unordered = self._table_for_set_aside
                was_set_aside = self._wait(request)
                if not was_set_aside:
                    self._unordered = self._table_for_new
                    request.slot = self._free_slot()
                self._table = self._in_order if self._interrupts.changing else self._unordered
                if was_set_aside:
                    return True
            slot = request.slot
            try:
                if self._streaming and slot < self._piped_slots:
                    length = self._receive_piped(request)
                else:
                    if leadership.stalled:
                        length = leadership.wait(os.readv, self._device, self._buffers[slot])
                    else:
                        if waiting.polls:
                            waiting.poll()
                        length = os.readv(self._device, self._buffers[slot])
                    if length > _SHORT:
                        self._slots.complete(slot, length)
            except OSError as error:
                if error.errno in _ENDED:
                    return False
                if error.errno not in _AGAIN:
                    raise
            else:
                if not length:
                    return False
                now = time.monotonic_ns()
                request.is_received(self._bases[slot], length, now)
                waiting.left -= 1
                if not waiting.left:
                    waiting.review(now)
                self._streaming = length > _LARGE
                return True

    def _with_preflight(self, preflight: Preflight) -> list[Handler]:
        """Return a table of handlers that send a PROBE first for requests that access the source."""
        table = list(self._table_for_set_aside)
        for opcode in preflight.opcodes:
            table[opcode] = self._ask
        return table

    def _ask(self, request: FuseRequest) -> None:
        """Send a PROBE for a request, or serve it if there is nothing to probe."""
        assert self._preflight is not None
        if not self._preflight.ask(request):
            self._table_for_set_aside[request.opcode](request)

    def _wait(self, request: FuseRequest) -> bool:
        """Wait for a request; meanwhile send parked requests to workers.

        Returns:
            True if *request* is one that was set aside; False if one can be received from the device.
        """
        preflight, router, device = self._preflight, self._router, self._device
        unfinished = self._context.forgetting.unfinished
        interrupts = self._interrupts
        set_aside = self._set_aside
        while True:
            if interrupts.waiting:
                interrupts.look()
            if set_aside.behind and (first := self._first_behind()) is not None:
                self._unordered = self._table_for_new
                return self._take_set_aside(request, first)
            if set_aside.postponed and not self._leadership.in_last_thread:
                return self._take_set_aside(request, set_aside.postponed.popleft())
            if set_aside.answered:
                return self._take_set_aside(request, set_aside.answered.popleft())
            self._forgets = bool(unfinished) and not self._forgets
            if self._forgets:
                base, length = unfinished.popleft()
                request.slot = self._slots.slot_of(base)
                request.is_received(base, length, time.monotonic_ns())
                return True
            router.attentive = preflight is not None or bool(set_aside.postponed or unfinished) or interrupts.waiting
            timeout = INTERVAL if interrupts.waiting else None
            if set_aside.postponed:
                timeout = _POSTPONED_PAUSE
            if unfinished:
                timeout = 0
            if preflight is None:
                ready = router.wait(device, timeout=timeout)
                if not router.attentive or device in ready:
                    return False
                continue
            ready = router.wait(device, preflight.answers, timeout=timeout)
            if preflight.answers in ready:
                set_aside.answered += preflight.answered()
            elif device in ready:
                return False

    def _take_set_aside(self, request: FuseRequest, waiting: Received) -> bool:
        """Copy a request that was set aside into a free slot, as if it was just received; return True."""
        data = waiting.data
        request.slot = self._free_slot()
        base = self._bases[request.slot]
        self._slots.memory[base : base + len(data)] = data
        request.is_received(base, len(data), waiting.taken)
        return True

    def _postpone(self, request: FuseRequest) -> None:
        """Set a request aside that could block the last thread."""
        self._set_aside.postponed.append(Received(request.data(), request.taken))
        request.note.finished()
        request.dispatched = True
        self._router.attentive = self._router.backlog = True

    def _serve_in_order(self, request: FuseRequest) -> None:
        """Serve a request, or set it aside if a left request is changing the same inode."""
        opcode = request.opcode
        if not self._interrupts.must_wait(self._slots.memory, request.base, opcode):
            self._unordered[opcode if opcode < self._known else 0](request)
            return
        if request.piped:
            request.piped = False
            assert self._slots.pipes is not None
            payload = self._slots.payload(request.slot, request.received - fuse.WRITE_HEADER_SIZE)
            self._slots.pipes.take_all(request.slot, payload)
        self._set_aside.behind.append(Received(request.data(), request.taken))
        request.note.finished()
        request.dispatched = True

    def _first_behind(self) -> Received | None:
        """Remove and return the first request in `SetAside.behind` that need not wait any longer, or None."""
        behind = self._set_aside.behind
        for waiting in behind:
            _, opcode = fuse.OPCODE.unpack_from(waiting.data)
            if not self._interrupts.must_wait(waiting.data, 0, opcode):
                behind.remove(waiting)
                return waiting
        return None

    def _close(self) -> None:
        """Close released descriptors. The last close(2) of a large file that was removed takes long.

        Descriptors that a call of another thread uses are closed after a later request.
        """
        closing = self._closing
        leadership = self._leadership
        used = []
        done = 0
        while closing and not (leadership.in_last_thread and leadership.is_leader):
            if done and not done % _CLOSED_AT_ONCE and is_readable(self._device):
                break  # many descriptors of one user must not delay the requests of others
            done += 1
            fd = closing.pop()
            if leadership.is_in_use(fd) or fd in self._interrupts.kept:
                used.append(fd)
            else:
                with suppress(OSError):  # fsync(2) and the close(2) of FLUSH have already reported errors
                    leadership.call(os.close, fd)
        closing += used

    def _receive_piped(self, request: FuseRequest) -> int:
        """Receive a request through the pipe of its slot; a large payload stays there. Return the request's length."""
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
        """Serve a received request."""
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
        if request.piped:  # the handler has not used the payload
            request.piped = False
            self._slots.discard(slot)
        if request.dispatched:  # the worker counts it
            request.dispatched = False
        else:
            # Inlined ProcessCounters.finished(), because a call costs more than this.
            latency = time.monotonic_ns() - request.taken
            row = self._rows[opcode]
            row[NANOSECONDS] += latency
            row[(latency // 1000).bit_length()] += 1
        if self._closing and self._may_close:
            self._close()

    def _refuse_all(self) -> None:
        """Answer all requests that a dead front had received and not given to a worker with EIO."""
        for slot, state in enumerate(self._slots.states):
            (unique,) = fuse.UNIQUE.unpack_from(self._slots.memory, self._bases[slot])
            if not state and unique:  # 0: the slot was never used
                self._refuse(unique, 0, errno.EIO)

    def _unknown(self, request: FuseRequest) -> None:
        """Answer with ENOSYS, so that the kernel does not send such a request again."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def _malformed(self, request: FuseRequest, opcode: int) -> None:
        """Answer a malformed request with EINVAL, if its header is complete."""
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
        with suppress(OSError):  # the request is answered already, or was withdrawn
            os.write(self._device, fuse.error_reply(unique, number))
