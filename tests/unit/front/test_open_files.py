"""Open files by file handle."""

from __future__ import annotations

import errno
import os

from hypothesis import given
from hypothesis import strategies as st

from llloop.front.descriptor_shares import Shares
from llloop.front.open_files import Handle, Handles
from llloop.shared.journal import Journal
from tests.expect import fails


def handle(nodeid: int = 100) -> Handle:
    return Handle(5, nodeid, 0, os.O_RDWR)


def table() -> Handles:
    return Handles(Journal(256), 1, Shares(1000))


def test_handle_is_found_by_number_and_inode() -> None:
    handles = table()
    first, second, other = handle(100), handle(100), handle(200)
    numbers = [handles.add(one) for one in (first, second, other)]
    assert [handles.get(number) for number in numbers] == [first, second, other]
    assert handles.of_inode(100) == [first, second]
    assert handles.of_inode(300) == []
    assert handles.remove(numbers[0]) is first
    assert handles.of_inode(100) == [second]
    handles.remove(numbers[1])
    assert handles.of_inode(100) == []
    assert 100 not in handles.open_inodes() and 200 in handles.open_inodes()


def test_writer_is_root_only_without_other_writers() -> None:
    handles = table()
    by_root, by_user, other_by_user = (
        Handle(5, nodeid, 0, flags, opener)
        for nodeid, flags, opener in (
            (100, os.O_RDWR, (0, 0)),
            (100, os.O_RDONLY, (1000, 1001)),
            (200, os.O_RDWR, (1000, 1001)),
        )
    )
    for one in (by_root, by_user, other_by_user):
        handles.add(one)
    assert handles.writer(by_root) == (0, 0)
    assert handles.writer(other_by_user) == (1000, 1001)
    by_writer = Handle(5, 100, 0, os.O_WRONLY, (2000, 2001))
    number = handles.add(by_writer)
    assert handles.writer(by_root) == (2000, 2001)
    handles.remove(number)
    assert handles.writer(by_root) == (0, 0)


def test_unknown_handle_gives_ebadf() -> None:
    handles = table()
    number = handles.add(handle())
    handles.remove(number)
    for wrong in (number, 0, 2**63):
        with fails(errno.EBADF):
            handles.get(wrong)
        with fails(errno.EBADF):
            handles.remove(wrong)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3)), max_size=60))
def test_numbers_are_not_reused(steps: list[tuple[bool, int]]) -> None:
    handles = table()
    used: set[int] = set()
    open_now: dict[int, Handle] = {}
    for adding, nodeid in steps:
        if adding:
            number = handles.add(one := handle(nodeid))
            assert number not in used
            used.add(number)
            open_now[number] = one
        elif open_now:
            number = min(open_now)
            assert handles.remove(number) is open_now.pop(number)
        assert len(handles) == len(open_now)
        for inode in range(1, 4):
            assert handles.of_inode(inode) == [one for one in open_now.values() if one.nodeid == inode]
    for number in open_now:
        handles.remove(number)
    assert len(handles) == 0 and not any(inode in handles.open_inodes() for inode in range(1, 4))
