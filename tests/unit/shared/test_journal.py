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

from llloop.shared.journal import HANDLE, INODE, LINK, RECORD_SIZE, Journal
from tests.unit.killable_front import Killed, Life, killable_journal, living
from tests.unit.support import Heir, close_journal

FIELDS = 8
MOST = 2**64 - 1
NAMES = [b"", b"a", b"x" * 47, b"x" * 48, b"x" * 49, b"y" * 160, b"y" * 161, b"z" * 255, b"\xff\0" * 150, b"p" * 4095]


class Content(NamedTuple):
    kind: int
    fields: tuple[int, ...]
    name: bytes


def content(journal: Journal) -> dict[int, Content]:
    """What the next process finds, by place, in its order."""
    return {record.place: Content(*record[1:]) for record in Heir(journal).recover()}


@pytest.fixture
def journal() -> Iterator[Journal]:
    own = Journal(256)
    yield own
    close_journal(own)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: str(len(name)))
def test_a_record_is_found_as_it_was_made(journal: Journal, name: bytes) -> None:
    fields = (0, 1, MOST, 2**63, 5, 6, 7, 8)
    place = journal.add(LINK, fields, name)
    assert place
    assert content(journal) == {place: Content(LINK, fields, name)}
    assert [journal.get(place, field) for field in range(FIELDS)] == list(fields)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: str(len(name)))
def test_a_place_that_is_used_again_holds_nothing_of_the_old(journal: Journal, name: bytes) -> None:
    journal.remove(journal.add(INODE, (MOST,) * FIELDS, b"o" * 300))
    place = journal.add(HANDLE, (0,) * FIELDS, name)
    assert content(journal) == {place: Content(HANDLE, (0,) * FIELDS, name)}


def test_a_number_is_changed_and_the_others_are_not(journal: Journal) -> None:
    first, second = (journal.add(INODE, tuple(range(FIELDS)), b"n" * 100) for _ in range(2))
    for field in range(FIELDS):
        journal.set(first, field, MOST - field)
    assert content(journal)[first].fields == tuple(MOST - field for field in range(FIELDS))
    assert content(journal)[second].fields == tuple(range(FIELDS))
    assert {one.name for one in content(journal).values()} == {b"n" * 100}


def test_places_are_used_again(journal: Journal) -> None:
    """However many come and go, and through however many processes, no more is taken than is needed at a time."""
    for number in range(2000):
        places = [journal.add(INODE, (number,) * FIELDS, NAMES[number % 9])]
        places.append(journal.add(HANDLE, (0,) * FIELDS))
        assert all(places)
        if number % 50 == 0:
            journal = Heir(journal)
            assert [record.place for record in journal.recover()] == places
        for place in places:
            journal.remove(place)
    assert content(journal) == {}


def test_the_older_come_first_though_their_places_do_not(journal: Journal) -> None:
    for number in range(5):
        journal.add(INODE, (number,) * FIELDS)
    for place in list(content(journal))[:3]:
        journal.remove(place)
    for number in range(5, 8):
        journal.add(INODE, (number,) * FIELDS)
    assert [one.fields[0] for one in content(journal).values()] == [3, 4, 5, 6, 7]
    successor = Heir(journal)
    successor.recover()
    successor.add(INODE, (8,) * FIELDS)
    assert [one.fields[0] for one in content(journal).values()] == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: str(len(name)))
def test_what_finds_no_room_is_not_there_and_harms_nobody(name: bytes) -> None:
    """Least of all is there a record with half a name."""
    journal = Journal(50)
    places: list[int] = []
    while place := journal.add(INODE, (len(places),) * FIELDS, name):
        places.append(place)
    before = content(journal)
    assert list(before) == places
    assert {one.name for one in before.values()} <= {name}
    journal.set(0, 3, 12345)
    journal.remove(0)
    assert journal.get(0, 3) == 12345 or journal.get(0, 3) == 0
    assert content(journal) == before
    # With room for short ones left, these are still taken.
    while journal.add(HANDLE, (1,) * FIELDS):
        pass
    assert {place: one for place, one in content(journal).items() if one.kind == INODE} == before
    if places:
        journal.remove(places[0])
        assert journal.add(INODE, (7,) * FIELDS, name), "the room that was freed is not used"
    close_journal(journal)


def test_no_room_that_names_have_lost_is_lost() -> None:
    """A long name for which there was no room leaves none of its parts behind."""
    journal = Journal(20)
    short = []
    while place := journal.add(HANDLE, (1,) * FIELDS):
        short.append(place)
    for place in short[:3]:
        journal.remove(place)
    for _ in range(10):
        assert not journal.add(INODE, (1,) * FIELDS, b"x" * 4000)
    assert [bool(journal.add(HANDLE, (1,) * FIELDS)) for _ in range(4)] == [True, True, True, False]
    close_journal(journal)


def test_of_a_request_sent_again_its_tries_are_counted(journal: Journal) -> None:
    assert [Heir(journal).serving_again(9) for _ in range(3)] == [1, 2, 3]
    assert Heir(journal).serving_again(10) == 1
    assert Heir(journal).serving_again(9) == 1


# Killed


