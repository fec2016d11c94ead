"""Two processes die at any distance of each other: a worker, its successor, and the front whose request they do.

Whatever the moments, the request is answered once, it is done once, and its slot is free in the end.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llloop.front.inodes import ROOT
from llloop.linux.credentials import SetidGuard
from llloop.linux.fuse import FUSE_UNIQUE_RESEND, Opcode
from llloop.shared.leadership import Leadership
from llloop.shared.messages import MAX_MESSAGE
from llloop.shared.messages import Request as WorkerRequest
from llloop.shared.metrics import ProcessCounters
from llloop.shared.slots import Slots
from llloop.workers.descriptors import Descriptors
from llloop.workers.invalidations import Invalidations
from llloop.workers.loop import Worker
from llloop.workers.operations import Operations
from llloop.workers.replies import KernelReplies
from tests.unit.front.recovery.test_resent import write
from tests.unit.killable_front import Killed, Line, Request
from tests.unit.support import OwnIdentity, Reply, packet_pipe

_MOST_STEPS = 60
BEFORE = b"before\n"
PAYLOAD = b"the line that is written once\n"


class Moment:
    """Runs a function at one step of a worker's work."""

    def __init__(self, step: int, what: Callable[[], None]) -> None:
        self._step = step
        self._what = what
        self._taken = count()
        self.came = False

    def step(self) -> None:
        if next(self._taken) == self._step:
            self.came = True
            self._what()

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            self.step()
            result = call(*arguments)
            self.step()
            return result

        return watched


class Cells:
    """Cells of the arena, every store to which is a step."""

    def __init__(self, cells: memoryview, moment: Moment) -> None:
        self._cells = cells
        self._moment = moment

    def __getitem__(self, place: int) -> int:
        return int(self._cells[place])

    def __setitem__(self, place: int, value: int) -> None:
        self._moment.step()
        self._cells[place] = value

    def __iter__(self) -> Iterator[int]:
        return iter(self._cells)

    def __bytes__(self) -> bytes:
        return bytes(self._cells)


class FrontsFiles:
    """A worker's descriptors: those of the front, which runs in this process."""

    def get(self, handle: int, descriptor: int, file: int = 0) -> int:
        return descriptor

    def release(self, handle: int) -> None:
        """Nothing is held."""


class Answers(KernelReplies):
    """Accepts an answer only with the `unique` that the kernel expects."""

    def __init__(self, mount: Mount, moment: Moment) -> None:
        super().__init__(-1, 1 << 20)
        self._mount = mount
        self._moment = moment

    def _send(self, reply: bytes | memoryview) -> None:
        self._moment.step()
        length, error, unique = struct.unpack_from("=IiQ", reply)
        known = unique & ~FUSE_UNIQUE_RESEND
        self.accepted = self._mount.number.get(known) == unique
        if self.accepted:
            del self._mount.number[known], self._mount.line.unanswered[known]
            self._mount.line.answers[known] = Reply(known, -error, bytes(reply[16:length]))
        self._moment.step()


class DropsAtOnce(Invalidations):
    """A kernel that drops pages at once, so that no request has to wait for that."""

    def __init__(self, moment: Moment) -> None:
        super().__init__(-1)
        self._moment = moment

    def hold(self, request: WorkerRequest, nodeid: int, offset: int, length: int) -> WorkerRequest:
        self._moment.step()
        return request


class Mount:
    """A front, a worker's pipe, and the kernel; workers and fronts succeed each other."""

    def __init__(self, path: Path, pipe: tuple[int, int]) -> None:
        self.line = Line(path, [pipe])
        self._pipe = pipe[0]
        self.path = path / "file"
        nodeid = write(self.line, "file", BEFORE.decode())
        self.handle = self.line.open(nodeid)
        self.line.context.handles.get(self.handle).write_flags = None
        # The `unique` with which the kernel expects the answer.
        self.number: dict[int, int] = {}

    def ask(self, request: Request) -> int:
        assert self.line.ask(request) is None, "the front has done it itself"
        self.number[self.line.unique] = self.line.unique
        return self.line.unique

    def replace_front(self) -> None:
        """The front dies, and the kernel sends again to the next what has no answer."""
        self.number = {unique: unique | FUSE_UNIQUE_RESEND for unique in self.number}
        self.line.serve_resent()

    def work(self, moment: Moment, *, successor: bool) -> None:
        """Be a worker until nothing is left in the pipe, or until it dies."""
        slots = self.line.slots
        watched = _watched(slots, moment)
        invalidations = DropsAtOnce(moment)
        operations = Operations(
            watched, FrontsFiles(), Answers(self, moment), SetidGuard(), OwnIdentity(), ProcessCounters(), invalidations
        )
        worker = Worker(
            0, watched, self._pipe, operations, ProcessCounters(), Descriptors(watched), Leadership(), invalidations
        )
        with pytest.MonkeyPatch.context() as patch:
            for name in ("pwritev", "pwrite", "lseek"):
                patch.setattr(os, name, moment.around(getattr(os, name)))
            if successor:
                worker.recover()
                assert worker.do_waiting()
            patch.setattr(os, "read", _until_empty(moment))
            worker.run()

    def close(self) -> None:
        self.line.close()


def _until_empty(moment: Moment) -> Callable[[int, int], bytes]:
    read = os.read

    def read_or_end(fd: int, size: int) -> bytes:
        moment.step()
        try:
            return read(fd, size)
        except BlockingIOError:
            return b""

    return read_or_end


