"""Notes of requests that must not be done twice."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llloop.front.recovery.intents import Intent, Intents, Note
from llloop.linux.fuse import FUSE_UNIQUE_RESEND
from llloop.linux.syscalls import fstatx
from llloop.shared.journal import Journal
from tests.unit.support import Heir, attributes, close_journal


@pytest.fixture
def journal() -> Iterator[Journal]:
    own = Journal(16)
    yield own
    close_journal(own)


def begun(journal: Journal, unique: int = 42, **noted: int) -> Note:
    """The note of a front that has begun a request."""
    note = Intents(journal).note(0)
    note.unique = unique
    note.begin(**noted)
    return note


def again(journal: Journal, unique: int) -> Intent | None:
    """What the next front finds of a request."""
    return Intents(Heir(journal)).of(unique)


def test_note_is_found_by_its_request(journal: Journal) -> None:
    before = begun(journal, number=1, nodeid=2**64 - 1, target=3, pin=0, victim=5)
    left = again(journal, 42 | FUSE_UNIQUE_RESEND)
    assert left is not None
    assert (left.done, left.number, left.nodeid, left.target, left.pin, left.victim) == (False, 1, 2**64 - 1, 3, 0, 5)
    assert (left.handle, left.backing) == (0, 0)
    before.note_handle(2**41)
    before.made_backing(9)
    with before:
        pass
    left = again(journal, 42 | FUSE_UNIQUE_RESEND)
    assert left is not None
    assert (left.done, left.handle, left.backing) == (True, 2**41, 9)


@pytest.mark.parametrize("unique", [42, 43 | FUSE_UNIQUE_RESEND, 43, FUSE_UNIQUE_RESEND, 0])
def test_another_request_finds_no_note(journal: Journal, unique: int) -> None:
    """The kernel may reuse `unique` after a long time; only requests that are sent again are marked."""
    begun(journal)
    assert again(journal, unique) is None


def test_without_note_nothing_is_found(journal: Journal) -> None:
    assert again(journal, FUSE_UNIQUE_RESEND) is None


def test_request_interrupted_twice_is_found(journal: Journal) -> None:
    begun(journal, number=7)
    assert again(journal, 42 | FUSE_UNIQUE_RESEND) is not None
    begun(Heir(journal), 44 | FUSE_UNIQUE_RESEND, number=8)  # now by a request that was itself sent again
    left = again(journal, 44 | FUSE_UNIQUE_RESEND)
    assert left is not None and left.number == 8


def test_new_note_does_not_contain_the_previous_one(journal: Journal) -> None:
    note = begun(journal, number=1, nodeid=2, target=3, pin=4, victim=5)
    note.note_handle(6)
    with note:
        pass
    note.unique = 43
    note.begin()
    left = again(journal, 43 | FUSE_UNIQUE_RESEND)
    assert left is not None
    assert (left.done, *left[2:8]) == (False, 0, 0, 0, -1, 0, 0)
    note.note_handle(6)
    note.unique = 44
    note.begin_open()
    left = again(journal, 44 | FUSE_UNIQUE_RESEND)
    assert left is not None and left.handle == 0


def test_finishing_the_takeover_removes_notes_of_a_dead_front(journal: Journal) -> None:
    begun(journal)
    intents = Intents(Heir(journal))
    assert intents.of(42 | FUSE_UNIQUE_RESEND) is not None
    intents.finish_takeover()
    assert intents.of(42 | FUSE_UNIQUE_RESEND) is None
    assert again(journal, 42 | FUSE_UNIQUE_RESEND) is None


def test_new_note_does_not_overwrite_a_needed_one(journal: Journal) -> None:
    begun(journal, number=1)
    intents = Intents(Heir(journal))
    other = intents.note_of(44 | FUSE_UNIQUE_RESEND)
    other.unique = 44 | FUSE_UNIQUE_RESEND
    other.begin(number=2)
    same = intents.note_of(42 | FUSE_UNIQUE_RESEND)
    same.unique = 42 | FUSE_UNIQUE_RESEND
    same.begin(number=3)
    found = [again(journal, unique | FUSE_UNIQUE_RESEND) for unique in (42, 44)]
    assert [intent and intent.number for intent in found] == [3, 2]


def test_finishing_the_takeover_keeps_own_notes(journal: Journal) -> None:
    begun(journal)
    intents = Intents(Heir(journal))
    note = intents.note(0)
    note.unique = 43
    note.begin(number=5)
    intents.finish_takeover()
    left = again(journal, 43 | FUSE_UNIQUE_RESEND)
    assert left is not None and left.number == 5


def test_file_created_after_the_start_may_be_its_own(journal: Journal, tmp_path: Path) -> None:
    old = fstatx_of(tmp_path / "old")
    now = time.time_ns()
    while time.clock_gettime_ns(5) <= now:
        time.sleep(0.001)
    note = begun(journal)
    new = fstatx_of(tmp_path / "new")
    left = again(journal, 42 | FUSE_UNIQUE_RESEND)
    assert left is not None
    assert left.made(new) and not left.made(old)
    with note:
        pass
    left = again(journal, 42 | FUSE_UNIQUE_RESEND)
    assert left is not None and left.made(attributes(ctime=(0, 0)))


def fstatx_of(path: Path):  # type: ignore[no-untyped-def]
    path.write_text("x")
    fd = os.open(path, os.O_RDONLY)
    try:
        return fstatx(fd)
    finally:
        os.close(fd)


def test_pin_must_be_of_its_file(journal: Journal, tmp_path: Path) -> None:
    for name in ("file", "other"):
        (tmp_path / name).write_text(name)
    pin = os.open(tmp_path / "file", os.O_PATH)
    begun(journal, pin=pin, victim=os.fstat(pin).st_ino)
    assert Intents(Heir(journal)).left_pins == {pin}
    other = os.open(tmp_path / "other", os.O_PATH)
    os.dup2(other, pin)
    assert Intents(Heir(journal)).left_pins == set()
    os.close(pin)
    os.close(other)
    assert Intents(Heir(journal)).left_pins == set()


def test_only_orphans_open_for_io_are_taken(journal: Journal, tmp_path: Path) -> None:
    for name in ("file", "other"):
        (tmp_path / name).write_text(name)
    path_only, other, file = (
        os.open(tmp_path / "file", os.O_PATH),
        os.open(tmp_path / "other", os.O_RDONLY),
        os.open(tmp_path / "file", os.O_RDWR),
    )
    intents = Intents(journal)
    intents.adopt({path_only, other, file})
    assert intents.take_orphan(fstatx(file)) == file
    assert intents.take_orphan(fstatx(file)) is None, "it is another's now"
    for fd in intents.finish_takeover():
        os.close(fd)
    os.close(file)
    for fd in (path_only, other):
        with pytest.raises(OSError):
            os.fstat(fd)
