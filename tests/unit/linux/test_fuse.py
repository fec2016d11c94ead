"""The structs of llloop.linux.fuse, compared with those of <linux/fuse.h> as a C compiler packs them."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

import pytest

from llloop.front.inodes import ROOT
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import STATX_SIZE
from llloop.shared import negotiation
from llloop.shared.negotiation import Feature


def installed_minor(headers: str) -> int:
    found = re.search(r"#define\s+FUSE_KERNEL_MINOR_VERSION\s+(\d+)", headers)
    assert found
    return int(found[1])


def compile_and_run(source: str, directory: Path) -> list[str]:
    program = directory / "program"
    command = ["cc", "-Wall", "-Werror", "-x", "c", "-", "-o", str(program)]
    subprocess.run(command, input=source, text=True, check=True, capture_output=True)
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def minor() -> int:
    """The protocol version of the installed header; what is newer is skipped."""
    command = ["cc", "-E", "-dM", "-include", "linux/fuse.h", "-x", "c", os.devnull]
    return installed_minor(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@dataclass(frozen=True)
class Layout:
    """One Struct of wire.py in C.

    Attributes:
        name: what it is called there.
        parts: the C structs it consists of, one behind the other.
        fields: what is packed, in its order, as part.field.
        since: the protocol's minor version in which the youngest of these fields came.
        longer: whether the C struct goes on behind what wire.py reads.
    """

    name: str
    parts: tuple[str, ...]
    fields: tuple[str, ...]
    since: int = 0
    longer: bool = False

    @property
    def struct(self) -> Struct:
        found: Struct = getattr(fuse, self.name)
        return found


def request(name: str, body: str, fields: str, since: int = 0) -> Layout:
    """A request: the common header, then *body*. Where wire.py reads less than there is, nothing is said."""
    parts = ("fuse_in_header", body) if body else ("fuse_in_header",)
    named = [field if "." in field else f"fuse_in_header.{field}" for field in fields.split()]
    return Layout(name, parts, tuple(field.replace("in.", f"{body}.", 1) for field in named), since, longer=True)


def reply(name: str, body: str, fields: str, since: int = 0) -> Layout:
    parts = ("fuse_out_header", body) if body else ("fuse_out_header",)
    header = ("fuse_out_header.len", "fuse_out_header.error", "fuse_out_header.unique")
    return Layout(name, parts, (*header, *(f"{body}.{field}" for field in fields.split())), since)


def plain(name: str, body: str, fields: str, since: int = 0, longer: bool = False) -> Layout:
    return Layout(name, (body,), tuple(f"{body}.{field}" for field in fields.split()), since, longer)


def nested(member: str, fields: str) -> str:
    return " ".join(f"{member}.{field}" for field in fields.split())


ATTR_FIELDS = "ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags"
ENTRY_FIELDS = "nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec"

LAYOUTS = [
    request("IN_HEADER", "", "len opcode unique nodeid uid gid pid"),
    request("OPCODE", "", "len opcode"),
    request("UNIQUE", "", "unique"),
    request("PID", "", "pid"),
    request("UNIQUE_AND_PID", "", "unique pid"),
    request("INTERRUPT_REQUEST", "fuse_interrupt_in", "in.unique"),
    request("SHORT_SETXATTR_REQUEST", "fuse_setxattr_in", "in.size in.flags"),
    request("REQUEST_HEAD", "", "len opcode unique nodeid"),
    request("CALLER", "", "uid gid pid"),
    request("FORGET_REQUEST", "fuse_forget_in", "nodeid in.nlookup"),
    request("BATCH_FORGET_REQUEST", "fuse_batch_forget_in", "in.count"),
    plain("FORGET_ONE", "fuse_forget_one", "nodeid nlookup"),
    request("GETATTR_REQUEST", "fuse_getattr_in", "in.getattr_flags in.fh"),
    request("INIT_REQUEST", "fuse_init_in", "unique in.major in.minor in.max_readahead in.flags in.flags2", 36),
    request("OPEN_REQUEST", "fuse_open_in", "in.flags in.open_flags", 33),
    request(
        "CREATE_REQUEST",
        "fuse_create_in",
        "in.flags in.mode in.umask in.open_flags",
        since=33,
    ),
    request("READ_REQUEST", "fuse_read_in", "in.fh in.offset in.size in.flags"),
    request("WRITE_REQUEST", "fuse_write_in", "uid gid in.fh in.offset in.size in.write_flags in.flags"),
    request("RELEASE_REQUEST", "fuse_release_in", "in.fh"),
    request("FSYNC_REQUEST", "fuse_fsync_in", "in.fh in.fsync_flags"),
    request("FLUSH_REQUEST", "fuse_flush_in", "in.fh"),
    request("READDIR_REQUEST", "fuse_read_in", "in.fh in.offset in.size"),
    request("FALLOCATE_REQUEST", "fuse_fallocate_in", "uid gid in.fh in.offset in.length in.mode"),
    request("IOCTL_REQUEST", "fuse_ioctl_in", "in.fh in.cmd in.in_size in.out_size"),
    request("COPY_TARGET", "fuse_copy_file_range_in", "in.nodeid_out", since=28),
    request("LSEEK_REQUEST", "fuse_lseek_in", "in.fh in.offset in.whence", since=24),
    request(
        "COPY_FILE_RANGE_REQUEST",
        "fuse_copy_file_range_in",
        "uid gid in.fh_in in.off_in in.fh_out in.off_out in.len",
        since=28,
    ),
    request("MKNOD_REQUEST", "fuse_mknod_in", "in.mode in.rdev in.umask"),
    request("MKDIR_REQUEST", "fuse_mkdir_in", "in.mode in.umask"),
    request("LINK_REQUEST", "fuse_link_in", "in.oldnodeid"),
    request("RENAME_REQUEST", "fuse_rename_in", "in.newdir"),
    request("RENAME2_REQUEST", "fuse_rename2_in", "in.newdir in.flags", since=23),
    request("GETXATTR_REQUEST", "fuse_getxattr_in", "in.size"),
    request("STATX_REQUEST", "fuse_statx_in", "in.getattr_flags in.fh in.sx_flags in.sx_mask", since=39),
    request(
        "SETATTR_REQUEST",
        "fuse_setattr_in",
        "in.valid in.fh in.size in.atime in.mtime in.ctime in.atimensec in.mtimensec"
        " in.ctimensec in.mode in.uid in.gid",
    ),
    request(
        "SETXATTR_REQUEST",
        "fuse_setxattr_in",
        "in.size in.flags in.setxattr_flags in.padding",
        since=33,
    ),
    reply("OUT_HEADER", "", ""),
    plain(
        "INIT_OUT",
        "fuse_init_out",
        "major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages"
        " map_alignment flags2 max_stack_depth",
        since=36,
    ),
    plain("ATTR", "fuse_attr", ATTR_FIELDS, since=32),
    plain("ENTRY_HEAD", "fuse_entry_out", ENTRY_FIELDS, longer=True),
    plain("ENTRY", "fuse_entry_out", f"{ENTRY_FIELDS} {nested('attr', ATTR_FIELDS)}", since=32),
    reply("ENTRY_REPLY", "fuse_entry_out", f"{ENTRY_FIELDS} {nested('attr', ATTR_FIELDS)}", since=32),
    reply("ATTR_REPLY", "fuse_attr_out", f"attr_valid attr_valid_nsec {nested('attr', ATTR_FIELDS)}", since=32),
    reply("OPEN_REPLY", "fuse_open_out", "fh open_flags backing_id"),
    plain("OPEN_OUT", "fuse_open_out", "fh open_flags backing_id"),
    reply("WRITE_REPLY", "fuse_write_out", "size"),
    plain("IOCTL_OUT", "fuse_ioctl_out", "result flags in_iovs out_iovs"),
    plain("GETXATTR_OUT", "fuse_getxattr_out", "size"),
    reply("LSEEK_REPLY", "fuse_lseek_out", "offset", since=24),
    plain(
        "STATFS_OUT",
        "fuse_statfs_out",
        "st.blocks st.bfree st.bavail st.files st.ffree st.bsize st.namelen st.frsize",
    ),
    plain("STATX_OUT", "fuse_statx_out", "attr_valid attr_valid_nsec flags", since=39, longer=True),
    plain("ATTR_HEAD", "fuse_attr_out", "attr_valid attr_valid_nsec", longer=True),
    plain("STATX_SIZE_AND_BLOCKS", "fuse_statx", "size blocks", since=39, longer=True),
    plain("DIRENT", "fuse_dirent", "ino off namelen type", longer=True),
    reply("INVAL_INODE", "fuse_notify_inval_inode_out", "ino off len"),
    reply("INVAL_ENTRY", "fuse_notify_inval_entry_out", "parent namelen flags", since=38),
    reply("DELETE", "fuse_notify_delete_out", "parent child namelen"),
]


# Fields that had another name in older headers, at the same place: (since, what to set, what to print).
OLDER_NAMES = {
    "fuse_open_out.backing_id": (40, "fuse_open_out.padding", "(int32_t)it.fuse_open_out.padding"),
    "fuse_init_out.max_stack_depth": (40, "fuse_init_out.unused[0]", "it.fuse_init_out.unused[0]"),
}


def in_c(field: str, minor: int) -> tuple[str, str]:
    """What to set and what to print for a field."""
    since, name, printed = OLDER_NAMES.get(field, (0, field, ""))
    return (name, printed) if minor < since else (field, f"it.{field}")


def test_each_struct_has_a_layout() -> None:
    structs = {name for name, value in vars(fuse).items() if isinstance(value, Struct)}
    assert {layout.name for layout in LAYOUTS} == structs


def c_program(layouts: list[Layout], minor: int) -> str:
    """Each struct filled with a different number per field, and printed: its bytes, then the numbers."""
    lines = [
        "#include <linux/fuse.h>",
        "#include <stdio.h>",
        "#include <string.h>",
        "static void bytes(const void *data, size_t size) {",
        '    for (size_t i = 0; i < size; i++) printf("%02x", ((const unsigned char *)data)[i]);',
        "}",
        "int main(void) {",
    ]
    for layout in layouts:
        members = " ".join(f"struct {part} {part};" for part in layout.parts)
        lines.append(f"  {{ struct {{ {members} }} it; memset(&it, 0, sizeof it);")
        lines += [
            # Distinct in every byte of every width, the highest bit set: a sign or a swapped field shows.
            f"    it.{in_c(field, minor)[0]} = 0xf1d2c3b4a5968700ULL + 0x0101010101010101ULL * {number};"
            for number, field in enumerate(layout.fields)
        ]
        lines.append('    bytes(&it, sizeof it); printf(" ");')
        lines += [f'    printf("%llu ", (unsigned long long){in_c(field, minor)[1]});' for field in layout.fields]
        lines.append('    printf("\\n"); }')
    return "\n".join([*lines, "}"])


@pytest.fixture(scope="module")
def packed(minor: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, list[int]]]:
    known = [layout for layout in LAYOUTS if layout.since <= minor]
    source = c_program(known, minor)
    # The values are intentionally cut to the width of their fields.
    source = '#pragma GCC diagnostic ignored "-Woverflow"\n' + source
    output = compile_and_run(source, tmp_path_factory.mktemp("wire"))
    found = {}
    for layout, line in zip(known, output, strict=True):
        data, *values = line.split()
        found[layout.name] = (bytes.fromhex(data), [int(value) for value in values])
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_field_offsets_equal_those_of_c(layout: Layout, minor: int, packed: dict[str, tuple[bytes, list[int]]]) -> None:
    if layout.since > minor:
        pytest.skip(f"newer (7.{layout.since}) than the installed header (7.{minor})")
    data, values = packed[layout.name]
    unpacked = layout.struct.unpack_from(data)
    assert len(unpacked) == len(values)
    # C prints in 64 bits without a sign; some times and offsets are read signed, as the kernel means them.
    pairs = zip(layout.fields, unpacked, values, strict=True)
    wrong = [field for field, ours, theirs in pairs if ours % 2**64 != theirs]
    assert not wrong, "elsewhere, or of another size"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_packed_bytes_equal_those_of_c(layout: Layout, minor: int, packed: dict[str, tuple[bytes, list[int]]]) -> None:
    if layout.since > minor:
        pytest.skip(f"newer (7.{layout.since}) than the installed header (7.{minor})")
    data, _ = packed[layout.name]
    ours = layout.struct.pack(*layout.struct.unpack_from(data))
    assert ours == data[: len(ours)]
    assert not any(data[len(ours) :]), "a field behind was set"
    if not layout.longer:
        assert len(ours) == len(data)


SIZES = {
    "fuse_in_header": (fuse.IN_HEADER_SIZE, 0),
    "fuse_out_header": (fuse.OUT_HEADER_SIZE, 0),
    "fuse_write_in": (fuse.WRITE_HEADER_SIZE - fuse.IN_HEADER_SIZE, 0),
    "fuse_init_out": (fuse.INIT_OUT.size, 0),
    "fuse_entry_out": (fuse.ENTRY.size, 0),
    "fuse_attr_out": (fuse.ATTR_REPLY.size - fuse.OUT_HEADER_SIZE, 0),
    # Data after these structs, mostly names, begins at their end.
    "fuse_create_in": (fuse.CREATE_REQUEST.size - fuse.IN_HEADER_SIZE, 0),
    "fuse_mknod_in": (fuse.MKNOD_REQUEST.size - fuse.IN_HEADER_SIZE, 0),
    "fuse_mkdir_in": (fuse.MKDIR_REQUEST.size - fuse.IN_HEADER_SIZE, 0),
    "fuse_link_in": (fuse.LINK_REQUEST.size - fuse.IN_HEADER_SIZE, 0),
    "fuse_rename_in": (fuse.RENAME_REQUEST.size - fuse.IN_HEADER_SIZE, 0),
    "fuse_rename2_in": (fuse.RENAME2_REQUEST.size - fuse.IN_HEADER_SIZE, 23),
    "fuse_setxattr_in": (fuse.SETXATTR_REQUEST.size - fuse.IN_HEADER_SIZE, 33),
    "fuse_dirent": (fuse.DIRENT.size, 0),
    "fuse_statx_out": (fuse.STATX_OUT.size + STATX_SIZE, 39),
}


def constants() -> list[tuple[str, int, int]]:
    """Every number that has a name in the header: (name, value, the minor version it came with)."""
    young = {
        "FOPEN_PASSTHROUGH": 40,
        "FUSE_WRITE_KILL_SUIDGID": 33,
        "FATTR_KILL_SUIDGID": 33,
        "FUSE_OPEN_KILL_SUIDGID": 33,
        "FUSE_SETXATTR_ACL_KILL_SGID": 33,
        "FUSE_RENAME2": 23,
        "FUSE_LSEEK": 24,
        "FUSE_COPY_FILE_RANGE": 28,
        "FUSE_SETUPMAPPING": 31,
        "FUSE_REMOVEMAPPING": 31,
        "FUSE_SYNCFS": 34,
        "FUSE_TMPFILE": 37,
        "FUSE_STATX": 39,
        "FUSE_COPY_FILE_RANGE_64": 45,
        "FUSE_PARALLEL_DIROPS": 25,
        "FUSE_POSIX_ACL": 26,
        "FUSE_MAX_PAGES": 28,
        "FUSE_CACHE_SYMLINKS": 28,
        "FUSE_HANDLE_KILLPRIV_V2": 33,
        "FUSE_SETXATTR_EXT": 33,
        "FUSE_INIT_EXT": 36,
        "FUSE_DIRECT_IO_ALLOW_MMAP": 39,
        "FUSE_PASSTHROUGH": 40,
        "FUSE_HAS_RESEND": 40,
        "FUSE_ALLOW_IDMAP": 41,
        "FUSE_UNIQUE_RESEND": 40,
        "FUSE_NOTIFY_RESEND": 40,
        "FUSE_NOTIFY_INC_EPOCH": 44,
        "FUSE_EXPIRE_ONLY": 38,
    }
    named = [(f"FUSE_{opcode.name}", int(opcode)) for opcode in Opcode]
    named += [(f"FUSE_{feature.name}", int(feature)) for feature in Feature]
    prefixes = ("FOPEN_", "FATTR_", "FUSE_")
    named += [(name, value) for name, value in vars(fuse).items() if name.startswith(prefixes)]
    named += [
        ("FUSE_ROOT_ID", ROOT),
        ("FUSE_KERNEL_VERSION", negotiation.PROTOCOL_MAJOR),
    ]
    return [(name, value, young.get(name, 0)) for name, value in named]


def test_constants_and_sizes_equal_those_of_the_header(minor: int, tmp_path: Path) -> None:
    expected = [(name, value) for name, value, since in constants() if since <= minor]
    assert len(expected) > 80
    expected += [(f"sizeof(struct {name})", size) for name, (size, since) in SIZES.items() if since <= minor]
    lines = [f'  printf("%llu\\n", (unsigned long long)({name}));' for name, _ in expected]
    program = "#include <linux/fuse.h>\n#include <stdio.h>\nint main(void) {\n" + "\n".join(lines) + "\n}\n"
    printed = [int(line) % 2**64 for line in compile_and_run(program, tmp_path)]
    wrong = {name: (ours, theirs) for (name, ours), theirs in zip(expected, printed, strict=False) if ours != theirs}
    assert not wrong


def test_device_numbers_equal_makedev() -> None:
    for major in (0, 1, 8, 255, 256, 4095):
        for low in (0, 1, 255, 256, 0xFFFFF):
            assert fuse.encode_device(major, low) == os.makedev(major, low)


def test_error_reply_contains_the_negative_errno() -> None:
    assert fuse.error_reply(0x1122334455667788, 2) == struct.pack("=IiQ", 16, -2, 0x1122334455667788)
    assert fuse.error_reply(7, 0) == struct.pack("=IiQ", 16, 0, 7)


def test_reply_contains_its_length() -> None:
    assert fuse.reply(9, b"abc") == struct.pack("=IiQ", 19, 0, 9) + b"abc"
