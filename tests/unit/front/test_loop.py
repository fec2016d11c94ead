"""Requests after the death of a front: sent again, lethal, or never sent again."""

from __future__ import annotations

import errno
import logging
import os
import struct
from typing import NoReturn

import pytest

from llloop.front.inodes import ROOT
from llloop.front.tree import Tree
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.shared.negotiation import Capabilities, Feature
from tests.unit.front.recovery.test_resent import mkdir, write
from tests.unit.killable_front import Killed, Life, Line, Request

# So many fronts may die of one request.
FATAL_ATTEMPTS = 3


def deadly(*arguments: object) -> NoReturn:
    raise Killed


def test_only_a_successor_asks_for_resend(line: Line) -> None:
    assert line.notifications == []
    line.serve_resent()
    assert line.notifications == [fuse.FUSE_NOTIFY_RESEND]


def test_request_that_kills_fronts_gets_eio(
    line: Line, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = mkdir(line)
    with monkeypatch.context() as patch:
        patch.setattr(Tree, "mkdir", deadly)
        with pytest.raises(Killed):
            line.ask(request)
        unique = line.unique
        for _ in range(FATAL_ATTEMPTS):
            assert unique not in line.answers
            with pytest.raises(Killed):
                line.serve_resent()
        with caplog.at_level(logging.ERROR):
            line.serve_resent()
    assert line.answers[unique].error == errno.EIO
    assert "it gets EIO" in caplog.text
    assert line.answer(request).error == 0, "the same words in another request are no reason to refuse it"


def test_attempts_are_counted_for_each_request(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    request = mkdir(line)
    monkeypatch.setattr(Tree, "mkdir", deadly)
    for _ in range(2):
        with pytest.raises(Killed):
            line.ask(request)
        unique = line.unique
        for _ in range(FATAL_ATTEMPTS):
            with pytest.raises(Killed):
                line.serve_resent()
        line.serve_resent()
        assert line.answers[unique].error == errno.EIO


def test_resent_requests_are_served_before_new_ones(line: Line) -> None:
    nodeid = write(line, "file")
    handle = line.open(nodeid)
    line.context.handles.get(handle).read_flags = None
    reads = [Request(Opcode.READ, nodeid, struct.pack("=QQIIQII", handle, at, 2, 0, 0, 0, 0)) for at in (0, 2, 4)]
    for number, request in enumerate(reads):
        line.unanswered[line.unique + 1000 + number] = request
    line.serve_resent()
    assert [line.answers[line.unique - 2 + 1000 + number].payload for number in range(3)] == [b"co", b"nt", b"en"]


def test_forget_does_not_end_the_resend_phase(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel queues FORGET separately, and does not send it again."""
    nodeid = write(line, "file")
    resent = mkdir(line)
    with monkeypatch.context() as patch:
        patch.setattr(Tree, "mkdir", deadly)
        with pytest.raises(Killed):
            line.ask(resent)
    unique = line.unique
    send = line.kernel.send

    def with_a_forget_before(data: bytes) -> int:
        send(Request(Opcode.FORGET, nodeid, struct.pack("=Q", 1)).packed(0))
        return send(data)

    class Sending:
        def __getattr__(self, name: str) -> object:
            return with_a_forget_before if name == "send" else getattr(kernel, name)

    kernel = line.kernel
    line.kernel = Sending()  # type: ignore[assignment]
    try:
        line.serve_resent()
    finally:
        line.kernel = kernel
    assert line.answers[unique].error == 0
    assert nodeid not in line.context.inodes


def without_resend(line: Line) -> None:
    line.capabilities = Capabilities(38, Feature.SETXATTR_EXT)


def test_without_resend_unanswered_requests_get_eio(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.9, no other process answers them."""
    without_resend(line)
    write(line, "file")
    request = mkdir(line)
    with monkeypatch.context() as patch:
        patch.setattr(Tree, "mkdir", deadly)
        with pytest.raises(Killed):
            line.ask(request)
    unique = line.unique
    refused = []
    write_to = os.write
    with monkeypatch.context() as patch:

        def kernel_write(fd: int, data: bytes) -> int:
            """As /dev/fuse: an answer to what is not asked is ENOENT, and number 0 is no request."""
            if fd != line.device:
                return write_to(fd, data)
            _, error, number = struct.unpack_from("=IiQ", data)
            if number == 0:
                raise OSError(errno.EINVAL, "no such notification")
            if number != unique:
                raise FileNotFoundError(errno.ENOENT, "nobody waits for it")
            refused.append(-error)
            return len(data)

        patch.setattr(os, "write", kernel_write)
        line.next_front(Life(None))
        line.front.loop.serve_resent()
    assert refused == [errno.EIO]
    line.unanswered.clear()
    assert line.answer(request).error in (0, errno.EEXIST)


def test_without_resend_workers_answer_their_requests(line: Line) -> None:
    without_resend(line)
    nodeid = write(line, "file")
    handle = line.open(nodeid)
    line.context.handles.get(handle).read_flags = None
    read = Request(Opcode.READ, nodeid, struct.pack("=QQIIQII", handle, 0, 2, 0, 0, 0, 0))
    assert line.ask(read) is None, "it is the worker's"
    unique = line.unique
    line.next_front(Life(None))
    line.front.loop.serve_resent()
    line.collect()
    assert unique in line.unanswered
    assert sum(map(bool, line.slots.states)) == 1


def test_unmount_ends_the_loop(line: Line) -> None:
    line.next_front(Life(None))
    line.unmount()
    line.front.loop.serve_resent()
    line.front.loop.run()
    assert len(line.context.handles) == 0 and ROOT in line.context.inodes


@pytest.mark.parametrize("error", [errno.ENODEV, errno.ECONNABORTED])
def test_error_of_an_ended_connection_ends_the_loop(line: Line, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(error, os.strerror(error))

    line.next_front(Life(None))
    monkeypatch.setattr(os, "readv", fail)
    line.front.loop.run()
