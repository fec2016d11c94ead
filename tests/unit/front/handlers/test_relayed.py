"""Requests of the event relay: they are answered as the relay needs it and never change the source."""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llloop.front.handlers import Handlers
from llloop.front.handlers.relayed import RelayedRequests
from llloop.front.inodes import GENERATION, ROOT
from llloop.front.request import FuseRequest
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.shared.relay import INODE_QUESTION, RELAY_UID, Answer, Place, RelayState
from tests.unit.source import Source
from tests.unit.support import Device, Reply

_OTHER_PID = 1
_MODE = struct.pack("=IIII", stat.S_IFREG | 0o644, 0, 0, 0)
_SETATTR = struct.pack("=II", fuse.FATTR_SIZE | fuse.FATTR_MODE, 0) + bytes(80)

# Every request that changes something, on the file "file" or the new name "new", as (opcode, on the file, body).
CHANGES = [
    (Opcode.MKNOD, False, _MODE + b"new\0"),
    (Opcode.MKDIR, False, struct.pack("=II", 0o755, 0) + b"new\0"),
    (Opcode.SYMLINK, False, b"new\0target\0"),
    (Opcode.UNLINK, False, b"file\0"),
    (Opcode.RMDIR, False, b"directory\0"),
    (Opcode.RENAME, False, struct.pack("=Q", ROOT) + b"file\0new\0"),
    (Opcode.RENAME2, False, struct.pack("=QII", ROOT, 0, 0) + b"file\0new\0"),
    (Opcode.LINK, False, None),
    (Opcode.SETATTR, True, _SETATTR),
    (Opcode.SETXATTR, True, struct.pack("=IIII", 1, 0, 0, 0) + b"user.new\0x"),
    (Opcode.REMOVEXATTR, True, b"user.old\0"),
    (Opcode.OPEN, True, struct.pack("=II", os.O_WRONLY | os.O_TRUNC, 0)),
    (Opcode.CREATE, False, struct.pack("=IIII", os.O_RDWR | os.O_CREAT, stat.S_IFREG | 0o644, 0, 0) + b"new\0"),
    (Opcode.TMPFILE, False, struct.pack("=IIII", os.O_RDWR, stat.S_IFREG | 0o644, 0, 0) + b"new\0"),
]


class Relay:
    """A relay and the front that serves it."""

    def __init__(self, source: Source, device: Device) -> None:
        self.state = RelayState()
        self.state.started()
        self._source = source
        self._device = device
        self._unique = 0x7000000000000000
        self.become_new_front()

    def become_new_front(self) -> None:
        context = self._source.context
        table: list[Callable[[FuseRequest], None]] = [_unknown] * (max(Opcode) + 1)
        for opcode, handler in Handlers(context, self._device.fd).table.items():
            table[opcode] = handler
        memory = context.router.slots.memory
        relayed = RelayedRequests(self.state, self._device.fd, memory, context.inodes, context.tree.getattr)
        self._table = relayed.before(table)
        self._request = FuseRequest(memory, context.intents.note(0))

    def ask(
        self, opcode: Opcode, nodeid: int, body: bytes = b"", uid: int = RELAY_UID, pid: int | None = None
    ) -> Reply:
        self._unique += 2
        slots, request = self._source.context.router.slots, self._request
        request.slot = slots.free_slot()
        base = slots.request_offset(request.slot)
        length = fuse.IN_HEADER_SIZE + len(body)
        pid = os.getpid() if pid is None else pid
        header = struct.pack("=IIQQIIIHH", length, opcode, self._unique, nodeid, uid, uid, pid, 0, 0)
        slots.memory[base : base + length] = header + body
        request.is_received(base, length, time.monotonic_ns())
        try:
            self._table[opcode](request)
        except OSError as error:
            return Reply(self._unique, error.errno or errno.EIO, b"")
        return self._device.only()

    def begin(self, *answers: tuple[bytes, int], is_directory: bool = False) -> None:
        self.state.begin(
            [Answer(Place(ROOT, name), nodeid, bytes(fuse.ATTR.size)) for name, nodeid in answers], is_directory
        )

    def looked_up(self, name: bytes) -> int:
        reply = self.ask(Opcode.LOOKUP, ROOT, name + b"\0")
        return 0 if reply.error else int(struct.unpack_from("=Q", reply.payload)[0])


def _unknown(request: FuseRequest) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture
def relay(source: Source, device: Device) -> Relay:
    (source.path / "file").write_bytes(b"content")
    (source.path / "directory").mkdir()
    return Relay(source, device)


@pytest.fixture
def file(relay: Relay) -> int:
    return relay.looked_up(b"file")


