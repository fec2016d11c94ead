"""Preflight checks: which requests are probed, which places, and how the answer is handled."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llloop.front.inodes import ROOT
from llloop.front.loop import Loop
from llloop.front.preflight import Preflight
from llloop.front.recovery.intents import NOWHERE
from llloop.front.request import FuseRequest
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.shared.journal import Journal
from llloop.shared.messages import ASK_SERVER, PROBED, Operation, Request, decode_strictly, encode
from llloop.workers.descriptors import Descriptors
from llloop.workers.preflight import Probes
from tests.server_processes import wait_until
from tests.unit.source import MYSELF, Source
from tests.unit.support import close_journal, open_descriptors, packet_pipe, packets

HEADER = fuse.IN_HEADER


def request(opcode: Opcode, nodeid: int, body: bytes = b"", unique: int = 7) -> bytes:
    return HEADER.pack(fuse.IN_HEADER_SIZE + len(body), opcode, unique, nodeid, 0, 0, 0).ljust(40, b"\0") + body


class Front:
    """A front with preflight checks, its source, and the worker that it asks."""

    def __init__(self, directory: Path) -> None:
        (directory / "outer" / "inner").mkdir(parents=True)
        (directory / "outer" / "inner" / "file").write_bytes(b"content")
        self.pipe = packet_pipe()
        self.reader, writer = self.pipe.__enter__()
        self.source = Source(directory, [(self.reader, writer)])
        self.answers, self.told = os.pipe2(os.O_CLOEXEC)
        self.context = self.source.context
        self.slots = self.context.router.slots
        self.preflight = Preflight(self.context, self.answers)
        tree = self.source.tree
        self.outer, _ = tree.lookup(ROOT, b"outer")
        self.inner, _ = tree.lookup(self.outer, b"inner")
        self.file, _ = tree.lookup(self.inner, b"file")
        for nodeid in (self.outer, self.inner, self.file):
            tree.inodes.count(nodeid)

    def ask(self, data: bytes) -> bool:
        request = FuseRequest(self.slots.memory, NOWHERE)
        request.slot = self.slots.free_slot()
        base = self.slots.request_offset(request.slot)
        self.slots.memory[base : base + len(data)] = data
        request.is_received(base, len(data), 1)
        return self.preflight.ask(request)

    def sent(self) -> list[Request]:
        return [decode_strictly(message) for message in packets(self.reader)]

    def places(self, data: bytes) -> tuple[tuple[int, bytes], ...]:
        assert self.ask(data)
        (message,) = self.sent()
        assert message.operation == Operation.PROBE
        self.slots.give_back(message.slot)
        return message.extra

    def close(self) -> None:
        self.source.close()
        self.pipe.__exit__(None, None, None)
        os.close(self.answers)
        os.close(self.told)


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    own = Front(tmp_path)
    yield own
    own.close()


def named(opcode: Opcode, nodeid: int, fixed: int, *names: bytes) -> bytes:
    """A request with *fixed* bytes between its header and its names."""
    return request(opcode, nodeid, bytes(fixed) + b"".join(name + b"\0" for name in names))


@pytest.mark.parametrize(
    ("opcode", "fixed"),
    [
        (Opcode.LOOKUP, 0),
        (Opcode.UNLINK, 0),
        (Opcode.RMDIR, 0),
        (Opcode.MKDIR, 8),
        (Opcode.MKNOD, 16),
        (Opcode.CREATE, 16),
    ],
)
def test_name_is_probed_by_path(front: Front, opcode: Opcode, fixed: int) -> None:
    assert front.places(named(opcode, front.inner, fixed, b"new")) == ((-1, b"outer/inner/new"),)


def test_symlink_is_probed_itself(front: Front) -> None:
    assert front.places(named(Opcode.SYMLINK, ROOT, 0, b"link", b"/etc/passwd")) == ((-1, b"link"),)


def test_rename_and_link_probe_both_places(front: Front) -> None:
    new_parent = ROOT.to_bytes(8, "little")
    rename = request(Opcode.RENAME, front.inner, new_parent + b"file\0moved\0")
    assert front.places(rename) == ((-1, b"outer/inner/file"), (-1, b"moved"))
    rename2 = request(Opcode.RENAME2, front.inner, new_parent + bytes(8) + b"file\0moved\0")
    assert front.places(rename2) == ((-1, b"outer/inner/file"), (-1, b"moved"))
    link = request(Opcode.LINK, ROOT, front.file.to_bytes(8, "little") + b"other\0")
    assert front.places(link) == ((-1, b"other"), (-1, b"outer/inner/file"))


@pytest.mark.parametrize("opcode", [Opcode.GETATTR, Opcode.SETATTR, Opcode.OPEN, Opcode.OPENDIR, Opcode.GETXATTR])
def test_inode_is_probed_by_path(front: Front, opcode: Opcode) -> None:
    assert front.places(request(opcode, front.file, bytes(96))) == ((-1, b"outer/inner/file"),)
    assert front.places(request(opcode, ROOT, bytes(96))) == ((-1, b""),)


def test_unnamed_file_is_probed_by_descriptor(front: Front) -> None:
    front.source.tree.unlink(front.inner, b"file", MYSELF)
    ((descriptor, path),) = front.places(request(Opcode.GETATTR, front.file, bytes(16)))
    assert path == b""
    assert os.fstat(descriptor).st_nlink == 0


def test_release_is_probed(front: Front) -> None:
    number, _ = front.source.files.open(front.file, os.O_RDONLY, False, MYSELF)
    release = request(Opcode.RELEASE, front.file, number.to_bytes(8, "little") + bytes(16))
    assert front.places(release) == ((front.context.handles.get(number).descriptor, b""),)


def test_each_readdir_asks_the_server(front: Front) -> None:
    for offset in (0, 3):
        body = (1).to_bytes(8, "little") + offset.to_bytes(8, "little") + (4096).to_bytes(4, "little") + bytes(12)
        assert front.ask(request(Opcode.READDIR, front.inner, body))
        assert front.sent()[0].flags == ASK_SERVER


def test_changes_ask_the_server(front: Front) -> None:
    assert front.ask(request(Opcode.OPEN, front.file, bytes(8)))
    assert front.ask(named(Opcode.LOOKUP, ROOT, 0, b"name"))
    assert [message.flags for message in front.sent()] == [ASK_SERVER, 0]


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a/b"])
def test_probe_does_not_leave_the_source(front: Front, name: bytes) -> None:
    assert not front.ask(named(Opcode.LOOKUP, front.inner, 0, name))
    assert len(front.preflight) == 0


def test_unknown_inode_is_not_probed(front: Front) -> None:
    assert not front.ask(request(Opcode.GETATTR, 999_999, bytes(16)))
    assert not front.ask(request(Opcode.LOOKUP, ROOT, b"no end"))
    assert not front.ask(request(Opcode.RELEASE, ROOT, bytes(24)))
    assert front.sent() == []


def test_too_long_path_is_not_probed(front: Front) -> None:
    parent = ROOT
    for _ in range(20):
        parent, _ = front.source.tree.mkdir(parent, b"d" * 250, 0o755, MYSELF)
    assert not front.ask(named(Opcode.LOOKUP, parent, 0, b"name"))


def test_requests_on_one_object_are_probed_by_one_worker(front: Front) -> None:
    """There are more than slots; those that do not fit are parked like all others."""
    for unique in range(10, 20):
        assert front.ask(request(Opcode.GETATTR, front.file, bytes(16), unique))
    assert len(front.preflight) == 10
    assert front.context.router.backlog
    assert 0 < len(front.sent()) < 10


def test_answer_returns_the_request_once(front: Front) -> None:
    data = request(Opcode.GETATTR, front.file, bytes(16))
    assert front.ask(data)
    os.write(front.told, PROBED.pack(7) + PROBED.pack(7) + PROBED.pack(8))
    assert [asked for asked, _ in front.preflight.answered()] == [data]
    assert len(front.preflight) == 0


def test_loop_serves_others_during_a_probe(front: Front) -> None:
    """Of two requests the second one is answered first, because its probe is done."""
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.settimeout(30)
    journal = Journal(64)
    loop = Loop(front.context, device.fileno(), journal, front.preflight)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    try:
        for unique in (1, 2):
            kernel.send(request(Opcode.GETATTR, front.file, bytes(16), unique))
        assert wait_until(lambda: len(front.preflight) == 2)
        os.write(front.told, PROBED.pack(2))
        assert fuse.UNIQUE.unpack_from(kernel.recv(4096))[0] == 2
        # Requests that need no probe are still served at once.
        forget = request(Opcode.FORGET, front.file, (1).to_bytes(8, "little"), 3)
        kernel.send(forget)
        assert wait_until(lambda: front.file not in front.context.inodes)
        assert len(front.preflight) == 1
    finally:
        kernel.close()  # like an unmount while a request waits
        thread.join(30)
        device.close()
        close_journal(journal)
    assert not thread.is_alive()


@pytest.fixture
def probes(front: Front) -> Iterator[Probes]:
    front.slots.set_front(os.getpid())
    yield Probes(front.source.root, Descriptors(front.slots), front.told)


def probe(*places: tuple[int, bytes], flags: int = 0) -> Request:
    return decode_strictly(encode((Operation.PROBE, 7, 0, -1, -1, 0, 0, flags, 0, 0, places)))


@pytest.mark.parametrize("flags", [0, ASK_SERVER])
@pytest.mark.parametrize(
    "path", [b"", b"outer", b"outer/inner/file", b"outer/none", b"none/none", b"outer/inner/file/x"]
)
def test_worker_answers_each_probe_and_leaks_nothing(front: Front, probes: Probes, path: bytes, flags: int) -> None:
    before = open_descriptors()
    probes.probe(probe((-1, path), (-1, b"outer"), flags=flags))
    assert os.read(front.answers, 64) == PROBED.pack(7)
    assert open_descriptors() == before


def test_worker_does_not_follow_symlinks(front: Front, probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    (front.source.path / "out").symlink_to("/")
    opened: list[bytes] = []
    real = os.open

    def spying(name: bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        fd = real(name, flags, mode, dir_fd=dir_fd)
        opened.append(os.readlink(f"/proc/self/fd/{fd}").encode())
        return fd

    monkeypatch.setattr(os, "open", spying)
    probes.probe(probe((-1, b"out/etc/passwd"), flags=ASK_SERVER))
    assert opened == [bytes(front.source.path / "out")]


def test_missing_name_asks_the_server_for_its_directory(
    front: Front, probes: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "llloop.workers.preflight.file_system_type", lambda fd: asked.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    probes.probe(probe((-1, b"outer/inner/new"), flags=ASK_SERVER))
    assert asked == [str(front.source.path / "outer" / "inner")]
