"""The data requests, as system calls on the files themselves."""

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
    DATA_ONLY,
    INVALIDATE,
    KILL_PRIVILEGES,
    ONCE,
    PIPED,
    Operation,
    Request,
)
from llloop.shared.metrics import ERRORS, Sheet
from llloop.shared.slots import Slots
from llloop.workers.invalidations import Held, Invalidations
from llloop.workers.replies import Replies
from llloop.workers.writeback_errors import WritebackErrors

_log = logging.getLogger(__name__)

# One reply cannot report more (struct fuse_write_out.size has 32 bits), and other files of the shard wait meanwhile.
_COPY_AT_ONCE = 64 * 1024 * 1024

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
# What a splice fails with and a write may not: a file that takes no splice, and want of room, which may pass.
_TO_COPY = _NO_ROOM | {errno.EINVAL}
_ROOM_PAUSES = (0.001, 0.01)  # seconds

# Where the position of an open file is put before an append, in bytes behind where its end should be then: the first
# that the file system allows.
_MARKS = (1 << 31, 4093)

# The kernel's number of each operation, under which it is counted; FSYNCDIR counts as FSYNC.
_OPCODES = (0, *(int(Opcode.__members__.get(operation.name, 0)) for operation in Operation))

# How far a request had come that must not be done twice, noted in its slot for a successor, and with it a number: for
# an append and a shift how large the file was before, and how much was written when the rest began to be copied from
# the pipe into the slot. When it is done, the number becomes negative by one store: what the answer says, with all bits
# turned.
_BEGUN, _APPENDING, _SHIFTING, _DONE, _COPYING = range(5)

# fallocate(2) modes that move what lies behind the range (<linux/falloc.h>).
_FALLOC_FL_COLLAPSE_RANGE, _FALLOC_FL_INSERT_RANGE = 0x08, 0x20


_AS_IT_IS = nullcontext()
_Result = TypeVar("_Result")


def opcode_of(request: Request) -> int:
    """Return the kernel's number of what is asked for, 0 if it is nothing known."""
    operation = request.operation
    return _OPCODES[operation] if 0 <= operation < len(_OPCODES) else 0


def _write_once(fd: int, payload: memoryview, offset: int) -> int:
    """Write by one system call, at the position of the open file if there are no others (ESPIPE)."""
    try:
        return os.pwrite(fd, payload, offset)
    except OSError as error:
        if error.errno != errno.ESPIPE:
            raise
    return os.write(fd, payload)