def tree(top: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        state = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(state.st_mode) else None
        found[str(path)] = (state.st_ino, state.st_mode, state.st_nlink, state.st_mtime_ns, state.st_ctime_ns, content)
    return found


def ids(value: object) -> str:
    return value.name if isinstance(value, Opcode) else ""


def body_of(opcode: Opcode, body: bytes | None, file: int) -> bytes:
    return struct.pack("=Q", file) + b"new\0" if body is None else body


@pytest.mark.parametrize(("opcode", "on_file", "body"), CHANGES, ids=ids)
@pytest.mark.parametrize("pid", [None, _OTHER_PID], ids=["relay", "other"])
def test_a_request_outside_of_an_event_changes_nothing(
    relay: Relay, source: Source, file: int, opcode: Opcode, on_file: bool, body: bytes | None, pid: int | None
) -> None:
    before = tree(source.path)
    reply = relay.ask(opcode, file if on_file else ROOT, body_of(opcode, body, file), pid=pid)
    assert reply.error in (errno.EPERM, errno.ESTALE)
    assert tree(source.path) == before


@pytest.mark.parametrize(("opcode", "on_file", "body"), CHANGES, ids=ids)
@pytest.mark.parametrize("new_front", [False, True], ids=["front", "new-front"])
def test_a_request_within_an_event_changes_nothing(
    relay: Relay, source: Source, file: int, opcode: Opcode, on_file: bool, body: bytes | None, new_front: bool
) -> None:
    before = tree(source.path)
    relay.begin((b"file", file), (b"new", 0))
    relay.looked_up(b"file")
    relay.looked_up(b"new")
    if new_front:
        relay.become_new_front()
    relay.ask(opcode, file if on_file else ROOT, body_of(opcode, body, file))
    assert tree(source.path) == before


def test_a_new_name_is_missing_and_then_a_phantom(relay: Relay) -> None:
    phantom = relay.state.new_phantom()
    relay.begin((b"file", 0))
    assert relay.ask(Opcode.LOOKUP, ROOT, b"file\0").error == errno.ENOENT
    reply = relay.ask(Opcode.MKNOD, ROOT, _MODE + b"file\0")
    nodeid, _, *validity = fuse.ENTRY_HEAD.unpack_from(reply.payload)
    assert (nodeid, validity) == (phantom, [0, 0, 0, 0])


@pytest.mark.parametrize("opcode", [Opcode.UNLINK, Opcode.RMDIR])
def test_a_removal_needs_a_lookup_before(relay: Relay, file: int, opcode: Opcode) -> None:
    relay.begin((b"file", file))
    assert relay.ask(opcode, ROOT, b"file\0").error == errno.ESTALE
    assert relay.looked_up(b"file") == file
    assert relay.ask(opcode, ROOT, b"file\0").error == 0


def test_a_rename_needs_a_lookup_of_both_names(relay: Relay, file: int) -> None:
    relay.begin((b"file", file), (b"new", 0))
    body = struct.pack("=Q", ROOT) + b"file\0new\0"
    relay.looked_up(b"file")
    assert relay.ask(Opcode.RENAME, ROOT, body).error == errno.ESTALE
    relay.looked_up(b"new")
    assert relay.ask(Opcode.RENAME, ROOT, body).error == 0


def test_attributes_in_the_reply_are_those_of_the_source(relay: Relay, file: int) -> None:
    relay.begin((b"file", file))
    reply = relay.ask(Opcode.SETATTR, file, _SETATTR)
    assert fuse.ATTR.unpack(reply.payload[fuse.ATTR_HEAD.size :])[1] == len(b"content")


def test_another_inode_than_that_of_the_event_is_refused(relay: Relay, file: int) -> None:
    relay.begin((b"new", relay.state.new_phantom()))
    assert relay.ask(Opcode.SETATTR, file, _SETATTR).error == errno.ESTALE
    assert relay.ask(Opcode.OPEN, file, struct.pack("=II", os.O_WRONLY, 0)).error == errno.ESTALE


def test_an_inode_that_is_gone_has_the_attributes_that_the_kernel_has(relay: Relay, source: Source, file: int) -> None:
    (source.path / "file").unlink()
    cached = fuse.ATTR.pack(file, *(0,) * 8, stat.S_IFREG | 0o640, 0, 0, 0, 0, 0, 0)
    relay.state.begin([Answer(Place(ROOT, b"file"), file, cached)], False)
    reply = relay.ask(Opcode.LOOKUP, ROOT, b"file\0")
    assert reply.payload[fuse.ENTRY_HEAD.size :] == cached


def test_the_lookup_count_includes_lookups_of_the_relay(relay: Relay, source: Source, file: int) -> None:
    before = source.context.inodes.lookups(file)
    relay.begin((b"file", file))
    relay.looked_up(b"file")
    assert source.context.inodes.lookups(file) == before + 1


def test_a_file_that_the_relay_opens_is_not_opened_in_the_source(relay: Relay, source: Source, file: int) -> None:
    relay.begin((b"file", file))
    handles = len(source.context.handles)
    reply = relay.ask(Opcode.OPEN, file, struct.pack("=II", os.O_WRONLY, 0))
    handle, _, _ = fuse.OPEN_OUT.unpack(reply.payload)
    assert len(source.context.handles) == handles
    assert relay.ask(Opcode.FLUSH, file, struct.pack("=QQQ", handle, 0, 0)).error == 0
    # The kernel sends RELEASE without a uid.
    assert relay.ask(Opcode.RELEASE, file, struct.pack("=QQQ", handle, 0, 0), uid=0, pid=0).error == 0


def test_generation_and_place_of_a_known_inode_are_told(relay: Relay, source: Source, file: int) -> None:
    relay.state.ask(file)
    relay.looked_up(INODE_QUESTION)
    assert relay.state.answered == (GENERATION, Place(ROOT, b"file"))
    relay.state.ask(1 << 60)
    relay.looked_up(INODE_QUESTION)
    assert relay.state.answered is None


def test_requests_of_others_are_served_as_usual(relay: Relay, source: Source, file: int) -> None:
    relay.begin((b"file", 0), (b"new", 0))
    me = os.geteuid()
    assert relay.ask(Opcode.LOOKUP, ROOT, b"file\0", uid=me).error == 0
    assert relay.ask(Opcode.MKNOD, ROOT, _MODE + b"new\0", uid=me).error == 0
    assert (source.path / "new").exists()
