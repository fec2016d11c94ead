"""Fronts that die at any chosen step, and a socket that replaces the kernel."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from llloop.config import ServeConfig
from llloop.front.context import Context, build_context
from llloop.front.inodes import ROOT
from llloop.front.loop import Loop
from llloop.front.recovery import intents as intents_module
from llloop.front.recovery.takeover import begin_takeover
from llloop.front.request import FuseRequest
from llloop.linux import fuse, syscalls
from llloop.linux.fuse import FUSE_UNIQUE_RESEND, Opcode
from llloop.shared import journal as journal_module
from llloop.shared import table as table_module
from llloop.shared.journal import Journal
from llloop.shared.negotiation import Capabilities, Feature
from llloop.shared.slots import Slots
from llloop.shared.table import Table
from tests.unit.support import Heir, Reply, close_journal, heir_of_table, packet_pipe

ME = (os.geteuid(), os.getegid())

# The calls by which a front changes the source, pipes, devices, and the descriptor table shared with the keeper:
# functions of os and fcntl, C functions that llloop/linux/syscalls.py has (libc), and its numbers of system calls.
STEPS = (
    "fcntl.ioctl",
    "libc.fchownat",
    "libc.renameat2",
    "libc.utimensat",
    "os.chmod",
    "os.close",
    "os.dup2",
    "os.fchmod",
    "os.ftruncate",
    "os.link",
    "os.memfd_create",
    "os.mkdir",
    "os.mknod",
    "os.open",
    "os.pidfd_open",
    "os.pipe2",
    "os.pwrite",
    "os.pwritev",
    "os.read",
    "os.readv",
    "os.removexattr",
    "os.rename",
    "os.rmdir",
    "os.set_blocking",
    "os.setxattr",
    "os.splice",
    "os.symlink",
    "os.truncate",
    "os.unlink",
    "os.write",
    "syscall.fchmodat2",
    "syscall.pidfd_getfd",
)


class Killed(BaseException):
    """Stands for SIGKILL: the process does nothing more, whatever its exception handlers do."""


class Life:
    """How many steps a process takes until it is killed. A step is a store to shared memory, or one side of a call.

    Args:
        steps: the number of the step at which it is killed, or None to let it live.
    """

    def __init__(self, steps: int | None) -> None:
        self.left = steps
        self.taken = 0

    def step(self) -> None:
        if self.left is not None and self.taken >= self.left:
            raise Killed
        self.taken += 1

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def killable(*arguments: Any, **options: Any) -> Any:
            self.step()
            result = call(*arguments, **options)
            self.step()
            return result

        return killable


class _Cells:
    """Cells of shared memory; each store is a step."""

    def __init__(self, cells: memoryview, life: Life) -> None:
        self._cells = cells
        self.life = life

    def __getitem__(self, index: Any) -> Any:
        return self._cells[index]

    def __setitem__(self, index: int, value: int) -> None:
        self.life.step()
        self._cells[index] = value


class _Packing:
    """A struct whose packing is not atomic."""

    def __init__(self, packing: struct.Struct, life: Life) -> None:
        self._packing = packing
        self.life = life

    def pack_into(self, memory: Any, start: int, *values: Any) -> None:
        data = self._packing.pack(*values)
        middle = len(data) // 16 * 8
        self.life.step()
        memory[start : start + middle] = data[:middle]
        self.life.step()
        memory[start + middle : start + len(data)] = data[middle:]
        self.life.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packing, name)


def killable_journal(journal: Journal, life: Life) -> Heir:
    """Returns the journal's memory for a process with this life."""
    own = Heir(journal)
    own.cells = _Cells(own.cells, life)  # type: ignore[assignment]
    return own


def killable_table(table: Table, life: Life) -> Table:
    """Returns the table's memory for a process with this life."""
    own = heir_of_table(table)
    for cells in ("cells", "heads", "states"):
        setattr(own, cells, _Cells(getattr(own, cells), life))
    return own


