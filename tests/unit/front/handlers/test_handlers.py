"""Requests as bytes of the kernel, and the replies of llloop's handlers, without a kernel."""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from llloop.config import Cache
from llloop.front.handlers import Handlers
from llloop.front.handlers import files as native_files
from llloop.front.inodes import ROOT
from llloop.front.request import FuseRequest
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.shared.messages import APPEND, BUFFERED, INVALIDATE, KILL_PRIVILEGES, Operation, Request, decode
from tests.expect import fails
from tests.unit.source import MYSELF, Source
from tests.unit.support import Device, Reply, nodeid_of, open_descriptors, packet_pipe, packets

ME = (os.geteuid(), os.getegid())


class Attr(NamedTuple):
    """struct fuse_attr."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


class Entry(NamedTuple):
    """struct fuse_entry_out."""

    nodeid: int
    generation: int
    entry_valid: int
    attr_valid: int
    entry_valid_nsec: int
    attr_valid_nsec: int
    attr: Attr


def parse_attr(data: bytes) -> Attr:
    return Attr._make(struct.unpack("=6Q10I", data))


def parse_entry(data: bytes) -> Entry:
    return Entry._make((*struct.unpack_from("=4Q2I", data), parse_attr(data[40:128])))


class Kernel:
    """Sends requests to the handlers and receives the replies."""

    def __init__(self, source: Source, device: Device) -> None:
        self.source = source
        self.device = device
        self.table = Handlers(source.context, device.fd).table
        self.unique = 0x7000000000000000
        self.now = 0
        self.request = FuseRequest(source.context.router.slots.memory, source.context.intents.note(0))

    def send(self, opcode: Opcode, nodeid: int, body: bytes = b"", who: tuple[int, int] = ME) -> None:
        self.unique += 2
        slots, request = self.source.context.router.slots, self.request
        request.slot = slots.free_slot()
        base = slots.request_offset(request.slot)
        length = 40 + len(body)
        header = struct.pack("=IIQQIIIHH", length, opcode, self.unique, nodeid, *who, 1, 0, 0)
        # Bytes of an earlier request must not be read as part of this one.
        slots.memory[base : base + length + 64] = header + body + b"\xa5" * 64
        request.is_received(base, length, self.now or time.monotonic_ns())
        self.table[opcode](request)

    def ask(self, opcode: Opcode, nodeid: int, body: bytes = b"", who: tuple[int, int] = ME) -> Reply:
        self.send(opcode, nodeid, body, who)
        reply = self.device.only()
        assert reply.unique == self.unique
        return reply

    def payload(self, opcode: Opcode, nodeid: int, body: bytes = b"", who: tuple[int, int] = ME) -> bytes:
        reply = self.ask(opcode, nodeid, body, who)
        assert reply.error == 0, errno.errorcode[reply.error]
        return reply.payload

    def lookup(self, name: bytes, parent: int = ROOT) -> Entry:
        return parse_entry(self.payload(Opcode.LOOKUP, parent, name + b"\0"))

    def open(self, nodeid: int, flags: int = os.O_RDWR, open_flags: int = 0) -> tuple[int, int]:
        handle, given, _ = struct.unpack(
            "=QII", self.payload(Opcode.OPEN, nodeid, struct.pack("=II", flags, open_flags))
        )
        return handle, given

    def handed_over(self) -> list[Request]:
        return [decode(message) for reader in self.source.readers for message in packets(reader)]


@pytest.fixture
def kernel(source: Source, device: Device) -> Kernel:
    return Kernel(source, device)


@pytest.fixture
def file(source: Source, kernel: Kernel) -> int:
    (source.path / "file").write_bytes(b"content")
    return kernel.lookup(b"file").nodeid


@pytest.fixture
def deaf(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel waits for no reply any more: whoever asked was killed."""
    write = os.write

    def refuse(fd: int, data: bytes) -> int:
        if fd == device.fd:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return write(fd, data)

    monkeypatch.setattr(os, "write", refuse)


def check_attr(attr: Attr, path: Path) -> None:
    status = os.lstat(path)
    assert attr.ino == status.st_ino
    assert (attr.size, attr.blocks, attr.mode) == (status.st_size, status.st_blocks, status.st_mode)
    assert (attr.nlink, attr.uid, attr.gid) == (status.st_nlink, status.st_uid, status.st_gid)
    assert (attr.rdev, attr.blksize) == (status.st_rdev, status.st_blksize)
    assert attr.mtime * 10**9 + attr.mtimensec == status.st_mtime_ns
    assert attr.ctime * 10**9 + attr.ctimensec == status.st_ctime_ns


