"""INIT: llloop requests exactly the features that the kernel offers and llloop uses."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llloop.linux import fuse
from llloop.shared.negotiation import (
    MAX_BACKGROUND,
    MAX_BACKGROUND_COLLECTED,
    MAX_PAGES,
    MAX_WRITE,
    PROTOCOL_MINOR,
    Capabilities,
    Feature,
    UnsupportedProtocol,
    negotiate,
)

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
EVERYTHING = 2**64 - 1


def init_request(offered: int, minor: int = 41, major: int = 7, readahead: int = 131072, unique: int = 2) -> bytes:
    """FUSE_INIT as kernels since 5.17 send it."""
    body = struct.pack("=IIIII44x", major, minor, readahead, offered & 0xFFFFFFFF, offered >> 32)
    return struct.pack("=IIQQIIII", 40 + len(body), 26, unique, 0, 0, 0, 0, 0) + body


def agree(
    request: bytes, *, posix_acl: bool = False, writeback: bool = False, passthrough: bool = False, stack_depth: int = 1
) -> tuple[bytes, Capabilities]:
    return negotiate(
        request, posix_acl=posix_acl, writeback=writeback, passthrough=passthrough, stack_depth=stack_depth
    )


def parse(reply: bytes) -> dict[str, int]:
    length, error, unique = struct.unpack_from("=IiQ", reply)
    assert length == len(reply) == 16 + 64
    assert error == 0
    names = (
        *("major", "minor", "readahead", "flags", "background", "congestion", "max_write", "time_gran"),
        *("max_pages", "map_alignment", "flags2", "stack_depth", "timeout"),
    )
    values = dict(zip(names, struct.unpack_from("=IIIIHHIIHHIIH", reply, 16), strict=True))
    assert not any(reply[16 + 42 :]), "bytes that are reserved"
    return {**values, "unique": unique, "agreed": values["flags"] | values["flags2"] << 32}


BY_WISH = {
    "posix_acl": Feature.POSIX_ACL,
    "writeback": Feature.WRITEBACK_CACHE,
    "passthrough": Feature.PASSTHROUGH,
}


def offered_in_all(offered: int, feature: Feature) -> bool:
    """Whether a feature is among those offered, of which the upper half counts only with INIT_EXT."""
    return bool(offered & feature) and (feature < 2**32 or bool(offered & Feature.INIT_EXT))


WISHES = st.fixed_dictionaries({name: st.booleans() for name in ("posix_acl", "writeback", "passthrough")})


@given(offered=U64, wishes=WISHES, minor=st.integers(23, 60), readahead=U32, unique=U64)
def test_only_offered_features_are_agreed_on(
    offered: int, wishes: dict[str, bool], minor: int, readahead: int, unique: int
) -> None:
    request = init_request(offered, minor, readahead=readahead, unique=unique)
    reply, capabilities = agree(request, **wishes)
    answer = parse(reply)
    assert answer["agreed"] & ~offered == 0
    assert answer["agreed"] == int(capabilities.features)
    assert answer["unique"] == unique
    assert answer["major"] == 7
    assert answer["minor"] == capabilities.minor == min(minor, PROTOCOL_MINOR)
    assert answer["readahead"] <= readahead
    if not offered & Feature.INIT_EXT:
        assert answer["flags2"] == 0, "the kernel does not look there, and never offered it"
    for name, feature in BY_WISH.items():
        assert bool(answer["agreed"] & feature) is (wishes[name] and offered_in_all(offered, feature)), name
    assert answer["stack_depth"] == (1 if answer["agreed"] & Feature.PASSTHROUGH else 0)
    assert not answer["agreed"] & ~int(sum(Feature)), "a bit that llloop has no name for"


def test_useful_features_are_requested() -> None:
    _, capabilities = agree(init_request(EVERYTHING), posix_acl=True)
    wanted = (
        "async_read atomic_o_trunc big_writes dont_mask auto_inval_data async_dio parallel_dirops posix_acl max_pages "
        "cache_symlinks handle_killpriv_v2 setxattr_ext init_ext has_resend"
    )
    agreed = capabilities.describe().partition(", ")[2].split(", ")
    assert not set(wanted.split()) - set(agreed)


def test_optional_features_are_requested_on_demand() -> None:
    _, capabilities = agree(init_request(EVERYTHING))
    assert not capabilities.features & (Feature.WRITEBACK_CACHE | Feature.PASSTHROUGH | Feature.POSIX_ACL)


@pytest.mark.parametrize("depth", [1, 2])
def test_passthrough_sets_the_stack_depth(depth: int) -> None:
    answer = parse(agree(init_request(EVERYTHING), passthrough=True, stack_depth=depth)[0])
    assert answer["stack_depth"] == depth


def test_without_removes_a_feature() -> None:
    _, capabilities = agree(init_request(EVERYTHING), passthrough=True)
    less = capabilities.without(Feature.PASSTHROUGH)
    assert capabilities.features ^ less.features == Feature.PASSTHROUGH
    assert less.minor == capabilities.minor


def test_sizes_fit_the_pipe_and_each_other() -> None:
    answer = parse(agree(init_request(EVERYTHING), posix_acl=False)[0])
    assert answer["max_write"] == MAX_WRITE == MAX_PAGES * fuse.PAGE_SIZE
    assert answer["max_pages"] == MAX_PAGES
    # The header and an unaligned range take two more; more than 256 no ordinary process may have.
    assert MAX_PAGES + 2 <= 256
    assert 0 < answer["congestion"] <= answer["background"] == MAX_BACKGROUND
    collected = parse(agree(init_request(EVERYTHING), writeback=True)[0])
    assert 0 < collected["congestion"] <= collected["background"] == MAX_BACKGROUND_COLLECTED
    assert answer["time_gran"] == 1
    assert answer["map_alignment"] == answer["stack_depth"] == answer["timeout"] == 0


@pytest.mark.parametrize(("major", "minor"), [(7, 22), (7, 0), (6, 40), (8, 0), (0, 0), (2**32 - 1, 2**32 - 1)])
def test_unsupported_protocol_is_refused(major: int, minor: int) -> None:
    with pytest.raises(UnsupportedProtocol, match=rf"{major}\.{minor}.*7\.23"):
        agree(init_request(EVERYTHING, minor, major), posix_acl=False)


def test_init_without_flags2() -> None:
    """Before protocol 7.36 struct fuse_init_in ended with the flags."""
    short = init_request(EVERYTHING & ~int(Feature.INIT_EXT), minor=35)[: 40 + 16]
    answer = parse(agree(short, posix_acl=False)[0])
    assert answer["minor"] == 35
    assert answer["flags2"] == 0
    assert answer["flags"] & Feature.MAX_PAGES


@given(length=st.integers(0, 104), minor=st.integers(23, 60))
def test_truncated_init_offers_only_its_features(length: int, minor: int) -> None:
    whole = init_request(EVERYTHING, minor)
    offered = int.from_bytes(whole[52:56][: max(0, length - 52)], "little")
    offered |= int.from_bytes(whole[56:60][: max(0, length - 56)], "little") << 32
    try:
        reply, _ = agree(whole[:length], posix_acl=True)
    except UnsupportedProtocol:
        assert length < 48
        return
    assert parse(reply)["agreed"] & ~offered == 0


@given(st.binary(max_size=256), st.booleans())
@example(b"", True)
@example(b"\xff" * 104, True)
def test_arbitrary_bytes(request_: bytes, posix_acl: bool) -> None:
    try:
        reply, capabilities = agree(request_, posix_acl=posix_acl)
    except UnsupportedProtocol:
        return
    assert parse(reply)["agreed"] == int(capabilities.features)


@given(body=st.binary(min_size=12, max_size=64), minor=st.integers(23, 60))
def test_arbitrary_offers(body: bytes, minor: int) -> None:
    request = struct.pack("=IIQQIIII", 40, 26, 5, 0, 0, 0, 0, 0) + struct.pack("=II", 7, minor) + body
    flags, flags2 = struct.unpack_from("=4xII", body.ljust(64, b"\0"))
    answer = parse(agree(request, posix_acl=True)[0])
    assert answer["agreed"] & ~(flags | flags2 << 32) == 0


def test_describe_lists_protocol_and_features() -> None:
    words = Capabilities(41, Feature.ASYNC_READ | Feature.HAS_RESEND).describe()
    assert words == "FUSE 7.41, async_read, has_resend"
