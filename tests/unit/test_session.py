"""llfuse's session is only accepted when every word of it fits; here there is none, and nothing may pass for one."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llloop import session
from llloop.session import Session, SessionNotFound, find_session, fuse_devices

# struct fuse_chan: three operations, the session, the descriptor, the buffer's size
_CHANNEL = struct.Struct("=3QQi4xQ")


@pytest.fixture
def device() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDWR)
    yield fd
    os.close(fd)


def test_before_init_there_is_no_session(device: int) -> None:
    with pytest.raises(SessionNotFound, match="0 pointers"):
        find_session(device)


def test_a_descriptor_of_dev_fuse_alone_is_not_enough() -> None:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        pytest.skip("no /dev/fuse here")
    try:
        assert fd in fuse_devices()
        with pytest.raises(SessionNotFound):
            find_session(fd)
    finally:
        os.close(fd)
    assert fd not in fuse_devices()


def test_other_descriptors_are_not_those_of_dev_fuse(device: int) -> None:
    assert device not in fuse_devices()


def test_without_libfuse_it_says_so(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "PyDLL", missing)
    with pytest.raises(SessionNotFound, match=r"libfuse\.so\.2 cannot be loaded"):
        find_session(device)


def check(channel: bytes | int, device: int) -> int | None:
    """Offer memory as a channel."""
    library = ctypes.PyDLL("libfuse.so.2")
    buffer = ctypes.create_string_buffer(channel, len(channel)) if isinstance(channel, bytes) else None
    address = ctypes.addressof(buffer) if buffer is not None else channel
    assert isinstance(address, int)
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        return session._check(library, memory.fileno(), address, device)


@pytest.mark.parametrize("address", [0, 8, 0x10000, 2**47 - 4096, 2**63, 2**64 - 8])
def test_an_address_where_nothing_is(device: int, address: int) -> None:
    assert check(address, device) is None


def test_memory_that_is_no_channel(device: int) -> None:
    zeros = ctypes.create_string_buffer(256)
    readable = ctypes.addressof(zeros)
    size = session._LIBFUSE_BUFFER_SIZE
    for words in (
        (0, 0, 0, 0, 0, 0),
        (1, 2, 3, readable, device + 1, size),
        (1, 2, 3, readable, device, size + 1),
        (1, 2, 3, 0, device, size),
        (1, 2, 3, 0xFFF8, device, size),
        (1, 2, 3, readable + 1, device, size),
        # Everything of the channel fits, but the session does not know of it.
        (1, 2, 3, readable, device, size),
    ):
        assert check(_CHANNEL.pack(*words), device) is None, words


def test_random_memory_is_no_channel(device: int) -> None:
    for _ in range(50):
        assert check(os.urandom(256), device) is None


def test_candidates_are_aligned_and_distinct() -> None:
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        words = list(session._candidates(memory.fileno()))
    assert words, "llfuse's data was not found at all"
    assert len(words) == len(set(words))
    assert all(word % 8 == 0 and word > 0xFFFF for word in words)


def test_the_data_looked_through_is_llfuses_own() -> None:
    segments = list(session._data_segments())
    assert 1 <= len(segments) <= 8
    assert sum(end - start for start, end in segments) < 1 << 22


def test_two_sessions_are_as_bad_as_none(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_candidates", lambda memory: iter([0x10000, 0x20000]))
    monkeypatch.setattr(session, "_check", lambda library, memory, channel, fd: 0x30000)
    with pytest.raises(SessionNotFound, match="2 pointers"):
        find_session(device)


def test_one_that_is_proven_is_taken(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_candidates", lambda memory: iter([0x10000, 0x20000]))
    monkeypatch.setattr(session, "_check", lambda library, memory, channel, fd: 0x30000 if channel == 0x20000 else None)
    assert isinstance(find_session(device), Session)


def test_fuse_buf_is_laid_out_as_in_c(tmp_path_factory: pytest.TempPathFactory) -> None:
    program = tmp_path_factory.mktemp("session") / "program"
    source = (
        "#define FUSE_USE_VERSION 29\n#define _FILE_OFFSET_BITS 64\n#include <fuse.h>\n#include <stdio.h>\n"
        "#include <stddef.h>\nint main(void) {\n"
        + "".join(
            f'printf("%zu ", offsetof(struct fuse_buf, {name}));' for name in ("size", "flags", "mem", "fd", "pos")
        )
        + 'printf("%zu\\n", sizeof(struct fuse_buf)); }\n'
    )
    command = ["cc", "-I/usr/include/fuse", "-x", "c", "-", "-o", str(program)]
    subprocess.run(command, input=source, text=True, check=True, capture_output=True)
    offsets = [int(word) for word in subprocess.run([program], capture_output=True, check=True).stdout.split()]
    buffer = session._FuseBuf
    ours = [getattr(buffer, name).offset for name in ("size", "flags", "mem", "fd", "pos")]
    assert [*ours, ctypes.sizeof(buffer)] == offsets


def test_importing_it_mounts_nothing() -> None:
    code = "import llloop.session; print(sorted(llloop.session.fuse_devices()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