# Names and attributes


def test_lookup(source: Source, kernel: Kernel, file: int) -> None:
    entry = kernel.lookup(b"file")
    assert entry.nodeid == file
    assert (entry.entry_valid, entry.entry_valid_nsec, entry.attr_valid, entry.attr_valid_nsec) == (1, 0, 1, 0)
    check_attr(entry.attr, source.path / "file")
    assert source.context.inodes.lookups(file) == 2
    assert kernel.lookup(b"file").generation == entry.generation


def test_lookup_of_an_undecodable_name(source: Source, kernel: Kernel) -> None:
    name = bytes(range(128, 255)) * 2
    Path(os.fsdecode(os.fsencode(source.path) + b"/" + name)).write_text("x")
    assert kernel.lookup(name).attr.size == 1


def test_missing_name_is_cached(source: Source, kernel: Kernel) -> None:
    entry = kernel.lookup(b"missing")
    assert (entry.nodeid, entry.entry_valid, entry.entry_valid_nsec) == (0, 1, 0)
    assert len(source.context.inodes) == 1


def test_missing_name_is_not_cached_with_cache_never(tmp_path: Path, device: Device) -> None:
    with packet_pipe() as pipe:
        source = Source(tmp_path, [pipe], cache=Cache.NEVER)
        kernel = Kernel(source, device)
        with fails(errno.ENOENT):
            kernel.send(Opcode.LOOKUP, ROOT, b"missing\0")
        assert kernel.payload(Opcode.GETATTR, ROOT, bytes(16))[:12] == bytes(12)
        source.close()


def test_refused_reply_takes_back_the_lookup(source: Source, kernel: Kernel, deaf: None) -> None:
    (source.path / "file").write_text("x")
    before = open_descriptors()
    kernel.send(Opcode.LOOKUP, ROOT, b"file\0")
    create = struct.pack("=IIII", os.O_RDWR | os.O_CREAT, 0o644, 0o022, 0)
    kernel.send(Opcode.CREATE, ROOT, create + b"new\0")
    kernel.send(Opcode.OPENDIR, ROOT, bytes(8))
    assert len(source.context.inodes) == 1
    assert len(source.context.handles) == 0
    assert open_descriptors() == before


def test_forget(source: Source, kernel: Kernel, file: int) -> None:
    kernel.lookup(b"file")
    kernel.send(Opcode.FORGET, file, struct.pack("=Q", 1))
    assert file in source.context.inodes
    kernel.send(Opcode.FORGET, file, struct.pack("=Q", 1))
    assert file not in source.context.inodes
    assert kernel.device.take() == [], "nobody waits for an answer"


def test_batch_forget(source: Source, kernel: Kernel) -> None:
    nodeids = []
    for number in range(100):
        (source.path / str(number)).write_text("")
        nodeids.append(kernel.lookup(b"%d" % number).nodeid)
    body = b"".join(struct.pack("=QQ", nodeid, 1) for nodeid in nodeids[:99])
    kernel.send(Opcode.BATCH_FORGET, 0, struct.pack("=II", 99, 0) + body + struct.pack("=QQ", nodeids[99], 1))
    assert len(source.context.inodes) == 2, "only as many as the request counts"
    assert kernel.device.take() == []


def test_getattr(source: Source, kernel: Kernel, file: int) -> None:
    reply = kernel.payload(Opcode.GETATTR, file, bytes(16))
    assert struct.unpack_from("=QII", reply) == (1, 0, 0)
    check_attr(parse_attr(reply[16:]), source.path / "file")
    root = parse_attr(kernel.payload(Opcode.GETATTR, ROOT, bytes(16))[16:])
    check_attr(root, source.path)


def test_getattr_of_an_open_file(source: Source, kernel: Kernel, file: int) -> None:
    handle, _ = kernel.open(file)
    (source.path / "file").unlink()
    reply = kernel.payload(Opcode.GETATTR, file, struct.pack("=IIQ", 1, 0, handle))
    assert parse_attr(reply[16:]).size == 7