def _watched(slots: Slots, moment: Moment) -> Any:
    """The arena in the hands of a worker every store of which is a step."""

    class Watched:
        stages = Cells(slots.stages, moment)
        results = Cells(slots.results, moment)
        written = Cells(slots.written, moment)

        def __getattr__(self, name: str) -> Any:
            return getattr(slots, name)

        def give_back(self, slot: int) -> None:
            moment.step()
            slots.give_back(slot)

    return Watched()


def write_request(mount: Mount, flags: int) -> Request:
    offset = 0 if flags & os.O_APPEND else len(BEFORE)
    body = struct.pack("=QQIIQII", mount.handle, offset, len(PAYLOAD), 0, 0, flags, 0) + PAYLOAD
    return Request(Opcode.WRITE, ROOT, body)


def die(*_: object) -> None:
    raise Killed


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Callable[[], Mount]]:
    made: list[Mount] = []
    with packet_pipe(8) as pipe:
        fcntl.fcntl(pipe[0], fcntl.F_SETFL, fcntl.fcntl(pipe[0], fcntl.F_GETFL) | os.O_NONBLOCK)

        def make() -> Mount:
            while made:
                made.pop().close()
            try:
                while os.read(pipe[0], MAX_MESSAGE):
                    pass
            except BlockingIOError:
                pass
            made.append(Mount(tmp_path / f"source-{next(numbers)}", pipe))
            return made[-1]

        numbers = count()
        yield make
        for mount in made:
            mount.close()


def check(mount: Mount, unique: int, what: str) -> None:
    """The last worker has nothing left to do."""
    mount.work(Moment(-1, die), successor=True)
    reply = mount.line.answers.get(unique)
    assert reply is not None and reply.error == 0, f"{what}: no answer, or an error: {reply}"
    assert int.from_bytes(reply.payload[:4], "little") == len(PAYLOAD), what
    assert mount.path.read_bytes() == BEFORE + PAYLOAD, what
    assert not any(mount.line.slots.states), f"{what}: a slot is lent for ever"


FLAGS = pytest.mark.parametrize("flags", [os.O_APPEND, 0], ids=["append", "write"])


@FLAGS
@pytest.mark.parametrize("order", ["worker", "worker, then front", "front, and the worker goes on"])
def test_death_of_worker_and_front(mounts: Callable[[], Mount], flags: int, order: str) -> None:
    for step in range(_MOST_STEPS):
        mount = mounts()
        unique = mount.ask(write_request(mount, flags))
        moment = Moment(step, mount.replace_front if order.startswith("front") else die)
        try:
            mount.work(moment, successor=False)
        except Killed:
            if order.endswith("front"):
                mount.replace_front()
        check(mount, unique, f"{order} at step {step}")
        if not moment.came:
            assert step > 5, "hardly a step was seen"
            return
    raise AssertionError("it has no end")


class Pair(NamedTuple):
    """A request in a new mount, and the moments of two workers that do it one after the other."""

    mount: Mount
    unique: int
    moments: tuple[Moment, Moment]
    what: str


def each_pair(
    mounts: Callable[[], Mount], flags: int, second: Callable[[Mount], None], phase: int | None = None
) -> Iterator[Pair]:
    """Yield a pair for all steps of a worker, at each of which it dies, and of its successor.

    Args:
        second: what happens at the step of the successor.
        phase: 0 or 1: for every other pair only, in turns, so that it is quick. None: for all.
    """
    for first in range(_MOST_STEPS):
        for step in count() if phase is None else count((first + phase) % 2, 2):
            mount = mounts()
            unique = mount.ask(write_request(mount, flags))
            moments = Moment(first, die), Moment(step, partial(second, mount))
            yield Pair(mount, unique, moments, f"a worker at step {first}, then at step {step} of the next")
            if not moments[1].came:
                break
        if not moments[0].came:
            return
    raise AssertionError("it has no end")


@FLAGS
@pytest.mark.parametrize("between", [0, 1, 2], ids=["", "front", "front twice"])
def test_death_of_worker_and_successor(mounts: Callable[[], Mount], flags: int, between: int) -> None:
    for mount, unique, (first, second), what in each_pair(mounts, flags, die, phase=between % 2):
        with suppress(Killed):
            mount.work(first, successor=False)
        for _ in range(between):
            mount.replace_front()
        with suppress(Killed):
            mount.work(second, successor=True)
        check(mount, unique, f"{what}, front replaced {between} times between")


@FLAGS
def test_death_of_front_during_a_successor(mounts: Callable[[], Mount], flags: int) -> None:
    for mount, unique, moments, what in each_pair(mounts, flags, Mount.replace_front):
        for number, moment in enumerate(moments):
            with suppress(Killed):
                mount.work(moment, successor=bool(number))
        check(mount, unique, what)


@FLAGS
def test_answered_write_does_not_overwrite_newer_data(mounts: Callable[[], Mount], flags: int) -> None:
    """After the answer, the program writes again; no process may do the first write after that."""
    newer = b"newer data, as long as the data before it was"
    for mount, unique, moments, what in each_pair(mounts, flags, die, phase=0):
        for number, moment in enumerate([*moments, Moment(-1, die), Moment(-1, die)]):
            answered = unique in mount.line.answers
            with suppress(Killed):
                mount.work(moment, successor=bool(number))
            if answered:
                assert mount.path.read_bytes() == newer, what
            elif unique in mount.line.answers:
                mount.path.write_bytes(newer)
            if number == 2:
                mount.replace_front()