@contextmanager
def _buffered(fd: int) -> Iterator[None]:
    """Take O_DIRECT off a descriptor for a while.

    The flag is the open file's, shared with the front. All I/O of a file is one worker's, which does one request at a
    time; only where the front has to do a worker's work can two meet here, and then a direct request may be cached.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _watched(inodes: Sequence[int], fd: int) -> tuple[int, ...]:
    """Return those inodes, of the file *fd*, if it has set-ID bits to lose."""
    return tuple(inodes) if inodes and os.fstat(fd).st_mode & SETID_BITS else ()


class Descriptors(Protocol):
    """Where descriptors of open files come from: see `llloop.workers.descriptors`."""

    def get(self, handle: int, descriptor: int, file: int = 0) -> int: ...
    def release(self, handle: int) -> None: ...


class Operations:
    """Does what requests ask for, answers them and gives their slots back.

    Args:
        arena: the shared memory.
        descriptors: the open files.
        replies: where answers go.
        setid: decides about set-ID bits.
        writer: shows the source who writes.
        sheet: where bytes and errors are counted; requests are by who hands them in.
        invalidations: holds what waits for the kernel to drop pages.
        look: does PROBE.
        leadership: which thread serves.
    """

    def __init__(
        self,
        slots: Slots,
        descriptors: Descriptors,
        replies: Replies,
        setid: SetidGuard,
        writer: Writer,
        sheet: Sheet,
        invalidations: Invalidations,
        look: Callable[[Request], None] | None = None,
        leadership: Leadership | None = None,
    ) -> None:
        self._call = (leadership or Leadership()).call
        self._slots = slots
        self._descriptors = descriptors
        self._replies = replies
        self._setid = setid
        self._writer = writer
        self._sheet = sheet
        self._invalidations = invalidations
        self._late = WritebackErrors()
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
        }
        if look is not None:
            self._table[Operation.PROBE] = look

    def execute(self, request: Request) -> bool:
        """Do one request. Whatever happens, it is answered and nothing is raised but the death of /dev/fuse.

        Returns:
            False if it is held until the kernel has dropped pages, and answered in `go_on`.
        """
        if request.operation == Operation.RELEASE:
            for handle in request.extra:
                self._descriptors.release(handle)
                self._late.release(handle)
            return True
        if self._is_to_wait(request):
            return False
        self._do(request)
        if request.slot >= 0:
            if self._replies.heard or request.operation == Operation.PROBE:
                self._conclude(request)
            else:
                self._resume(request)
        return True

    def _is_to_wait(self, request: Request) -> bool:
        """Hold a request that has to wait until the kernel has dropped pages; return whether it is one."""
        if request.operation == Operation.LSEEK and request.flags & INVALIDATE:
            self._invalidations.hold(request, request.extra[1], 0, 0)
            return True
        return request.operation == Operation.GETATTR and self._invalidations.follow(request, request.extra[0])

    def go_on(self, held: Held) -> Request | None:
        """Go on with what was held, now that the kernel has dropped pages.

        Returns:
            What is to be resumed yet, as any request that may take long.
        """
        request = held.request
        if request.operation == Operation.WRITE:
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
        """Give the slot of an answered request back, for a WRITE with INVALIDATE when the kernel has dropped its pages.

        It is answered before, because the kernel may keep its last page locked until then.
        """
        if request.operation == Operation.WRITE and request.flags & INVALIDATE:
            # A worker before this one may have had this request wait for the pages of others, too.
            offset, length = (0, 0) if all_pages else (request.offset, request.length)
            replaced = self._invalidations.hold(request, request.extra[0], offset, length)
            if replaced is not None:
                self._give_back(replaced)
        else:
            self._give_back(request)

    def _fail(self, request: Request, number: int) -> None:
        self._sheet.failed(opcode_of(request), number)
        if request.operation == Operation.WRITE and request.flags & CACHED:
            with suppress(OSError):  # no descriptor
                self._late.note(self._fd(request), number, self._sheet.rows[Opcode.WRITE][ERRORS])
        self._replies.error(request, number)

    def _give_back(self, request: Request) -> None:
        if request.operation == Operation.WRITE and request.flags & PIPED:
            self._slots.discard(request.slot)
        self._slots.give_back(request.slot)

    def resume(self, request: Request) -> None:
        """Do a request that was begun before; see `_resume`. It is held as by `execute`."""
        if not self._is_to_wait(request):
            self._resume(request)

    def _resume(self, request: Request) -> None:
        """Do a request that was begun before, and answer it, without doing twice what counts once.

        An answer that the kernel does not take is due under another number, or was given before by a worker that died
        then. As long as it is not known which, the slot stays lent; the front sends a reminder when it knows.
        """
        slots, slot = self._slots, request.slot
        while True:
            claim = slots.claims[slot]  # first: the front notes it last
            number = slots.numbers[slot]
            self._do_again(request._replace(unique=number))
            if self._replies.heard or request.operation == Operation.PROBE:
                self._conclude(request, all_pages=True)
                return
            settled = slots.settled
            if (slots.claims[slot], slots.numbers[slot]) == (claim, number):
                if settled:
                    self._conclude(request, all_pages=True)
                return

    def _do_again(self, request: Request) -> None:
        stage = self._slots.stages[request.slot]
        result = self._slots.results[request.slot]
        if stage != _BEGUN and result < 0:
            self._answer(request, ~result)
        else:
            self._do(request)

    def _finish(self, request: Request, result: int) -> None:
        """Note that a request is done that must not be done twice, or not after others, and answer it."""
        self._slots.results[request.slot] = ~result
        self._slots.stages[request.slot] = _DONE
        self._answer(request, result)

    def _answer(self, request: Request, result: int) -> None:
        """Answer with a number of bytes if it is asked for."""
        if request.operation == Operation.FALLOCATE:
            self._replies.error(request, 0)
        else:
            self._replies.count(request, result)

    def _fd(self, request: Request) -> int:
        return self._descriptors.get(request.handle, request.descriptor, request.file)

    def _read(self, request: Request) -> None:
        fd = self._fd(request)
        with _buffered(fd) if request.flags & BUFFERED else _AS_IT_IS:
            self._sheet.moved(Opcode.READ, self._replies.data(request, fd))

    def _pwrite(self, fd: int, payload: memoryview, offset: int) -> int:
        return self._persistently(os.pwrite, fd, payload, offset)

    def _persistently(self, act: Callable[..., _Result], *arguments: Any) -> _Result:
        """Do what takes space, and if there is none, do it again a moment later.

        The space of a file removed just before is free only when the front has heard that the kernel forgot it.
        """
        for pause in _ROOM_PAUSES:
            try:
                return self._call(act, *arguments)
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
            self._call(time.sleep, pause)
        return self._call(act, *arguments)

    def _act_for(self, request: Request) -> None:
        self._setid.clear(bool(request.flags & KILL_PRIVILEGES))
        self._writer.assume(request.uid, request.gid)

    def _write(self, request: Request) -> None:
        fd = self._fd(request)
        slots = self._slots
        slot = request.slot
        flags = request.flags
        payload = slots.payload(slot, request.length)
        self._act_for(request)
        watched = _watched(request.extra, fd)
        moved = self._move(request, fd) if flags & PIPED and slots.stages[slot] != _APPENDING else None
        if moved is not None:
            count = moved
        elif flags & ONCE:
            count = self._call(_write_once, fd, payload, 0 if flags & APPEND else request.offset)
        elif flags & APPEND:
            count = self._append(slot, fd, payload)
        else:
            with _buffered(fd) if flags & BUFFERED else _AS_IT_IS:
                count = slots.results[slot] if slots.stages[slot] == _COPYING else 0
                count += self._pwrite(fd, payload[count:], request.offset + count)
                while count < request.length and flags & CACHED:
                    count += self._pwrite(fd, payload[count:], request.offset + count)
        self._sheet.moved(Opcode.WRITE, count)
        self._tell_of(watched)
        self._finish(request, count)

    def _tell_of(self, watched: tuple[int, ...]) -> None:
        """Have the kernel ask again for the modes of inodes that may have lost set-ID bits."""
        for nodeid in watched:
            self._replies.expire(nodeid)

    def _append(self, slot: int, fd: int, payload: memoryview) -> int:
        """Append once what a worker that died may have appended in part or in full, and return how much that is.

        The position of the open file tells. It belongs to the front's open file, so it outlives the worker, and nothing
        else moves it. It is put to a mark before the append; the append puts it to its own end, in one system call.
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
            done += self._persistently(os.pwritev, fd, [rest], -1, os.RWF_APPEND)
        return done

    @staticmethod
    def _mark(fd: int, position: int) -> None:
        for mark in _MARKS:
            try:
                os.lseek(fd, position + mark, os.SEEK_SET)
                return
            except OSError:  # no file can become so large there
                continue

    @staticmethod
    def _appended(fd: int, payload: memoryview, size: int, before: int) -> int:
        """Return how much a worker that died had appended when it died; see `_append`.

        Args:
            fd: the file.
            payload: what it was to append.
            size: how large the file was at first.
            before: how much had been appended before that.

        Raises:
            OSError: EIO, if it cannot be known.
        """
        length = len(payload)
        end = os.lseek(fd, 0, os.SEEK_CUR)
        for mark in _MARKS:
            # A worker that died while it noted how much was done has left that in the mark.
            noted = end - mark - (size + before + length) - before
            if 0 <= noted <= length:
                return noted
        if end == 0 and os.fstat(fd).st_size == size + before:  # opened again since, and nothing was appended
            return 0
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            file.seek(max(end - length, 0))
            tail = file.read(min(end, length))
        likely = end - size - before  # if nobody else has appended anything; a kill can cut a write short
        counts = (likely, *range(length, 0, -1)) if 0 < likely <= length else range(length, 0, -1)
        for count in counts:
            if count <= len(tail) and tail[len(tail) - count :] == payload[:count]:
                return count
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _move(self, request: Request, fd: int) -> int | None:
        """Move the payload from the pipe into the file.

        Each byte is in the file, in the slot or still in the pipe, so that it does not matter where a worker before
        this one died.

        Returns:
            How much was written; or None if the file takes no splice or has no room: the rest is in the slot then.
        """
        slots = self._slots
        pipes = slots.pipes
        assert pipes is not None
        slot, length = request.slot, request.length
        done = length - pipes.left(slot)
        if slots.stages[slot] != _COPYING:
            if not request.flags & (APPEND | BUFFERED | ONCE):
                try:
                    while done < length:
                        done += self._call(pipes.move, slot, fd, length - done, request.offset + done)
                    return done
                except OSError as error:
                    done = length - pipes.left(slot)
                    if done and not request.flags & CACHED:
                        return done
                    if error.errno not in _TO_COPY:
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
        self._late.settle(request, self._fd(request))
        self._replies.error(request, 0)

    def _flush(self, request: Request) -> None:
        fd = self._fd(request)
        self._call(os.close, os.dup(fd))  # where the source reports late write errors, it is at close(2)
        self._replies.error(request, self._late.error_of(request, fd))

    def _fallocate(self, request: Request) -> None:
        self._act_for(request)
        fd = self._fd(request)
        if request.extra[0] & (_FALLOC_FL_COLLAPSE_RANGE | _FALLOC_FL_INSERT_RANGE):
            slots, slot = self._slots, request.slot
            now = os.fstat(fd)
            if slots.stages[slot] == _SHIFTING and self._has_shifted(request, now):
                self._finish(request, 0)
                return
            slots.results[slot], slots.written[slot] = now.st_size, now.st_ctime_ns
            slots.stages[slot] = _SHIFTING
        watched = _watched(request.extra[1:], fd)
        self._persistently(syscalls.fallocate, fd, request.extra[0], request.offset, request.length)
        self._tell_of(watched)
        self._finish(request, 0)

    def _has_shifted(self, request: Request, now: os.stat_result) -> bool:
        """Whether a worker that died had taken the range out of the file, or put it in.

        Raises:
            OSError: EIO, if that cannot be known, since others have changed the file meanwhile.
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
        self._act_for(request)
        length = min(request.length, _COPY_AT_ONCE)
        accessed = os.fstat(source).st_atime_ns
        try:
            fd = self._fd(request)
            watched = _watched(own, fd)
            count = self._persistently(os.copy_file_range, source, fd, length, offset, request.offset)
        except OSError as error:
            # The kernel then copies through its page cache itself (fs/fuse/file.c, fuse_copy_file_range()).
            if error.errno in (errno.EXDEV, errno.ENOSYS):
                error.errno = errno.EOPNOTSUPP
            raise
        self._sheet.moved(Opcode.WRITE, count)
        if os.fstat(source).st_atime_ns != accessed:  # of which the kernel does not think
            self._replies.expire(nodeid)
        self._tell_of(watched)
        self._finish(request, count)

    def _getattr(self, request: Request) -> None:
        reply = request.extra[1]
        self._replies.ready(reply[:8] + request.unique.to_bytes(8, sys.byteorder) + reply[16:])

    def _syncfs(self, request: Request) -> None:
        self._call(syscalls.syncfs, self._fd(request))
        self._replies.error(request, 0)
