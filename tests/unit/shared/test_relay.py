"""The pipe to the event relay, and what the relay tells the front."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from llloop.linux import fuse
from llloop.shared.relay import Answer, Kind, Place, RelayEvent, RelayPipe, RelayState

EVENTS = [
    RelayEvent(Kind.CREATE, True, Place(1, b"\xff")),
    RelayEvent(Kind.RENAME, False, Place((1 << 64) - 1, b"a" * 255), 5, Place(7, b"b" * 255), 9),
    RelayEvent(Kind.ATTRIB, True, Place(1, b"")),
]


@pytest.fixture
def pipe() -> Iterator[RelayPipe]:
    made = RelayPipe(os.pipe2(os.O_CLOEXEC))
    yield made
    os.close(made.reader)
    os.close(made.writer)


def test_events_arrive_in_order(pipe: RelayPipe) -> None:
    assert all(pipe.tell(event) for event in EVENTS)
    assert list(pipe.received()) == EVENTS
    assert list(pipe.received()) == []


def test_a_full_pipe_drops_events_and_does_not_block(pipe: RelayPipe) -> None:
    told = 0
    while pipe.tell(EVENTS[1]):
        told += 1
    received = 0
    while batch := list(pipe.received()):
        received += len(batch)
    assert received == told > 100


def test_the_next_reader_begins_with_a_whole_event(pipe: RelayPipe) -> None:
    while pipe.tell(EVENTS[1]):
        pass
    os.read(pipe.reader, 100)  # a dead reader has read a part
    pipe.empty()
    assert pipe.tell(EVENTS[0])
    assert list(pipe.received()) == EVENTS[:1]


def test_each_answer_is_found_by_its_name() -> None:
    state = RelayState()
    attributes = bytes(range(fuse.ATTR.size))
    state.begin([Answer(Place(1, b"x" * 255), 5, attributes), Answer(Place(2, b"y"), 0)], False)
    assert [state.find(1, b"x" * 255), state.find(2, b"y"), state.find(1, b"y"), state.find(2, b"")] == [
        0,
        1,
        None,
        None,
    ]
    assert (state.target, state.looked_up(0), state.look_up(0), state.looked_up(0)) == (5, None, (5, attributes), 5)
    state.end()
    assert (state.find(2, b"y"), state.target) == (None, 0)


def test_no_phantom_is_used_twice() -> None:
    state = RelayState()
    first = state.new_phantom()
    state.started()  # the next relay
    assert state.new_phantom() not in (first, 0)
