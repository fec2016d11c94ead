"""Records in shared memory: what a process leaves in them that is killed at any moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from llloop.shared.journal import Journal
from tests.unit.killable_front import Killed, Life, killable_journal, living
from tests.unit.support import Heir, close_journal

FIELDS = 8
MOST = 2**64 - 1


def content(journal: Journal) -> dict[int, tuple[int, ...]]:
    """What the next process finds, by place."""
    return {record.place: record.fields for record in Heir(journal).recover()}


@pytest.fixture
def journal() -> Iterator[Journal]:
    own = Journal(256)
    yield own
    close_journal(own)


def test_a_record_is_found_as_it_was_made(journal: Journal) -> None:
    fields = (0, 1, MOST, 2**63, 5, 6, 7, 8)
    place = journal.add(*fields)
    assert content(journal) == {place: fields}
    assert [journal.get(place, field) for field in range(FIELDS)] == list(fields)


def test_a_number_is_changed_and_the_others_are_not(journal: Journal) -> None:
    first, second = (journal.add(*range(FIELDS)) for _ in range(2))
    for field in range(FIELDS):
        journal.set(first, field, MOST - field)
    assert content(journal)[first] == tuple(MOST - field for field in range(FIELDS))
    assert content(journal)[second] == tuple(range(FIELDS))


def test_places_are_used_again(journal: Journal) -> None:
    """However many come and go, and through however many processes, no more is taken than is needed at a time."""
    for number in range(2000):
        places = [journal.add(*[number] * FIELDS), journal.add(*[0] * FIELDS)]
        assert all(places)
        if number % 50 == 0:
            journal = Heir(journal)
            assert sorted(record.place for record in journal.recover()) == sorted(places)
        for place in places:
            journal.remove(place)
    assert content(journal) == {}


def test_what_finds_no_room_is_not_there_and_harms_nobody() -> None:
    journal = Journal(50)
    places: list[int] = []
    while place := journal.add(*[len(places)] * FIELDS):
        places.append(place)
    before = content(journal)
    assert list(before) == places
    journal.set(0, 3, 12345)
    journal.remove(0)
    assert content(journal) == before
    journal.remove(places[0])
    assert journal.add(*[7] * FIELDS) == places[0], "the room that was freed is not used"
    close_journal(journal)


def test_of_a_request_sent_again_its_tries_are_counted(journal: Journal) -> None:
    assert [Heir(journal).serving_again(9) for _ in range(3)] == [1, 2, 3]
    assert Heir(journal).serving_again(10) == 1
    assert Heir(journal).serving_again(9) == 1


CHANGES: dict[str, Callable[[Journal, list[int]], object]] = {
    "add": lambda journal, places: journal.add(*[9] * FIELDS),
    "remove": lambda journal, places: journal.remove(places[0]),
    "change": lambda journal, places: journal.set(places[0], 4, 2**40),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_change_is_done_or_not_wherever_it_is_cut(
    change: Callable[[Journal, list[int]], object], fresh: bool
) -> None:
    def prepared() -> tuple[Journal, list[int]]:
        journal = Journal(64)
        places = [journal.add(*[number] * FIELDS) for number in range(1, 4)]
        if not fresh:  # what comes lies where something has been before
            journal.remove(journal.add(*[MOST] * FIELDS))
        return journal, places

    journal, places = prepared()
    before = sorted(content(journal).values())
    change(journal, places)
    after = sorted(content(journal).values())
    assert after != before
    seen = []
    for steps in range(100):
        journal, places = prepared()
        life = Life(steps)
        mortal = killable_journal(journal, life)
        mortal.recover()
        try:
            with living(life):
                change(mortal, places)
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
