"""Detection of WRITEs after which the kernel's page cache may contain old data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llloop.front.descriptor_shares import Shares
from llloop.front.open_files import Handle, Handles
from llloop.front.page_cache import PageCache
from llloop.shared.journal import Journal

PAGE = 4096
SECOND = 1_000_000_000
NOW = 1000 * SECOND
READER, WRITER = 11, 12


@pytest.mark.parametrize(
    ("offset", "size", "stale"),
    [(0, PAGE, False), (0, PAGE + 1, True), (2 * PAGE - 1, 1, True), (2 * PAGE, 10, False), (0, 9 * PAGE, True)],
)
def test_page_read_by_another_thread_may_be_stale(offset: int, size: int, stale: bool) -> None:
    pages = PageCache()
    pages.note_read(READER, PAGE, PAGE, NOW)
    assert pages.may_be_stale(WRITER, offset, size, NOW + 5) is stale


def test_page_read_by_the_writer_is_not_stale() -> None:
    pages = PageCache()
    pages.note_read(WRITER, 0, PAGE, NOW)
    assert not pages.may_be_stale(WRITER, 0, PAGE, NOW)
    pages.note_read(READER, PAGE, PAGE, NOW)
    assert pages.may_be_stale(WRITER, PAGE, PAGE, NOW)
    assert not pages.may_be_stale(READER, PAGE, PAGE, NOW)
    pages.note_read(WRITER, 2 * PAGE, PAGE, NOW)
    assert pages.may_be_stale(WRITER, PAGE, PAGE, NOW), "the other's reads count although they are not the last"


def test_unknown_threads_count_as_others() -> None:
    pages = PageCache()
    pages.note_read(0, 0, PAGE, NOW)
    assert pages.may_be_stale(0, 0, PAGE, NOW)


def test_old_reads_do_not_count() -> None:
    pages = PageCache()
    pages.note_read(READER, 0, PAGE, NOW)
    assert not pages.may_be_stale(WRITER, 0, PAGE, NOW + 10 * SECOND)
    pages.note_read(READER, 8 * PAGE, PAGE, NOW + 10 * SECOND)
    assert not pages.may_be_stale(WRITER, 4 * PAGE, PAGE, NOW + 10 * SECOND)


def test_reads_and_writes_reset_is_clean() -> None:
    pages = PageCache()
    pages.is_clean = True
    pages.note_read(READER, 0, PAGE, NOW)
    assert not pages.is_clean
    pages.is_clean = True
    pages.may_be_stale(WRITER, 0, PAGE, NOW)
    assert not pages.is_clean


@pytest.mark.parametrize("writeback", [False, True])
def test_may_be_dirty(tmp_path: Path, writeback: bool) -> None:
    handles = Handles(Journal(), 1, Shares(1000), writeback=writeback)

    def opened(flags: int) -> int:
        return handles.add(Handle(os.open(tmp_path, os.O_RDONLY), 5, 0, flags))

    numbers = [opened(os.O_RDONLY)]
    assert not handles.may_be_dirty(5)
    numbers.append(opened(os.O_WRONLY))
    assert handles.may_be_dirty(5) is writeback
    numbers.append(opened(os.O_RDWR))
    assert handles.may_be_dirty(5)
    numbers.append(opened(os.O_RDONLY))
    assert len({id(handles.get(number).pages) for number in numbers}) == 1, "an inode has one page cache"
    handles.get(numbers[1]).backing = handles.get(numbers[2]).backing = 7
    assert not handles.may_be_dirty(5), "the kernel does its I/O on the source"
    for number in numbers:
        os.close(handles.remove(number).descriptor)
    assert not handles.may_be_dirty(5)
    assert not handles.written
