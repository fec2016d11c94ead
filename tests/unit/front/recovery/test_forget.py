"""FORGET is sent once: wherever the front dies in it, the next one finishes it, and counts nothing twice."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from llloop.front.inodes import ROOT
from llloop.front.recovery import forget
from llloop.front.request import FuseRequest
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from tests.unit.killable_front import PROBE, Killed, Life, Line, Request, _Packing, living
from tests.unit.support import packet_pipe

LOOKED_UP = {"often": 3, "once": 1, "twice": 2, "removed": 1, "kept": 2}
FORGOTTEN = {"often": 1, "once": 1, "twice": 2, "removed": 1}
LEFT = {"often": 2, "kept": 2}


class Known:
    """A mount whose kernel knows some files, one of which has lost its name."""

    def __init__(self, path: Path, pipe: tuple[int, int]) -> None:
        self.line = Line(path, [pipe])
        self.numbers = {}
        for name, times in LOOKED_UP.items():
            (path / name).touch()
            for _ in range(times):
                self.numbers[name] = self.line.lookup(name.encode())
        assert self.line.answer(Request(Opcode.UNLINK, ROOT, b"removed\0")).error == 0

    def forget(self, request: Request, life: Life) -> bool:
        """Return whether the front lived through it."""
        try:
            with mock.patch.object(forget, "ENTRY_COUNT", _Packing(forget.ENTRY_COUNT, life)):
                self.line.ask(request, life)
                while self.line.context.forgetting.unfinished:
                    with living(life):
                        self.line.front.serve()
        except Killed:
            return False
        finally:
            self.line.unanswered.clear()  # no answer is expected
        return True

    def left(self) -> dict[str, int]:
        inodes = self.line.context.inodes
        return {name: inodes.lookups(nodeid) for name, nodeid in self.numbers.items() if nodeid in inodes}

    def batch(self) -> Request:
        body = struct.pack("=II", len(FORGOTTEN), 0)
        for name, times in FORGOTTEN.items():
            body += struct.pack("=QQ", self.numbers[name], times)
        return Request(Opcode.BATCH_FORGET, 0, body)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    with packet_pipe() as ends:
        yield ends


@pytest.mark.parametrize("portion", [1, 3, 512])
@pytest.mark.parametrize("deaths", [1, 2])
def test_a_batch_is_finished_wherever_the_front_dies(
    tmp_path: Path, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, deaths: int, portion: int
) -> None:
    monkeypatch.setattr(forget, "PORTION", portion)
    # At the first step the front has not received it, so the kernel still has it.
    for steps in range(1, 200):
        known = Known(tmp_path / f"{steps}", pipe)
        line = known.line
        try:
            lived = known.forget(known.batch(), Life(steps))
            for further in range(1, deaths):
                with suppress(Killed):
                    line.next_front(Life(steps // 2 + further))
            line.serve_resent()
            while line.context.forgetting.unfinished:
                line.front.serve()
            assert known.left() == LEFT, f"after a death at step {steps}"
            held = {os.readlink(f"/proc/self/fd/{fd}") for fd in line.extra_descriptors()}
            assert not any("deleted" in path for path in held), f"after a death at step {steps}: {held}"
        finally:
            line.close()
        if lived:
            assert steps > 2 * len(FORGOTTEN), "hardly a step was seen"
            return
    raise AssertionError("it has no end")


def test_a_single_one_is_finished(tmp_path: Path, pipe: tuple[int, int]) -> None:
    for steps in range(1, 50):
        known = Known(tmp_path / f"{steps}", pipe)
        try:
            lived = known.forget(Request(Opcode.FORGET, known.numbers["often"], struct.pack("=Q", 2)), Life(steps))
            known.line.serve_resent()
            assert known.left() == {**LOOKED_UP, "often": 1}, f"after a death at step {steps}"
        finally:
            known.line.close()
        if lived:
            return
    raise AssertionError("it has no end")


def test_others_are_served_between_the_portions_of_a_batch(
    tmp_path: Path, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forget, "PORTION", 1)
    known = Known(tmp_path / "source", pipe)
    line = known.line
    try:
        line.ask(known.batch())
        portions = 1
        while known.left() != LEFT:
            before = known.left()
            if line.ask(PROBE) is None:
                line.front.serve()
                line.collect()
            portions += 1
            assert known.left() != before
            assert line.unique in line.answers
        assert portions == len(FORGOTTEN)
        assert not any(line.slots.states)
        line.answer(PROBE)
    finally:
        line.close()


def test_a_batch_may_be_as_large_as_a_request_can_be(tmp_path: Path, pipe: tuple[int, int]) -> None:
    known = Known(tmp_path / "source", pipe)
    context = known.line.context
    slots = context.router.slots
    base = slots.request_offset(0)
    count = (slots.payload_size + fuse.WRITE_HEADER_SIZE - fuse.BATCH_FORGET_REQUEST.size) // fuse.FORGET_ONE.size
    try:
        nodeid = known.numbers["often"]
        entry = fuse.FORGET_ONE.pack(nodeid, 1 << 63)
        header = struct.pack("=IIQQIIIHH", 0, Opcode.BATCH_FORGET, 0, 0, 0, 0, 0, 0, 0)
        request = header + struct.pack("=II", count, 0) + entry * count
        slots.memory[base : base + len(request)] = request
        fuse.OPCODE.pack_into(slots.memory, base, len(request), Opcode.BATCH_FORGET)
        one = FuseRequest(slots.memory, context.intents.note(0))
        one.is_received(base, len(request), 0)
        context.forgetting.forget(one)
        while context.forgetting.unfinished:
            one.is_received(*context.forgetting.unfinished.popleft(), 0)
            context.forgetting.forget(one)
        assert nodeid not in context.inodes
    finally:
        known.line.close()
