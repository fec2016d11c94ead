"""Records in shared memory: what a process leaves in them that is killed at any moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llloop.ledger import HANDLE, INODE, LINK, RECORD_SIZE, Ledger
from tests.unit.mortal import Killed, Life, living, mortal_ledger
from tests.unit.support import close_ledger, heir

FIELDS = 8
MOST = 2**64 - 1
NAMES = [b"", b"a", b"x" * 47, b"x" * 48, b"x" * 49, b"y" * 160, b"y" * 161, b"z" * 255, b"\xff\0" * 150, b"p" * 4095]


class Content(NamedTuple):
    kind: int
    fields: tuple[int, ...]
    name: bytes


def content(ledger: Ledger) -> dict[int, Content]:
    """What the next process finds, by place, in its order."""
    return {record.place: Content(*record[1:]) for record in heir(ledger).recover()}


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    own = Ledger(256)
    yield own
    close_ledger(own)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: str(len(name)))
def test_a_record_is_found_as_it_was_made(ledger: Ledger, name: bytes) -> None:
    fields = (0, 1, MOST, 2**63, 5, 6, 7, 8)
    place = ledger.add(LINK, fields, name)
    assert place
    assert content(ledger) == {place: Content(LINK, fields, name)}
    assert [ledger.get(place, field) for field in range(FIELDS)] == list(fields)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: str(len(name)))
def test_a_place_that_is_used_again_holds_nothing_of_the_old(ledger: Ledger, name: bytes) -> None:
    ledger.remove(ledger.add(INODE, (MOST,) * FIELDS, b"o" * 300))
    place = ledger.add(HANDLE, (0,) * FIELDS, name)
    assert content(ledger) == {place: Content(HANDLE, (0,) * FIELDS, name)}


def test_a_number_is_changed_and_the_others_are_not(ledger: Ledger) -> None:
    first, second = (ledger.add(INODE, tuple(range(FIELDS)), b"n" * 100) for _ in range(2))
    for field in range(FIELDS):
        ledger.set(first, field, MOST - field)
    assert content(ledger)[first].fields == tuple(MOST - field for field in range(FIELDS))
    assert content(ledger)[second].fields == tuple(range(FIELDS))
    assert {one.name for one in content(ledger).values()} == {b"n" * 100}


def test_places_are_used_again(ledger: Ledger) -> None:
    """However many come and go, and through however many processes, no more is taken than is needed at a time."""
    for number in range(2000):
        places = [ledger.add(INODE, (number,) * FIELDS, NAMES[number % 9])]
        places.append(ledger.add(HANDLE, (0,) * FIELDS))
        assert all(places)
        if number % 50 == 0:
            ledger = heir(ledger)
            assert [record.place for record in ledger.recover()] == places
        for place in places:
            ledger.remove(place)
    assert content(ledger) == {}


def test_the_older_come_first_though_their_places_do_not(ledger: Ledger) -> None:
    for number in range(5):
        ledger.add(INODE, (number,) * FIELDS)
    for place in list(content(ledger))[:3]:
        ledger.remove(place)
    for number in range(5, 8):
        ledger.add(INODE, (number,) * FIELDS)
    assert [one.fields[0] for one in content(ledger).values()] == [3, 4, 5, 6, 7]
    successor = heir(ledger)
    successor.recover()
    successor.add(INODE, (8,) * FIELDS)
    assert [one.fields[0] for one in content(ledger).values()] == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: str(len(name)))
def test_what_finds_no_room_is_not_there_and_harms_nobody(name: bytes) -> None:
    """Least of all is there a record with half a name."""
    ledger = Ledger(50)
    places = []
    while place := ledger.add(INODE, (len(places),) * FIELDS, name):
        places.append(place)
    before = content(ledger)
    assert list(before) == places
    assert {one.name for one in before.values()} <= {name}
    ledger.set(0, 3, 12345)
    ledger.remove(0)
    assert ledger.get(0, 3) == 12345 or ledger.get(0, 3) == 0
    assert content(ledger) == before
    # With room for short ones left, these are still taken.
    while ledger.add(HANDLE, (1,) * FIELDS):
        pass
    assert {place: one for place, one in content(ledger).items() if one.kind == INODE} == before
    if places:
        ledger.remove(places[0])
        assert ledger.add(INODE, (7,) * FIELDS, name), "the room that was freed is not used"
    close_ledger(ledger)


def test_no_room_that_names_have_lost_is_lost() -> None:
    """A long name for which there was no room leaves none of its parts behind."""
    ledger = Ledger(20)
    short = []
    while place := ledger.add(HANDLE, (1,) * FIELDS):
        short.append(place)
    for place in short[:3]:
        ledger.remove(place)
    for _ in range(10):
        assert not ledger.add(INODE, (1,) * FIELDS, b"x" * 4000)
    assert [bool(ledger.add(HANDLE, (1,) * FIELDS)) for _ in range(4)] == [True, True, True, False]
    close_ledger(ledger)


def test_of_a_request_sent_again_its_tries_are_counted(ledger: Ledger) -> None:
    assert [heir(ledger).serving_again(9) for _ in range(3)] == [1, 2, 3]
    assert heir(ledger).serving_again(10) == 1
    assert heir(ledger).serving_again(9) == 1


# Killed


def change(ledger: Ledger, places: list[int]) -> None:
    ledger.set(places[0], 4, 2**40)


CHANGES: dict[str, Callable[[Ledger, list[int]], object]] = {
    "add": lambda ledger, places: ledger.add(INODE, (9,) * FIELDS, b"new"),
    "add long": lambda ledger, places: ledger.add(INODE, (9,) * FIELDS, b"new" * 120),
    "remove": lambda ledger, places: ledger.remove(places[0]),
    "remove long": lambda ledger, places: ledger.remove(places[1]),
    "change": change,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_change_is_done_or_not_wherever_it_is_cut(change: Callable[[Ledger, list[int]], object], fresh: bool) -> None:
    def prepared() -> tuple[Ledger, list[int]]:
        ledger = Ledger(64)
        places = [ledger.add(INODE, (number,) * FIELDS, b"old" * number * 40) for number in range(1, 4)]
        if not fresh:  # what comes lies where something has been before
            for place in [ledger.add(LINK, (MOST,) * FIELDS, b"gone" * 100) for _ in range(3)]:
                ledger.remove(place)
        return ledger, places

    ledger, places = prepared()
    before = sorted(content(ledger).values())
    change(ledger, places)
    after = sorted(content(ledger).values())
    assert after != before
    seen = []
    for steps in range(1000):
        ledger, places = prepared()
        life = Life(steps)
        mortal = mortal_ledger(ledger, life)
        mortal.recover()
        try:
            with living(life):
                change(mortal, places)
        except Killed:
            found = sorted(content(ledger).values())
            assert found in (before, after)
            seen.append(found == after)
        else:
            assert sorted(content(ledger).values()) == after
            assert seen == sorted(seen), "what was done is undone"
            assert steps > 0 and not seen[0]
            return
    raise AssertionError("it has no end")


class Records(RuleBasedStateMachine):
    """Processes that follow each other, each killed at a random step of what it does, or not."""

    lives = st.none() | st.integers(0, 12)

    @initialize()
    def start(self) -> None:
        self.memory = Ledger(160)
        self.ledger = heir(self.memory)
        self.model: dict[int, Content] = {}

    def do(
        self, steps: int | None, action: Callable[[Ledger], int | None], then: dict[int | None, Content | None]
    ) -> None:
        """Do something; *then* says what is at a place afterwards, with None for the place that the action returns."""
        life = Life(steps)
        own = mortal_ledger(self.ledger, life)
        own._free, own._age = self.ledger._free, self.ledger._age
        place: int | None = None
        killed = False
        try:
            with living(life):
                place = action(own)
        except Killed:
            killed = True
        after = dict(self.model)
        for where, what in then.items():
            if where is not None and what is None:
                del after[where]
            elif what is not None and (where or place):
                after[where or place or 0] = what
        found = content(self.memory)
        if killed:
            expected = [sorted(self.model.values()), sorted([*after.values(), *self.missing(then)])]
            assert sorted(found.values()) in expected
            self.model = found
            self.ledger = heir(self.memory)
            self.ledger.recover()
        else:
            assert list(found.items()) == list(after.items()) or found == after
            self.model = after
            self.ledger._age = own._age

    @staticmethod
    def missing(then: dict[int | None, Content | None]) -> list[Content]:
        return [what for where, what in then.items() if where is None and what is not None]

    @rule(
        kind=st.sampled_from([INODE, LINK, HANDLE]),
        fields=st.tuples(*[st.integers(0, MOST)] * FIELDS),
        name=st.binary(max_size=300),
        steps=lives,
    )
    def add(self, kind: int, fields: tuple[int, ...], name: bytes, steps: int | None) -> None:
        self.do(steps, lambda ledger: ledger.add(kind, fields, name), {None: Content(kind, fields, name)})

    @precondition(lambda self: self.model)
    @rule(data=st.data(), steps=lives)
    def remove(self, data: st.DataObject, steps: int | None) -> None:
        place = data.draw(st.sampled_from(sorted(self.model)))
        self.do(steps, lambda ledger: ledger.remove(place), {place: None})

    @precondition(lambda self: self.model)
    @rule(data=st.data(), field=st.integers(0, FIELDS - 1), value=st.integers(0, MOST), steps=lives)
    def set(self, data: st.DataObject, field: int, value: int, steps: int | None) -> None:
        place = data.draw(st.sampled_from(sorted(self.model)))
        old = self.model[place]
        fields = (*old.fields[:field], value, *old.fields[field + 1 :])
        self.do(steps, lambda ledger: ledger.set(place, field, value), {place: old._replace(fields=fields)})

    @rule()
    def die_idle(self) -> None:
        self.ledger = heir(self.memory)
        self.ledger.recover()

    @invariant()
    def no_place_is_lost(self) -> None:
        used = self.memory.cells[16] - 2
        taken = sum(1 + max(0, -(-(len(one.name) - 48) // 112)) for one in self.model.values())
        assert used == taken + len(self.ledger._free)

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            close_ledger(self.memory)


TestRecords = Records.TestCase
TestRecords.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_process_that_is_really_killed() -> None:
    """Whatever the moment: each record has the one value or the other, and the name that goes with it."""
    ledger = Ledger(1 << 12)
    names = {number: b"%d" % number * (number * 7 % 90 + 1) for number in range(100)}
    for attempt in range(10):
        pid = os.fork()
        if pid == 0:
            try:
                own = heir(ledger)
                places = {}
                for record in own.recover():
                    own.remove(places.get(record.fields[0], 0))
                    places[record.fields[0]] = record.place
                while True:
                    for number, name in names.items():
                        old = places.get(number, 0)
                        places[number] = own.add(INODE, (number, *[len(name)] * (FIELDS - 1)), name)
                        own.remove(old)
                        own.set(places[number], FIELDS - 1, 0)
            finally:
                os._exit(1)
        # Long enough to be at it; where it is then differs from run to run.
        _wait_until_busy(ledger, attempt)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found: dict[int, int] = {}
        for record in heir(ledger).recover():
            number = record.fields[0]
            assert record.name == names[number]
            assert record.fields[1:-1] == (len(record.name),) * (FIELDS - 2)
            assert record.fields[-1] in (0, len(record.name))
            found[number] = found.get(number, 0) + 1
        assert sum(found.values()) - len(found) <= 1, "only what was being moved is there twice"
    close_ledger(ledger)


def _wait_until_busy(ledger: Ledger, attempt: int) -> None:
    seen = set()
    while len(seen) < 20 + 3 * attempt:
        seen.add(bytes(ledger.memory[3 * RECORD_SIZE : 4 * RECORD_SIZE]))