def setattr_body(valid: int, **values: int) -> bytes:
    long = ("fh", "size", "lock_owner", "atime", "mtime", "ctime")
    short = ("atimensec", "mtimensec", "ctimensec", "mode", "unused4", "uid", "gid", "unused5")
    head = struct.pack("=II6q", valid, 0, *(values.get(name, 0) for name in long))
    return head + struct.pack("=8I", *(values.get(name, 0) for name in short))


def test_setattr(source: Source, kernel: Kernel, file: int) -> None:
    size_and_mode, mtime = 1 << 0 | 1 << 3, 1 << 5
    attr = parse_attr(kernel.payload(Opcode.SETATTR, file, setattr_body(size_and_mode, size=3, mode=0o100600))[16:])
    assert (attr.size, stat.S_IMODE(attr.mode)) == (3, 0o600)
    kernel.payload(Opcode.SETATTR, file, setattr_body(mtime, mtime=-2, mtimensec=999999999, size=99))
    status = os.stat(source.path / "file")
    assert (status.st_mtime_ns, status.st_size) == (-2 * 10**9 + 999999999, 3)
    handle, _ = kernel.open(file)
    kernel.payload(Opcode.SETATTR, file, setattr_body(1 << 3 | 1 << 6, size=1, fh=handle))
    assert os.stat(source.path / "file").st_size == 1


def test_statx(source: Source, kernel: Kernel, file: int) -> None:
    reply = kernel.payload(Opcode.STATX, file, struct.pack("=IIQII", 0, 0, 0, 0, 0xFFF))
    assert len(reply) == 32 + 256
    assert int.from_bytes(reply[32 + 32 : 32 + 40], "little") == (source.path / "file").stat().st_ino
    assert int.from_bytes(reply[32 + 40 : 32 + 48], "little") == 7


def test_unlink_and_rename2(source: Source, kernel: Kernel, file: int) -> None:
    noreplace = struct.pack("=QII", ROOT, 1, 0)
    assert kernel.payload(Opcode.RENAME2, ROOT, noreplace + b"file\0moved\0") == b""
    assert os.listdir(source.path) == ["moved"]
    (source.path / "other").write_text("")
    kernel.payload(Opcode.LOOKUP, ROOT, b"other\0")
    with fails(errno.EEXIST):
        kernel.send(Opcode.RENAME2, ROOT, noreplace + b"other\0moved\0")
    assert kernel.payload(Opcode.UNLINK, ROOT, b"moved\0") == b""
    assert os.listdir(source.path) == ["other"]


def test_setxattr(source: Source, kernel: Kernel, file: int) -> None:
    def body(value: bytes, flags: int = 0) -> bytes:
        return struct.pack("=IIII", len(value), flags, 0, 0) + b"user.name\0" + value

    try:
        os.setxattr(source.path / "file", "user.probe", b"")
    except OSError:
        pytest.skip("the temporary directory's file system has no user attributes")
    kernel.payload(Opcode.SETXATTR, file, body(b"\0value"))
    assert os.getxattr(source.path / "file", "user.name") == b"\0value"
    with fails(errno.EEXIST):
        kernel.send(Opcode.SETXATTR, file, body(b"x", os.XATTR_CREATE))
    kernel.payload(Opcode.SETXATTR, file, body(b""))
    assert os.getxattr(source.path / "file", "user.name") == b""


def getxattr(size: int, name: bytes = b"") -> bytes:
    return struct.pack("=II", size, 0) + name


def test_getxattr_and_listxattr(source: Source, kernel: Kernel, file: int) -> None:
    try:
        os.setxattr(source.path / "file", "user.name", b"\0value")
    except OSError:
        pytest.skip("the temporary directory's file system has no user attributes")
    name = b"user.name\0"
    handle, _ = kernel.open(file)
    for _ in range(2):  # first by the open file, then by its name
        assert kernel.payload(Opcode.GETXATTR, file, getxattr(6, name)) == b"\0value"
        assert kernel.payload(Opcode.GETXATTR, file, getxattr(0, name)) == struct.pack("=II", 6, 0)
        with fails(errno.ERANGE):
            kernel.send(Opcode.GETXATTR, file, getxattr(5, name))
        with fails(errno.ENODATA):
            kernel.send(Opcode.GETXATTR, file, getxattr(0, b"security.capability\0"))
        with fails(errno.EINVAL):
            kernel.send(Opcode.GETXATTR, file, getxattr(6, b"user.name"))
        assert name in kernel.payload(Opcode.LISTXATTR, file, getxattr(1024))
        length, _ = struct.unpack("=II", kernel.payload(Opcode.LISTXATTR, file, getxattr(0)))
        with fails(errno.ERANGE):
            kernel.send(Opcode.LISTXATTR, file, getxattr(length - 1))
        if handle in source.context.handles:
            kernel.payload(Opcode.RELEASE, file, struct.pack("=QIIQ", handle, 0, 0, 0))


