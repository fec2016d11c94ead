"""Malformed FUSE requests made from arbitrary bytes of a fuzzer or a random number generator."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeVar

from llloop.linux.fuse import Opcode

T = TypeVar("T")

NAMES = (
    b"file", b"directory", b"out", b"new", b"other", b"", b".", b"..", b"../canary", b"out/canary", b"/etc/passwd",
    b"..\0", b"..\0file", b"x" * 255, b"y" * 5000, b"security.capability", b"user.x", b"trusted.x",
)  # fmt: skip
# No number between some megabytes and the maximum file size: a fallocate of that size might succeed.
NUMBERS = (0, 1, 2, 3, 7, 40, 255, 4095, 4096, 65536, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)  # fmt: skip

# What follows the header: I and Q numbers of that size, H a handle, D another inode, S a name with its NUL, B bytes.
BODIES: dict[int, str] = {
    Opcode.LOOKUP: "S",
    Opcode.FORGET: "Q",
    Opcode.BATCH_FORGET: "IIDQDQ",
    Opcode.GETATTR: "IIH",
    Opcode.SETATTR: "IIHQQQQQIIIIIIII",
    Opcode.READLINK: "",
    Opcode.SYMLINK: "SS",
    Opcode.MKNOD: "IIIIS",
    Opcode.MKDIR: "IIS",
    Opcode.UNLINK: "S",
    Opcode.RMDIR: "S",
    Opcode.RENAME: "DSS",
    Opcode.LINK: "DS",
    Opcode.OPEN: "II",
    Opcode.READ: "HQIIQII",
    Opcode.WRITE: "HQIIQIIB",
    Opcode.STATFS: "",
    Opcode.RELEASE: "HIIQ",
    Opcode.FSYNC: "HII",
    Opcode.SETXATTR: "IIIISB",
    Opcode.GETXATTR: "IIS",
    Opcode.LISTXATTR: "II",
    Opcode.REMOVEXATTR: "S",
    Opcode.FLUSH: "HIIQ",
    Opcode.INIT: "IIII",
    Opcode.OPENDIR: "II",
    Opcode.READDIR: "HQIIQII",
    Opcode.RELEASEDIR: "HIIQ",
    Opcode.FSYNCDIR: "HII",
    Opcode.GETLK: "HQQQIIII",
    Opcode.SETLK: "HQQQIIII",
    Opcode.ACCESS: "II",
    Opcode.CREATE: "IIIIS",
    Opcode.INTERRUPT: "Q",
    Opcode.BMAP: "QII",
    Opcode.IOCTL: "HIIQII",
    Opcode.POLL: "HQII",
    Opcode.NOTIFY_REPLY: "QQIIQQ",
    Opcode.FALLOCATE: "HQQII",
    Opcode.READDIRPLUS: "HQIIQII",
    Opcode.RENAME2: "DIISS",
    Opcode.LSEEK: "HQII",
    Opcode.COPY_FILE_RANGE: "HQDHQQQ",
    Opcode.SYNCFS: "Q",
    Opcode.TMPFILE: "IIIIS",
    Opcode.STATX: "IIHII",
}
# No DESTROY: after it, libfuse answers no request.
OPCODES = (*BODIES, 0, 7, Opcode.SETUPMAPPING, Opcode.REMOVEMAPPING, Opcode.COPY_FILE_RANGE_64, 54, 4096, 0xFFFFFFFF)


class Choices:
    """Makes decisions from bytes; uses zeros after their end."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def byte(self) -> int:
        return next(self._data, 0)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.byte() % len(options)]

    def number(self) -> int:
        return self.pick(NUMBERS) if self.byte() & 1 else self.byte()


def hostile_request(choose: Choices, unique: int, nodeids: Sequence[int], handles: Sequence[int]) -> bytes:
    """One request: mostly well formed but for its numbers, often cut, stretched or spoilt.

    Args:
        choose: decides.
        unique: its number.
        nodeids, handles: some that the server knows.
    """
    opcode = choose.pick(OPCODES)
    body = b""
    for field in BODIES.get(opcode, "QB"):
        if field == "S":
            body += choose.pick(NAMES) + (b"" if choose.byte() == 255 else b"\0")
        elif field == "B":
            body += bytes([choose.byte()]) * (choose.number() % 5000)
        elif field in "HD":
            known = handles if field == "H" else nodeids
            body += struct.pack("=Q", choose.pick(known) if known and choose.byte() & 3 else choose.number())
        else:
            value = choose.number()
            body += struct.pack("=I", value & 0xFFFFFFFF) if field == "I" else struct.pack("=Q", value)
    nodeid = choose.pick(nodeids) if choose.byte() & 7 else choose.number()
    packet = struct.pack("=IIQQIIII", 40 + len(body), opcode, unique, nodeid, choose.byte(), choose.byte(), 1, 0) + body
    fate = choose.byte()
    if fate < 32:
        packet = packet[: choose.number() % (len(packet) + 1)]
    elif fate < 48:
        packet += bytes([choose.byte()]) * choose.byte()
    elif fate < 64:
        packet = struct.pack("=I", choose.number() & 0xFFFFFFFF) + packet[4:]
    if 32 <= fate < 44 or fate < 24:  # sometimes the header contains the changed length
        packet = struct.pack("=I", len(packet))[: len(packet)] + packet[4:]
    return packet
