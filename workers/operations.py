"""The requests of a worker: each operation as system calls on the source's files."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Protocol, TypeVar

from llloop.linux import syscalls
from llloop.linux.credentials import SETID_BITS, SetidGuard, Writer
from llloop.linux.fuse import Opcode
from llloop.shared.leadership import Leadership
from llloop.shared.messages import (
    APPEND,
    BUFFERED,
    CACHED,
    DATA_CHANGES,
    DATA_ONLY,
    INVALIDATE,
    KILL_PRIVILEGES,
    PIPED,
    SINGLE_CALL,
    Operation,
    Request,
)
from llloop.shared.metrics import ERRORS, ProcessCounters
from llloop.shared.slots import Slots
from llloop.workers.invalidations import Held, Invalidations
from llloop.workers.replies import Replies
from llloop.workers.writeback_errors import WritebackErrors

_log = logging.getLogger(__name__)

# The maximum of one COPY_FILE_RANGE in bytes: the reply has 32 bits for the size, and the shard's other files wait.
_MAX_COPY = 64 * 1024 * 1024

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
# Errors of splice(2) after which pwrite(2) may succeed: no support for splice, and lack of space, which may pass.
_COPY_AFTER = _NO_SPACE | {errno.EINVAL}
_SPACE_PAUSES = (0.001, 0.01)  # seconds

# How many bytes behind the expected end of the file to set the file position before an append. The first distance that
# the file system allows is used.
_MARKS = (1 << 31, 4093)

# The FUSE opcode of each operation, for the counters; FSYNCDIR counts as FSYNC.
_OPCODES = (0, *(int(Opcode.__members__.get(operation.name, 0)) for operation in Operation))

# The stages of a request that must not be done twice, noted in its slot for the successor of this worker. The slot also
# has a result: while appending or shifting the size of the file before, while copying from the pipe the number of bytes
# that were written before. One store marks the request as done: it sets the result to ~answer, which is negative.
_BEGUN, _APPENDING, _SHIFTING, _DONE, _COPYING = range(5)

# fallocate(2) modes that shift the data after the range (<linux/falloc.h>).
_FALLOC_FL_COLLAPSE_RANGE, _FALLOC_FL_INSERT_RANGE = 0x08, 0x20


_UNCHANGED = nullcontext()
_Result = TypeVar("_Result")


def opcode_of(request: Request) -> int:
    """Return the FUSE opcode of a request's operation, 0 if it is unknown."""
    operation = request.operation
    return _OPCODES[operation] if 0 <= operation < len(_OPCODES) else 0


def _write_once(fd: int, payload: memoryview, offset: int) -> int:
    """Write with a single system call; at the file position if the file has no offsets (ESPIPE)."""
    try:
        return os.pwrite(fd, payload, offset)
    except OSError as error:
        if error.errno != errno.ESPIPE:
            raise
    return os.write(fd, payload)