def _places(step: str) -> Iterator[tuple[Any, str]]:
    """Yields where the function of a step is looked up when it is called."""
    module, _, name = step.partition(".")
    if module in ("libc", "syscall"):
        wanted = name if module == "libc" else "syscall"
        found = [key for key, value in vars(syscalls).items() if getattr(value, "__name__", None) == wanted]
        assert found, f"{syscalls.__name__} has no {step}"
        yield from ((syscalls, key) for key in found)
    else:
        yield {"os": os, "fcntl": fcntl}[module], name


_PLACES = {place for step in STEPS for place in _places(step)}


@contextmanager
def living(life: Life) -> Iterator[None]:
    """A process with this life does everything in the block, which may end with `Killed`."""
    patches = [
        mock.patch.object(journal_module, "RECORD_BODY", _Packing(journal_module.RECORD_BODY, life)),
        mock.patch.multiple(
            table_module,
            _write_row=_Packing(table_module.WHOLE_ROW, life).pack_into,
            _write_name_row=_Packing(table_module.NAME_ROW, life).pack_into,
            _write_own_name=_Packing(table_module.OWN_NAME, life).pack_into,
            MORE_ROW=_Packing(table_module.MORE_ROW, life),
        ),
        *(mock.patch.object(place, name, life.around(getattr(place, name))) for place, name in _PLACES),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


class Request(NamedTuple):
    """A request of the kernel."""

    opcode: Opcode
    nodeid: int
    body: bytes = b""

    def packed(self, unique: int) -> bytes:
        header = struct.pack("=IIQQIIIHH", 40 + len(self.body), self.opcode, unique, self.nodeid, *ME, 1, 0, 0)
        return header + self.body


PROBE = Request(Opcode.GETATTR, ROOT, bytes(16))


def descriptors() -> set[int]:
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(entry))
        except OSError:
            continue
        found.add(int(entry))
    return found


class Line:
    """One mount: fronts that succeed each other on one source, and a socket instead of /dev/fuse."""

    def __init__(
        self, path: Path, pipes: list[tuple[int, int]], features: int = 0, count: int = 4, **options: Any
    ) -> None:
        self.path = path
        path.mkdir()
        self.root = os.open(path, os.O_PATH | os.O_DIRECTORY)
        self.config = ServeConfig(source=str(path), mountpoint="/nowhere", workers=len(pipes), **options)
        self.capabilities = Capabilities(42, Feature.SETXATTR_EXT | Feature.HAS_RESEND | Feature(features))
        self.slots = Slots(count, 32 * fuse.PAGE_SIZE, len(pipes))
        self.journal, self.table = Journal(1 << 10), Table(1 << 10)
        self.pipes = pipes
        self.kernel, self._device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.setblocking(False)
        self.device = self._device.fileno()
        self.unique = 1000
        self.unanswered: dict[int, Request] = {}
        self.answers: dict[int, Reply] = {}
        self.notifications: list[int] = []
        self.own = descriptors()
        self.front: Front
        self.next_front(Life(None))

    def replace_device(self) -> None:
        """Put another socket in the device's place: a thread of a dead front that still reads gets the end of it."""
        kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kernel.setblocking(False)
        with kernel, device:
            os.dup2(device.fileno(), self._device.fileno(), inheritable=False)
            os.dup2(kernel.fileno(), self.kernel.fileno(), inheritable=False)

    def next_front(self, life: Life) -> None:
        """Start one; it dies of *life*, perhaps before it is ready."""
        with living(life):
            self.front = Front(self, life)

    def ask(self, request: Request, life: Life | None = None) -> Reply | None:
        """Have the front serve a request; None if it died and left no answer."""
        self.unique += 2
        unique = self.unique
        self.unanswered[unique] = request
        self.kernel.send(request.packed(unique))
        with living(life or Life(None)):
            if life is not None:
                self.front.is_of(life)
            try:
                self.front.serve()
            finally:
                self.collect()
        return self.answers.get(unique)

    def serve_resent(self, life: Life | None = None) -> None:
        """The front dies; start the next, send it again what has no answer, then ask something new."""
        self.drop_unread()
        for unique, request in self.unanswered.items():
            self.kernel.send(request.packed(unique | FUSE_UNIQUE_RESEND))
        self.unique += 2
        self.unanswered[self.unique] = PROBE
        self.kernel.send(PROBE.packed(self.unique))
        life = life or Life(None)
        try:
            self.next_front(life)
            with living(life):
                self.front.loop.serve_resent()
                self.front.serve()
        finally:
            self.collect()

    def drop_unread(self) -> None:
        """Take back what no front has read."""
        self._device.setblocking(False)
        try:
            while True:
                self._device.recv(1 << 20)
        except BlockingIOError:
            self._device.setblocking(True)
        for unique, request in list(self.unanswered.items()):
            if request is PROBE:
                del self.unanswered[unique]

    def unmount(self) -> None:
        """No more requests come; unlike /dev/fuse, the socket says so by nothing instead of by an error."""
        self.kernel.shutdown(socket.SHUT_WR)

    def collect(self) -> None:
        """Take the replies."""
        while True:
            try:
                data = self.kernel.recv(1 << 20)
            except BlockingIOError:
                return
            length, error, unique = fuse.OUT_HEADER.unpack_from(data)
            assert length == len(data)
            if unique == 0:
                self.notifications.append(error)
                continue
            unique &= ~FUSE_UNIQUE_RESEND
            assert unique in self.unanswered, "an answer to what is answered already, or was never asked"
            del self.unanswered[unique]
            self.answers[unique] = Reply(unique, -error, data[fuse.OUT_HEADER_SIZE :])

    def answer(self, request: Request) -> Reply:
        """Ask and be answered."""
        reply = self.ask(request)
        assert reply is not None
        return reply

    def lookup(self, name: bytes, parent: int = ROOT) -> int:
        reply = self.answer(Request(Opcode.LOOKUP, parent, name + b"\0"))
        assert reply.error == 0, errno.errorcode[reply.error]
        return int.from_bytes(reply.payload[:8], "little")

    def open(self, nodeid: int, flags: int = os.O_RDWR) -> int:
        opcode = Opcode.OPENDIR if flags & os.O_DIRECTORY else Opcode.OPEN
        reply = self.answer(Request(opcode, nodeid, struct.pack("=II", flags, 0)))
        assert reply.error == 0, errno.errorcode[reply.error]
        return int.from_bytes(reply.payload[:8], "little")

    @property
    def context(self) -> Context:
        return self.front.context

    def extra_descriptors(self) -> set[int]:
        """What is open besides what each front starts with."""
        return descriptors() - self.own

    def close(self) -> None:
        for fd in self.extra_descriptors():
            os.close(fd)
        self.kernel.close()
        self._device.close()
        os.close(self.root)
        close_journal(self.journal)
        self.table.close()


