"""Encoding and decoding of messages between front and workers, also of invalid ones."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llloop.shared.messages import MAX_MESSAGE, Answer, Malformed, Operation, Request, decode, decode_answer, encode

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)

REQUESTS = st.builds(
    Request,
    operation=st.sampled_from(list(Operation)),
    unique=U64,
    slot=st.integers(-1, 4095),
    handle=st.integers(1, 2**63),
    descriptor=st.integers(-1, 2**20),
    offset=U64,
    length=U64,
    flags=U32,
    uid=U32,
    gid=U32,
    extra=st.lists(U64, max_size=4).map(tuple),
    file=U64,
    nodeid=U64,
)

# Anything that msgpack can encode.
VALUES = st.recursive(
    st.none() | st.booleans() | I64 | st.floats() | st.binary(max_size=20) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=12) | st.dictionaries(st.text(max_size=4) | I64, children, max_size=3),
    max_leaves=30,
)


@given(REQUESTS)
def test_request_survives_encoding(request_: Request) -> None:
    message = encode(request_)
    assert len(message) <= MAX_MESSAGE
    decoded = decode(message)
    assert decoded == request_
    assert isinstance(decoded.extra, tuple)
    assert type(decoded.operation) is int


@given(st.tuples(st.sampled_from(list(Operation)), U64, I64, U64, I64))
def test_missing_fields_have_defaults(fields: tuple[int, int, int, int, int]) -> None:
    assert decode(encode(fields)) == Request(*fields)


@given(unique=U64, result=I64)
def test_answer_survives_encoding(unique: int, result: int) -> None:
    assert decode_answer(encode((unique, result))) == Answer(unique, result)


def check_refused_or_decoded(data: bytes) -> None:
    try:
        request = decode(data)
    except Malformed:
        pass
    else:
        assert type(request) is Request and len(request) == 13
    try:
        answer = decode_answer(data)
    except Malformed:
        pass
    else:
        assert type(answer.unique) is int and type(answer.result) is int


@given(st.binary(max_size=MAX_MESSAGE))
@example(b"")
@example(b"\xdd\xff\xff\xff\xff")  # an array of four billion items
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\x91" * MAX_MESSAGE)  # nested deeper than any stack
@example(b"\x81\x80\x80")  # a map as the key of a map
@example(b"\xd6\xff\x00\x00\x00\x00")  # a time stamp
@example(b"\xc7\x0c\xff" + b"\xff" * 12)  # an invalid time stamp
@example(b"\xc7\x00\xff")
@example(b"\xa1\xff")  # text that is not UTF-8
@example(b"\xc1")
def test_arbitrary_bytes(data: bytes) -> None:
    check_refused_or_decoded(data)


@given(VALUES)
def test_arbitrary_values(value: Any) -> None:
    check_refused_or_decoded(msgpack.packb(value))


@given(REQUESTS, st.data())
def test_truncated_request_is_refused(request_: Request, data: st.DataObject) -> None:
    message = encode(request_)
    with pytest.raises(Malformed):
        decode(message[: data.draw(st.integers(0, len(message) - 1))])


@given(REQUESTS, st.binary(min_size=1, max_size=8))
def test_request_with_trailing_bytes_is_refused(request_: Request, more: bytes) -> None:
    with pytest.raises(Malformed):
        decode(encode(request_) + more)


@pytest.mark.parametrize("count", [0, 1, 4, 14])
def test_number_of_fields_is_checked(count: int) -> None:
    with pytest.raises(Malformed):
        decode(encode((1,) * count))


@pytest.mark.parametrize("value", [(1,), (1, 2, 3), (1, None), (1.0, 2), (True, 1), "ab", {1: 2}])
def test_answer_must_be_two_numbers(value: Any) -> None:
    with pytest.raises(Malformed):
        decode_answer(encode(value))