@contextmanager
def _buffered(fd: int) -> Iterator[None]:
    """Clear O_DIRECT of a descriptor in the ``with`` block.

    The front shares this flag, which belongs to the open file description. One worker does all I/O of a file, and one
    such request at a time. Only if the front does a worker's I/O can a direct request run meanwhile and be cached.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _with_setid_bits(inodes: Sequence[int], fd: int) -> tuple[int, ...]:
    """Return *inodes*, which all belong to the file *fd*, if the file has set-ID bits, else nothing."""
    return tuple(inodes) if inodes and os.fstat(fd).st_mode & SETID_BITS else ()


class Descriptors(Protocol):
    """Provides descriptors of open files, see `llloop.workers.descriptors`."""

    def get(self, handle: int, descriptor: int, file: int = 0) -> int: ...
    def release(self, handle: int) -> None: ...


class Operations:
    """Does requests, answers them, and gives back their slots.

    Args:
        slots: the request slots in shared memory.
        descriptors: the open files.
        replies: sends the answers.
        setid: controls whether set-ID bits are cleared.
        writer: sets the ids of the writing user.
        counters: the counters. This class counts bytes and errors; its caller counts requests.
        invalidations: the requests that wait until the kernel has dropped pages.
        probe: does PROBE.
        leadership: decides which thread serves.
        trace: returns *replies*, or while somebody reads the trace an object that writes it, too.
    """

    def __init__(
        self,
        slots: Slots,
        descriptors: Descriptors,
        replies: Replies,
        setid: SetidGuard,
        writer: Writer,
        counters: ProcessCounters,
        invalidations: Invalidations,
        probe: Callable[[Request], None] | None = None,
        leadership: Leadership | None = None,
        trace: Callable[[], Replies] | None = None,
    ) -> None:
        self._call = (leadership or Leadership()).call
        self._slots = slots
        self._descriptors = descriptors
        self._replies = replies if trace is None else trace()
        self._choose_replies = trace
        self._setid = setid
        self._writer = writer
        self._counters = counters
        self._invalidations = invalidations
        self._writeback_errors = WritebackErrors()
        self._table: dict[Operation, Callable[[Request], None]] = {
            Operation.READ: self._read,
            Operation.WRITE: self._write,
            Operation.FSYNC: self._fsync,
            Operation.FLUSH: self._flush,
            Operation.FALLOCATE: self._fallocate,
            Operation.LSEEK: self._lseek,
            Operation.COPY_FILE_RANGE: self._copy_file_range,
            Operation.SYNCFS: self._syncfs,
            Operation.GETATTR: self._getattr,
            Operation.TRACE: self._trace,
        }
        if probe is not None:
            self._table[Operation.PROBE] = probe

    def execute(self, request: Request) -> bool:
        """Do one request and answer it, also if it fails.

        Returns:
            False if it has to wait until the kernel has dropped pages; `continue_held` then answers it.

        Raises:
            OSError: /dev/fuse refused the answer because the mount has ended.
        """
        if request.operation == Operation.RELEASE:
            for handle in request.extra:
                self._descriptors.release(handle)
                self._writeback_errors.release(handle)
            return True
        if self._must_wait(request):
            return False
        self._do(request)
        if request.slot >= 0:
            if self._replies.accepted or request.operation == Operation.PROBE:
                self._conclude(request)
            else:
                self._resume(request)
        return True

    def _must_wait(self, request: Request) -> bool:
        """Return whether a request must wait until the kernel has dropped pages; if so, hold it."""
        if request.operation == Operation.LSEEK and request.flags & INVALIDATE:
            self._invalidations.hold(request, request.extra[1], 0, 0)
            return True
        return request.operation == Operation.GETATTR and self._invalidations.follow(request, request.extra[0])

    def continue_held(self, held: Held) -> Request | None:
        """Continue with held requests after the kernel has dropped pages.

        Returns:
            A request that the caller must still resume, because it may take long; or None.
        """
        request = held.request
        if request.operation in DATA_CHANGES:
            self._give_back(request)
        for follower in held.followers:
            self._resume(follower)
        return request._replace(flags=request.flags & ~INVALIDATE) if request.operation == Operation.LSEEK else None

    def _do(self, request: Request) -> None:
        try:
            self._table[request.operation](request)  # type: ignore[index]
        except OSError as error:
            self._fail(request, error.errno or errno.EIO)
        except Exception:
            _log.exception("request %s failed", request)
            self._fail(request, errno.EIO)

    def _conclude(self, request: Request, *, all_pages: bool = False) -> None:
        """Give back an answered request's slot; for a WRITE with INVALIDATE, after the kernel has dropped its pages.

        Such a WRITE is answered before, because the kernel may keep its last page locked until it has the answer.
        """
        if request.operation in DATA_CHANGES and request.flags & INVALIDATE:
            # In the previous worker, this request may have waited for the ranges of other writes, too.
            offset, length = (0, 0) if all_pages else (request.offset, request.length)
            nodeid = request.extra[0] if request.operation == Operation.WRITE else request.nodeid
            replaced = self._invalidations.hold(request, nodeid, offset, length)
            if replaced is not None:
                self._give_back(replaced)
        else:
            self._give_back(request)

    def _fail(self, request: Request, number: int) -> None:
        self._counters.failed(opcode_of(request), number)
        if request.operation == Operation.WRITE and request.flags & CACHED:
            with suppress(OSError):  # no descriptor
                self._writeback_errors.note(self._fd(request), number, self._counters.rows[Opcode.WRITE][ERRORS])
        self._replies.error(request, number)

    def _give_back(self, request: Request) -> None:
        if request.operation == Operation.WRITE and request.flags & PIPED:
            self._slots.discard(request.slot)
        self._slots.give_back(request.slot)

    def resume(self, request: Request) -> None:
        """Resume a request, see `_resume`, unless it must wait until the kernel has dropped pages."""
        if not self._must_wait(request):
            self._resume(request)

    def _resume(self, request: Request) -> None:
        """Continue and answer a request that a previous worker may have begun or done, without doing anything twice.

        If the kernel refuses the answer, either it expects another `unique`, or a worker that died has answered before.
        Until it is known which, the slot stays lent. The front sends a reminder when it knows.
        """
        slots, slot = self._slots, request.slot
        while True:
            claim = slots.claims[slot]  # read first, because the front writes it last
            number = slots.numbers[slot]
            self._redo(request._replace(unique=number))
            if self._replies.accepted or request.operation == Operation.PROBE:
                self._conclude(request, all_pages=True)
                return
            all_received = slots.resent_received
            if (slots.claims[slot], slots.numbers[slot]) == (claim, number):
                if all_received:
                    self._conclude(self._refused(request), all_pages=True)
                return

    def _refused(self, request: Request) -> Request:
        """Return a request whose answer the kernel has refused; if it has changed data, pages are dropped first.

        If its caller was killed meanwhile, the kernel does not know that the file has changed.
        """
        has_changed = request.operation in DATA_CHANGES and self._slots.is_done(request.slot)
        if not has_changed or request.flags & CACHED:
            return request
        extra = (request.nodeid,) if request.operation == Operation.WRITE else request.extra
        return request._replace(flags=request.flags | INVALIDATE, extra=extra)

    def _redo(self, request: Request) -> None:
        if self._slots.is_done(request.slot):
            self._answer(request, ~self._slots.results[request.slot])
        else:
            self._do(request)

    def _finish(self, request: Request, result: int) -> None:
        """Note that a request is done, so that a successor does not do it again, and answer it."""
        self._slots.results[request.slot] = ~result
        self._slots.stages[request.slot] = _DONE
        self._answer(request, result)

    def _answer(self, request: Request, result: int) -> None:
        """Answer with *result* as number of bytes, or for FALLOCATE with success."""
        if request.operation == Operation.FALLOCATE:
            self._replies.error(request, 0)
        else:
            self._replies.count(request, result)

    def _fd(self, request: Request) -> int:
        return self._descriptors.get(request.handle, request.descriptor, request.file)

    def _read(self, request: Request) -> None:
        fd = self._fd(request)
        with _buffered(fd) if request.flags & BUFFERED else _UNCHANGED:
            self._counters.moved(Opcode.READ, self._replies.data(request, fd))

    def _pwrite(self, fd: int, payload: memoryview, offset: int) -> int:
        return self._retry_without_space(os.pwrite, fd, payload, offset)

    def _retry_without_space(self, act: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call *act*; if there is no space, try again for a moment.

        The space of a removed file becomes free only after the kernel has sent FORGET to the front.
        """
        for pause in _SPACE_PAUSES:
            try:
                return self._call(act, *arguments)
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
            self._call(time.sleep, pause)
        return self._call(act, *arguments)

    def _set_credentials(self, request: Request) -> None:
        self._setid.clear(bool(request.flags & KILL_PRIVILEGES))
        self._writer.assume(request.uid, request.gid)

    def _write(self, request: Request) -> None:
        fd = self._fd(request)
        slots = self._slots
        slot = request.slot
        flags = request.flags
        payload = slots.payload(slot, request.length)
        self._set_credentials(request)
        watched = _with_setid_bits(request.extra, fd)
        moved = self._splice_from_pipe(request, fd) if flags & PIPED and slots.stages[slot] != _APPENDING else None
        if moved is not None:
            count = moved
        elif flags & SINGLE_CALL:
            count = self._call(_write_once, fd, payload, 0 if flags & APPEND else request.offset)
        elif flags & APPEND:
            count = self._append(slot, fd, payload)
        else:
            with _buffered(fd) if flags & BUFFERED else _UNCHANGED:
                count = slots.results[slot] if slots.stages[slot] == _COPYING else 0
                count += self._pwrite(fd, payload[count:], request.offset + count)
                while count < request.length and flags & CACHED:
                    count += self._pwrite(fd, payload[count:], request.offset + count)
        self._counters.moved(Opcode.WRITE, count)
        self._expire_attributes(watched)
        self._finish(request, count)

    def _expire_attributes(self, watched: tuple[int, ...]) -> None:
        """Make the kernel drop the cached modes of inodes that may have lost set-ID bits."""
        for nodeid in watched:
            self._replies.expire(nodeid)

    def _append(self, slot: int, fd: int, payload: memoryview) -> int:
        """Append *payload* exactly once, although a worker that died may have appended a part or all of it.

        The file position shows that. It belongs to the front's open file description, so it survives the worker, and
        nothing else changes it. The worker sets it to a mark before the append. The append itself sets it to its end,
        in the same system call.

        Returns:
            The number of bytes that were appended, including those by a worker that died.
        """
        slots = self._slots
        if slots.stages[slot] == _APPENDING:
            size = slots.results[slot]
            done = slots.written[slot] + self._appended(fd, payload[slots.written[slot] :], size, slots.written[slot])
        else:
            size = os.fstat(fd).st_size
            done = 0
        self._mark(fd, size + len(payload) + done)
        slots.written[slot] = done
        slots.results[slot] = size
        slots.stages[slot] = _APPENDING
        if done < len(payload):
            rest = payload[done:]
            done += self._retry_without_space(os.pwritev, fd, [rest], -1, os.RWF_APPEND)
        return done

    @staticmethod
    def _mark(fd: int, position: int) -> None:
        for mark in _MARKS:
            try:
                os.lseek(fd, position + mark, os.SEEK_SET)
                return
            except OSError:  # beyond the maximum file size of the file system
                continue

    @staticmethod
    def _appended(fd: int, payload: memoryview, size: int, before: int) -> int:
        """Return how many bytes a worker that died had appended, see `_append`.

        Args:
            fd: the file.
            payload: the data that it should have appended.
            size: the size of the file before the first append.
            before: how many bytes had been appended before that.

        Raises:
            OSError: EIO, if the number cannot be determined.
        """
        length = len(payload)
        end = os.lseek(fd, 0, os.SEEK_CUR)
        for mark in _MARKS:
            # A worker that died between setting the mark and noting `done` has encoded `done` in the mark.
            noted = end - mark - (size + before + length) - before
            if 0 <= noted <= length:
                return noted
        if end == 0 and os.fstat(fd).st_size == size + before:  # the file was reopened, and nothing was appended
            return 0
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            file.seek(max(end - length, 0))
            tail = file.read(min(end, length))
        likely = end - size - before  # right if nobody else has appended; a kill may truncate a write
        counts = (likely, *range(length, 0, -1)) if 0 < likely <= length else range(length, 0, -1)
        for count in counts:
            if count <= len(tail) and tail[len(tail) - count :] == payload[:count]:
                return count
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _splice_from_pipe(self, request: Request, fd: int) -> int | None:
        """Splice the payload from the pipe into the file.

        At every moment each byte is in the file, in the slot, or in the pipe. So it does not matter when a previous
        worker died.

        Returns:
            The number of bytes written; None if the file does not support splice(2) or has no space. The rest of the
            payload is in the slot then.
        """
        slots = self._slots
        pipes = slots.pipes
        assert pipes is not None
        slot, length = request.slot, request.length
        done = length - pipes.left(slot)
        if slots.stages[slot] != _COPYING:
            if not request.flags & (APPEND | BUFFERED | SINGLE_CALL):
                try:
                    while done < length:
                        done += self._call(pipes.move, slot, fd, length - done, request.offset + done)
                    return done
                except OSError as error:
                    done = length - pipes.left(slot)
                    if done and not request.flags & CACHED:
                        return done
                    if error.errno not in _COPY_AFTER:
                        raise
            slots.results[slot] = done
            slots.stages[slot] = _COPYING
        while done < length:
            done += pipes.take(slot, slots.payload(slot, length)[done:])
        return None

    def _fsync(self, request: Request) -> None:
        if request.flags & DATA_ONLY:
            self._call(os.fdatasync, self._fd(request))
        else:
            self._call(os.fsync, self._fd(request))
        self._writeback_errors.note_reported(request, self._fd(request))
        self._replies.error(request, 0)

    def _flush(self, request: Request) -> None:
        fd = self._fd(request)
        self._call(os.close, os.dup(fd))  # network file systems report errors of earlier writes at close(2)
        self._replies.error(request, self._writeback_errors.error_of(request, fd))

    def _fallocate(self, request: Request) -> None:
        self._set_credentials(request)
        fd = self._fd(request)
        if request.extra[0] & (_FALLOC_FL_COLLAPSE_RANGE | _FALLOC_FL_INSERT_RANGE):
            slots, slot = self._slots, request.slot
            now = os.fstat(fd)
            if slots.stages[slot] == _SHIFTING and self._has_shifted(request, now):
                self._finish(request, 0)
                return
            slots.results[slot], slots.written[slot] = now.st_size, now.st_ctime_ns
            slots.stages[slot] = _SHIFTING
        watched = _with_setid_bits(request.extra[1:], fd)
        self._retry_without_space(syscalls.fallocate, fd, request.extra[0], request.offset, request.length)
        self._expire_attributes(watched)
        self._finish(request, 0)

    def _has_shifted(self, request: Request, now: os.stat_result) -> bool:
        """Return whether a worker that died had already collapsed or inserted the range.

        Raises:
            OSError: EIO, if this cannot be determined because others have changed the file meanwhile.
        """
        size, changed = self._slots.results[request.slot], self._slots.written[request.slot]
        shift = -request.length if request.extra[0] & _FALLOC_FL_COLLAPSE_RANGE else request.length
        if now.st_size == size + shift:
            return True
        if (now.st_size, now.st_ctime_ns) == (size, changed):
            return False
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _lseek(self, request: Request) -> None:
        self._replies.position(request, self._call(os.lseek, self._fd(request), request.offset, request.extra[0]))

    def _copy_file_range(self, request: Request) -> None:
        handle, descriptor, offset, nodeid, file, *own = request.extra
        self._fd(request)
        source = self._descriptors.get(handle, descriptor, file)
        self._set_credentials(request)
        length = min(request.length, _MAX_COPY)
        accessed = os.fstat(source).st_atime_ns
        try:
            fd = self._fd(request)
            watched = _with_setid_bits(own, fd)
            count = self._retry_without_space(os.copy_file_range, source, fd, length, offset, request.offset)
        except OSError as error:
            # The kernel then copies through its page cache itself (fs/fuse/file.c, fuse_copy_file_range()).
            if error.errno in (errno.EXDEV, errno.ENOSYS):
                error.errno = errno.EOPNOTSUPP
            raise
        self._counters.moved(Opcode.WRITE, count)
        if os.fstat(source).st_atime_ns != accessed:  # the kernel's cache still has the old access time
            self._replies.expire(nodeid)
        self._expire_attributes(watched)
        self._finish(request, count)

    def _getattr(self, request: Request) -> None:
        reply = request.extra[1]
        self._replies.ready(reply[:8] + request.unique.to_bytes(8, sys.byteorder) + reply[16:])

    def _syncfs(self, request: Request) -> None:
        self._call(syscalls.syncfs, self._fd(request))
        self._replies.error(request, 0)

    def _trace(self, request: Request) -> None:
        if self._choose_replies is not None:
            self._replies = self._choose_replies()