@contextmanager
def line_of_fronts(directory: Path, **options: Any) -> Iterator[Line]:
    """A `Line` with two workers' pipes and a new source below *directory*; for the options see `Line`."""
    umask = os.umask(0o022)
    with packet_pipe(8) as first, packet_pipe(8) as second:
        own = Line(directory / "source", [first, second], **options)
        yield own
        own.close()
    os.umask(umask)


class Front:
    """The objects of one front process; nothing is closed when it is dropped."""

    def __init__(self, line: Line, life: Life) -> None:
        self._journal, self._table = killable_journal(line.journal, life), killable_table(line.table, life)
        packing = _Packing(intents_module.NOTE, life)
        with mock.patch.object(intents_module, "NOTE", packing):
            writers = [writer for _, writer in line.pipes]
            context = self.context = build_context(
                line.config,
                line.capabilities,
                line.slots,
                self._journal,
                self._table,
                writers,
                line.root,
                line.device,
            )
        self._packing = packing
        is_successor = line.slots.generation > 0
        if is_successor:
            begin_takeover(context, self._journal, line.own)
        line.slots.set_front(os.getpid())
        if not is_successor:
            line.slots.note_resent_received()
        line.slots.touch()
        self.loop = Loop(context, line.device, self._journal)
        self._request = FuseRequest(line.slots.memory, context.intents.note(0))
        self._request.slot = line.slots.free_slot()

    def is_of(self, life: Life) -> None:
        """Go on with another life."""
        table = self._table
        mortals: tuple[Any, ...] = (self._journal.cells, self._packing, table.cells, table.heads, table.states)
        for mortal in mortals:
            mortal.life = life

    def serve(self) -> None:
        assert self.loop.receive(self._request)
        self.loop.serve(self._request)