def test_no_xattr_gives_enosys(tmp_path: Path, device: Device) -> None:
    with packet_pipe() as pipe:
        source = Source(tmp_path, [pipe], xattr=False)
        kernel = Kernel(source, device)
        for opcode, body in ((Opcode.GETXATTR, getxattr(0, b"user.name\0")), (Opcode.LISTXATTR, getxattr(0))):
            with fails(errno.ENOSYS):
                kernel.send(opcode, ROOT, body)
        source.close()


def test_names_without_nul_are_refused(source: Source, kernel: Kernel, file: int) -> None:
    """The kernel never sends them."""
    with fails(errno.EINVAL):
        kernel.send(Opcode.RENAME2, ROOT, struct.pack("=QII", ROOT, 0, 0) + b"file")
    with fails(errno.EINVAL):
        kernel.send(Opcode.RENAME2, ROOT, struct.pack("=QII", ROOT, 0, 0) + b"file\0new")
    assert os.listdir(source.path) == ["file"]


def test_readlink(kernel: Kernel, source: Source) -> None:
    target = b"/\xff" + b"t" * 4000
    os.symlink(target, os.fsencode(source.path / "link"))
    nodeid, _ = source.tree.lookup(1, b"link")
    assert kernel.ask(Opcode.READLINK, nodeid).payload == target
    with pytest.raises(OSError, match="Stale"):
        kernel.send(Opcode.READLINK, 4711)


def test_statfs(kernel: Kernel, source: Source) -> None:
    status = os.statvfs(source.path)
    *counts, block_size, longest, fragment = struct.unpack("=QQQQQIII28x", kernel.ask(Opcode.STATFS, 1).payload)
    assert (block_size, longest, fragment) == (status.f_bsize, status.f_namemax, status.f_frsize)
    assert (counts[0], counts[3]) == (status.f_blocks, status.f_files)


# Directories


class Listed(NamedTuple):
    """struct fuse_dirent."""

    ino: int
    offset: int
    type: int
    name: bytes