def change(journal: Journal, places: list[int]) -> None:
    journal.set(places[0], 4, 2**40)


CHANGES: dict[str, Callable[[Journal, list[int]], object]] = {
    "add": lambda journal, places: journal.add(INODE, (9,) * FIELDS, b"new"),
    "add long": lambda journal, places: journal.add(INODE, (9,) * FIELDS, b"new" * 120),
    "remove": lambda journal, places: journal.remove(places[0]),
    "remove long": lambda journal, places: journal.remove(places[1]),
    "change": change,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_change_is_done_or_not_wherever_it_is_cut(
    change: Callable[[Journal, list[int]], object], fresh: bool
) -> None:
    def prepared() -> tuple[Journal, list[int]]:
        journal = Journal(64)
        places = [journal.add(INODE, (number,) * FIELDS, b"old" * number * 40) for number in range(1, 4)]
        if not fresh:  # what comes lies where something has been before
            for place in [journal.add(LINK, (MOST,) * FIELDS, b"gone" * 100) for _ in range(3)]:
                journal.remove(place)
        return journal, places

    journal, places = prepared()
    before = sorted(content(journal).values())
    change(journal, places)
    after = sorted(content(journal).values())
    assert after != before
    seen = []
    for steps in range(1000):
        journal, places = prepared()
        life = Life(steps)
        killable_front = killable_journal(journal, life)
        killable_front.recover()
        try:
            with living(life):
                change(killable_front, places)
        except Killed:
            found = sorted(content(journal).values())
            assert found in (before, after)
            seen.append(found == after)
        else:
            assert sorted(content(journal).values()) == after
            assert seen == sorted(seen), "what was done is undone"
            assert steps > 0 and not seen[0]
            return
    raise AssertionError("it has no end")


class JournalMachine(RuleBasedStateMachine):
    """Processes that follow each other, each killed at a random step of what it does, or not."""

    lives = st.none() | st.integers(0, 12)

    @initialize()
    def start(self) -> None:
        self.memory = Journal(160)
        self.journal = Heir(self.memory)
        self.model: dict[int, Content] = {}

    def do(
        self, steps: int | None, action: Callable[[Journal], int | None], then: dict[int | None, Content | None]
    ) -> None:
        """Do something; *then* says what is at a place afterwards, with None for the place that the action returns."""
        life = Life(steps)
        own = killable_journal(self.journal, life, knowing=True)
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
            self.journal = Heir(self.memory)
            self.journal.recover()
        else:
            assert list(found.items()) == list(after.items()) or found == after
            self.model = after
            self.journal = Heir(own, knowing=True)
            self.journal.cells = self.memory.cells

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
        self.do(steps, lambda journal: journal.add(kind, fields, name), {None: Content(kind, fields, name)})

    @precondition(lambda self: self.model)
    @rule(data=st.data(), steps=lives)
    def remove(self, data: st.DataObject, steps: int | None) -> None:
        place = data.draw(st.sampled_from(sorted(self.model)))
        self.do(steps, lambda journal: journal.remove(place), {place: None})

    @precondition(lambda self: self.model)
    @rule(data=st.data(), field=st.integers(0, FIELDS - 1), value=st.integers(0, MOST), steps=lives)
    def set(self, data: st.DataObject, field: int, value: int, steps: int | None) -> None:
        place = data.draw(st.sampled_from(sorted(self.model)))
        old = self.model[place]
        fields = (*old.fields[:field], value, *old.fields[field + 1 :])
        self.do(steps, lambda journal: journal.set(place, field, value), {place: old._replace(fields=fields)})

    @rule()
    def die_idle(self) -> None:
        self.journal = Heir(self.memory)
        self.journal.recover()

    @invariant()
    def no_place_is_lost(self) -> None:
        used = self.memory.cells[16] - 2
        taken = sum(1 + max(0, -(-(len(one.name) - 48) // 112)) for one in self.model.values())
        assert used == taken + self.journal.free_places

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            close_journal(self.memory)


TestRecords = JournalMachine.TestCase
TestRecords.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_process_that_is_really_killed() -> None:
    """Whatever the moment: each record has the one value or the other, and the name that goes with it."""
    journal = Journal(1 << 12)
    names = {number: b"%d" % number * (number * 7 % 90 + 1) for number in range(100)}
    for intent in range(10):
        pid = os.fork()
        if pid == 0:
            try:
                own = Heir(journal)
                places: dict[int, int] = {}
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
        _wait_until_busy(journal, intent)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found: dict[int, int] = {}
        for record in Heir(journal).recover():
            number = record.fields[0]
            assert record.name == names[number]
            assert record.fields[1:-1] == (len(record.name),) * (FIELDS - 2)
            assert record.fields[-1] in (0, len(record.name))
            found[number] = found.get(number, 0) + 1
        assert sum(found.values()) - len(found) <= 1, "only what was being moved is there twice"
    close_journal(journal)


def _wait_until_busy(journal: Journal, intent: int) -> None:
    seen: set[bytes] = set()
    while len(seen) < 20 + 3 * intent:
        seen.add(bytes(journal.memory[3 * RECORD_SIZE : 4 * RECORD_SIZE]))