def parse_listing(data: bytes, *, plus: bool) -> list[tuple[Entry | None, Listed]]:
    found: list[tuple[Entry | None, Listed]] = []
    while data:
        entry = None
        if plus:
            entry, data = parse_entry(data), data[128:]
        ino, offset, length, kind = struct.unpack_from("=QQII", data)
        found.append((entry, Listed(ino, offset, kind, data[24 : 24 + length])))
        data = data[24 + (length + 7) // 8 * 8 :]
    return found


def opendir(kernel: Kernel) -> int:
    handle, _, _ = struct.unpack("=QII", kernel.payload(Opcode.OPENDIR, ROOT, bytes(8)))
    return int(handle)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("size", [512, 4096, 65536])
def test_directory_is_listed_completely(source: Source, kernel: Kernel, plus: bool, size: int) -> None:
    wanted = {b".", b".."}
    for number in range(120):
        name = b"n" * (number % 60 + 1) + b"%d" % number
        (source.path / os.fsdecode(name)).write_text("x" * number)
        wanted.add(name)
    handle = opendir(kernel)
    opcode = Opcode.READDIRPLUS if plus else Opcode.READDIR
    offset, found = 0, []
    while True:
        body = struct.pack("=QQIIQII", handle, offset, size, 0, 0, 0, 0)
        payload = kernel.payload(opcode, ROOT, body)
        assert len(payload) <= size
        if not payload:
            break
        found += parse_listing(payload, plus=plus)
        offset = found[-1][1].offset
    names = [listed.name for _, listed in found]
    assert len(names) == len(wanted) and set(names) == wanted
    for entry, listed in found:
        if entry is None:
            continue
        if listed.name in (b".", b".."):
            assert entry.nodeid == 0, "the kernel does not count a lookup of these"
        else:
            path = source.path / os.fsdecode(listed.name)
            assert entry.attr.ino == listed.ino
            check_attr(entry.attr, path)
            assert source.context.inodes.lookups(entry.nodeid) == 1
    if not plus:
        assert len(source.context.inodes) == 1, "a listing alone looks nothing up"


def test_readdirplus_omits_attributes_after_lookups(source: Source, kernel: Kernel) -> None:
    for number in range(10):
        (source.path / f"file{number}").write_text("")

    def listed() -> dict[bytes, int]:
        handle, _ = source.files.opendir(ROOT, MYSELF)
        payload = kernel.payload(Opcode.READDIRPLUS, ROOT, struct.pack("=QQIIQII", handle, 0, 65536, 0, 0, 0, 0))
        source.files.release(handle)
        found = parse_listing(payload, plus=True)
        return {entry.name: looked_up.nodeid for looked_up, entry in found if looked_up is not None}

    def told() -> set[bytes]:
        return {name for name, nodeid in listed().items() if nodeid}

    everything = {b"file%d" % number for number in range(10)}
    kernel.now = 1_000_000_000_000
    kernel.lookup(b"file0")
    assert told() == everything, "one name looked up says nothing about the others"
    kernel.now += 5_000_000_000
    for number in range(7):
        kernel.lookup(b"file%d" % number)
    (source.path / "new").write_text("")
    inodes = source.context.inodes
    before = {name: inodes.lookups(nodeid_of(inodes, source.path / os.fsdecode(name))) for name in everything}
    assert listed().keys() == everything | {b"new", b".", b".."}
    after = {name: inodes.lookups(nodeid_of(inodes, source.path / os.fsdecode(name))) for name in everything}
    assert before == after, "what the kernel was not told of is not counted"
    assert told() == set(), "the kernel has them all"
    kernel.now += 1_100_000_000
    assert told() == everything | {b"new"}, "what it has is too old to be used"


def test_readdirplus_with_more_entries_than_rows(source: Source, kernel: Kernel) -> None:
    for number in range(300):
        (source.path / f"{number:03}").write_text("x" * number)
    payload = kernel.payload(Opcode.READDIRPLUS, ROOT, struct.pack("=QQIIQII", opendir(kernel), 0, 1 << 20, 0, 0, 0, 0))
    found = {listed.name: entry for entry, listed in parse_listing(payload, plus=True)}
    for number in range(300):
        entry = found[b"%03d" % number]
        assert entry is not None
        assert entry.attr.size == number


def test_name_removed_during_readdirplus(source: Source, kernel: Kernel) -> None:
    for name in ("stays", "goes"):
        (source.path / name).write_text("")
    handle = opendir(kernel)
    body = struct.pack("=QQIIQII", handle, 0, 24, 0, 0, 0, 0)
    kernel.payload(Opcode.READDIR, ROOT, body)
    (source.path / "goes").unlink()
    body = struct.pack("=QQIIQII", handle, 1, 65536, 0, 0, 0, 0)
    payload = kernel.payload(Opcode.READDIRPLUS, ROOT, body)
    found = {listed.name: entry for entry, listed in parse_listing(payload, plus=True)}
    gone, stays = found.get(b"goes"), found[b"stays"]
    assert gone is None or gone.nodeid == 0
    assert stays is not None and stays.nodeid > ROOT


def test_refused_readdirplus_counts_no_lookups(source: Source, kernel: Kernel, deaf: None) -> None:
    (source.path / "file").write_text("")
    handle, _ = source.files.opendir(ROOT, MYSELF)
    kernel.send(Opcode.READDIRPLUS, ROOT, struct.pack("=QQIIQII", handle, 0, 65536, 0, 0, 0, 0))
    assert len(source.context.inodes) == 1


# Files


def test_open_and_release(source: Source, kernel: Kernel, file: int) -> None:
    before = open_descriptors()
    handle, flags = kernel.open(file, os.O_RDONLY)
    assert flags == fuse.FOPEN_NOFLUSH, "the file was changed just now"
    release = struct.pack("=QIIQ", handle, 0, 0, 0)
    assert kernel.payload(Opcode.RELEASE, file, release) == b""
    assert open_descriptors() == before
    with fails(errno.EBADF):
        kernel.send(Opcode.RELEASE, file, release)


def test_refused_open_is_closed(source: Source, kernel: Kernel, file: int, deaf: None) -> None:
    before = open_descriptors()
    kernel.send(Opcode.OPEN, file, struct.pack("=II", os.O_RDWR, 0))
    assert open_descriptors() == before
    assert len(source.context.handles) == 0


def test_create(source: Source, kernel: Kernel) -> None:
    body = struct.pack("=IIII", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o100666, 0o027, 0) + b"new\0"
    payload = kernel.payload(Opcode.CREATE, ROOT, body)
    entry = parse_entry(payload)
    handle, _, _ = struct.unpack("=QII", payload[128:])
    assert stat.S_IMODE(entry.attr.mode) == 0o640
    assert source.context.handles.get(handle).nodeid == entry.nodeid
    with fails(errno.EEXIST):
        kernel.send(Opcode.CREATE, ROOT, body)


def test_data_requests_are_sent_to_the_worker(source: Source, kernel: Kernel, file: int) -> None:
    handle, _ = kernel.open(file)
    opened = source.context.handles.get(handle)
    opened.read_flags = opened.write_flags = None  # as on a file system on a disk, where calls can block
    router = source.context.router

    def sent(opcode: Opcode, body: bytes, who: tuple[int, int] = (1000, 1001)) -> Request:
        slot = router.slots.free_slot()
        kernel.send(opcode, file, body, who)
        (request,) = kernel.handed_over()
        assert request[:5] == (request[0], kernel.unique, slot, handle, opened.descriptor)
        assert kernel.device.take() == [], "the worker answers"
        router.slots.give_back(slot)
        return request

    data = b"payload"
    write = struct.pack("=QQIIQII", handle, 2**40, len(data), 1 << 2, 0, os.O_RDWR, 0)
    request = sent(Opcode.WRITE, write + data)
    assert (request[0], *request[5:10]) == (Operation.WRITE, 2**40, len(data), KILL_PRIVILEGES, 1000, 1001)
    assert router.slots.payload(request[2], len(data)) == data, "the payload stays where it was received"
    write = struct.pack("=QQIIQII", handle, 0, len(data), 0, 0, os.O_RDWR | os.O_APPEND, 0)
    assert sent(Opcode.WRITE, write + data)[7] & APPEND
    cached = struct.pack("=QQIIQII", handle, 0, len(data), 1 << 0, 0, os.O_RDWR | os.O_APPEND, 0)
    assert not sent(Opcode.WRITE, cached + data)[7] & APPEND, "what the page cache writes back has its place"
    request = sent(Opcode.FSYNC, struct.pack("=QII", handle, 1, 0))
    assert (request[0], request[7]) == (Operation.FSYNC, 1 << 2)
    request = sent(Opcode.FALLOCATE, struct.pack("=QQQII", handle, 5, 6, 3, 0))
    assert (request[0], request[5], request[6], request[10]) == (Operation.FALLOCATE, 5, 6, (3,))
    assert request[7] & KILL_PRIVILEGES
    assert not sent(Opcode.FALLOCATE, struct.pack("=QQQII", handle, 5, 6, 3, 0), (0, 0))[7] & KILL_PRIVILEGES
    request = sent(Opcode.LSEEK, struct.pack("=QQII", handle, 5, os.SEEK_HOLE, 0))
    assert (request[0], request[5], request[10]) == (Operation.LSEEK, 5, (os.SEEK_HOLE, file))
    assert request[7] & INVALIDATE, "it may be mapped for writing"
    assert not sent(Opcode.LSEEK, struct.pack("=QQII", handle, 5, os.SEEK_HOLE, 0))[7], "nothing was read since"


def test_large_write_in_the_front_only_if_idle(
    source: Source, kernel: Kernel, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_files, "WRITE_LIMIT", 2)
    monkeypatch.setattr(native_files, "LONE_WRITE_LIMIT", 4)
    handle, _ = kernel.open(file)
    opened = source.context.handles.get(handle)
    opened.write_flags = 0  # as on a file system in memory

    def write(data: bytes) -> None:
        kernel.send(Opcode.WRITE, file, struct.pack("=QQIIQII", handle, 0, len(data), 0, 0, os.O_RDWR, 0) + data)

    write(b"four")
    assert kernel.device.only().error == 0 and kernel.handed_over() == []
    assert (source.path / "file").read_bytes() == b"fourent"
    write(b"seven")
    assert len(kernel.handed_over()) == 1, "and from now on a worker has something to do"
    write(b"more")
    assert len(kernel.handed_over()) == 1
    write(b"in")
    assert kernel.device.only().error == 0
    assert (source.path / "file").read_bytes() == b"inurent"


def test_copy_is_sent_to_the_worker_of_the_target(source: Source, kernel: Kernel, file: int) -> None:
    (source.path / "target").write_text("")
    target = kernel.lookup(b"target").nodeid
    (from_handle, _), (to_handle, _) = kernel.open(file), kernel.open(target)
    body = struct.pack("=QQQQQQQ", from_handle, 3, target, to_handle, 4, 5, 0)
    kernel.send(Opcode.COPY_FILE_RANGE, file, body)
    (request,) = kernel.handed_over()
    handles = source.context.handles
    assert (request[0], request[3], request[5], request[6]) == (Operation.COPY_FILE_RANGE, to_handle, 4, 5)
    assert request[10] == (from_handle, handles.get(from_handle).descriptor, 3, file, handles.get(from_handle).file)
    assert handles.get(from_handle).in_all_workers


def test_buffered_io_on_a_direct_file_is_marked(source: Source, kernel: Kernel, file: int) -> None:
    try:
        handle, _ = kernel.open(file, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("the temporary directory's file system has no O_DIRECT")
    for flags, expected in ((os.O_RDWR | os.O_DIRECT, 0), (os.O_RDWR, BUFFERED)):
        slot = source.context.router.slots.free_slot()
        opened = source.context.handles.get(handle)
        opened.read_flags = opened.write_flags = None
        kernel.send(Opcode.WRITE, file, struct.pack("=QQIIQII", handle, 0, 1, 0, 0, flags, 0) + b"x")
        (request,) = kernel.handed_over()
        assert request[7] & BUFFERED == expected
        source.context.router.slots.give_back(slot)


def test_declined_request_is_parked(source: Source, kernel: Kernel, file: int) -> None:
    """The front does not do it, because it might hang as the worker does."""
    router = source.context.router
    for writer in source.writers:
        with fails(errno.EAGAIN):
            while True:
                os.write(writer, b"\xc0")
    handle, _ = kernel.open(file)
    write = struct.pack("=QQIIQII", handle, 3, 3, 0, 0, os.O_RDWR, 0)
    kernel.send(Opcode.WRITE, file, write + b"TEN")
    kernel.send(Opcode.FSYNC, file, struct.pack("=QII", handle, 0, 0))
    assert kernel.device.take() == [] and (source.path / "file").read_bytes() == b"content"
    assert router.backlog
    for reader in source.readers:
        packets(reader)
    router.wait(kernel.device.fd)
    written, synced = kernel.handed_over()
    assert written[:2] == (Operation.WRITE, kernel.unique - 2) and synced[:2] == (Operation.FSYNC, kernel.unique)
    assert bytes(router.slots.payload(written[2], 3)) == b"TEN"
    assert not router.backlog


def test_unknown_handles_give_ebadf(kernel: Kernel, file: int) -> None:
    for opcode, body in (
        (Opcode.READ, struct.pack("=QQIIQII", 999, 0, 1, 0, 0, 0, 0)),
        (Opcode.WRITE, struct.pack("=QQIIQII", 999, 0, 1, 0, 0, 0, 0) + b"x"),
        (Opcode.FSYNC, struct.pack("=QII", 999, 0, 0)),
        (Opcode.READDIR, struct.pack("=QQIIQII", 999, 0, 4096, 0, 0, 0, 0)),
        (Opcode.READDIRPLUS, struct.pack("=QQIIQII", 999, 0, 4096, 0, 0, 0, 0)),
        (Opcode.LSEEK, struct.pack("=QQII", 999, 0, os.SEEK_HOLE, 0)),
    ):
        with fails(errno.EBADF):
            kernel.send(opcode, file, body)


@pytest.mark.parametrize(("flags", "told"), [(os.O_RDWR, True), (os.O_RDONLY, False), (os.O_WRONLY, False)])
def test_flush_is_requested_only_for_writable_mappings(kernel: Kernel, file: int, flags: int, told: bool) -> None:
    """Nothing else can have errors that no write(2) was told of."""
    handle, how = kernel.open(file, flags)
    assert bool(how & fuse.FOPEN_NOFLUSH) is not told
    assert kernel.ask(Opcode.FLUSH, file, struct.pack("=QIIQ", handle, 0, 0, 0)).error == 0
