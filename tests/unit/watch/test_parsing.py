"""What fanotify(7) reports becomes events, and what is of no interest is counted only."""

from __future__ import annotations

import struct

import pytest

from llloop.linux import fanotify
from llloop.shared.watch_state import NUMBER_MASK, WatchState
from llloop.watch.events import Event, Operation
from llloop.watch.parsing import SLACK, Batch, FileSystem, Layout, layout_of, parse

FSID = 0x1122334455667788
DEVICE = 7
DIRECTORY, OTHER, FILE = 100, 200, 300
SMALL = FileSystem(DEVICE, Layout.FIRST_32)


def handle(number: int, layout: Layout) -> bytes:
    if layout is Layout.FIRST_32:
        return struct.pack("=II", number, 9)
    return struct.pack("=QI", number, 9) if layout is Layout.FIRST_64 else struct.pack("=IQ", 9, number)


def record(
    kind: int, number: int, name: bytes | None = None, layout: Layout = Layout.FIRST_32, fsid: int = FSID
) -> bytes:
    """struct fanotify_event_info_fid, padded to a multiple of four bytes as the kernel pads it."""
    content = handle(number, layout)
    body = struct.pack("=QIi", fsid, len(content), 1) + content + (b"" if name is None else name + b"\0")
    length = (4 + len(body) + 3) // 4 * 4
    return struct.pack("=BxH", kind, length) + body.ljust(length - 4, b"\0")


def event(mask: int, *records: bytes, pid: int = 5) -> bytes:
    body = b"".join(records)
    return struct.pack("=IBBHQii", 24 + len(body), 3, 0, 24, mask, -1, pid) + body


def parsed(*events: bytes, known: tuple[int, ...] = (DIRECTORY,), file_system: FileSystem = SMALL) -> Batch:
    state = WatchState()
    for number in known:
        state.count_known(number)
    data = b"".join(events)
    return parse(bytearray(data + bytes(SLACK)), len(data), {FSID: file_system}, state.known)


@pytest.mark.parametrize("layout", Layout)
def test_name_and_object_are_found_in_each_layout(layout: Layout) -> None:
    data = event(
        fanotify.FAN_CREATE,
        record(fanotify.INFO_DFID_NAME, DIRECTORY, b"name \xff", layout),
        record(fanotify.INFO_FID, FILE, layout=layout),
    )
    assert parsed(data, file_system=FileSystem(DEVICE, layout)) == Batch(
        [Event(Operation.CREATE, False, DEVICE, DIRECTORY, b"name \xff", 0, b"", FILE, 5)], 0, False
    )


def test_merged_operations_become_events_in_order() -> None:
    mask = fanotify.FAN_CLOSE_WRITE | fanotify.FAN_MODIFY | fanotify.FAN_CREATE | fanotify.FAN_ATTRIB
    data = event(mask, record(fanotify.INFO_DFID_NAME, DIRECTORY, b"a"), record(fanotify.INFO_FID, FILE))
    assert [one.operation for one in parsed(data).events] == [
        Operation.CREATE,
        Operation.MODIFY,
        Operation.ATTRIB,
        Operation.CLOSE_WRITE,
    ]


@pytest.mark.parametrize("known", [DIRECTORY, OTHER, FILE])
def test_rename_has_both_places(known: int) -> None:
    data = event(
        fanotify.FAN_RENAME | fanotify.FAN_ONDIR,
        record(fanotify.INFO_OLD_DFID_NAME, DIRECTORY, b"old"),
        record(fanotify.INFO_NEW_DFID_NAME, OTHER, b"a longer new name"),
        record(fanotify.INFO_FID, FILE),
    )
    assert parsed(data, known=(known,)).events == [
        Event(Operation.MOVED, True, DEVICE, DIRECTORY, b"old", OTHER, b"a longer new name", FILE, 5)
    ]
    assert parsed(data, known=()).events == []


def test_event_of_a_directory_itself_has_no_name() -> None:
    data = event(fanotify.FAN_ATTRIB | fanotify.FAN_ONDIR, record(fanotify.INFO_DFID_NAME, DIRECTORY, b"."))
    assert parsed(data).events == [Event(Operation.ATTRIB, True, DEVICE, 0, b"", 0, b"", DIRECTORY, 5)]


def test_event_without_a_directory_is_of_its_object() -> None:
    data = event(fanotify.FAN_ATTRIB, record(fanotify.INFO_FID, FILE))
    assert parsed(data, known=(FILE,)).events == [Event(Operation.ATTRIB, False, DEVICE, 0, b"", 0, b"", FILE, 5)]


def test_known_file_in_an_unknown_directory_is_heard() -> None:
    data = event(fanotify.FAN_MODIFY, record(fanotify.INFO_DFID_NAME, OTHER, b"a"), record(fanotify.INFO_FID, FILE))
    assert [one.number for one in parsed(data, known=(FILE,)).events] == [FILE]


def test_what_the_kernel_does_not_know_is_ignored() -> None:
    unknown = event(fanotify.FAN_MODIFY, record(fanotify.INFO_DFID_NAME, OTHER, b"a"), record(fanotify.INFO_FID, FILE))
    foreign = event(fanotify.FAN_MODIFY, record(fanotify.INFO_DFID_NAME, DIRECTORY, b"a", fsid=1))
    known = event(fanotify.FAN_DELETE, record(fanotify.INFO_DFID_NAME, DIRECTORY, b"a"))
    batch = parsed(unknown, foreign, known, unknown)
    assert (len(batch.events), batch.ignored) == (1, 3)


def test_events_of_several_file_systems_come_mixed() -> None:
    other_fsid, large = FSID + 1, FileSystem(DEVICE + 1, Layout.AFTER_GENERATION)

    def both(number: int) -> bytes:
        return event(fanotify.FAN_DELETE, record(fanotify.INFO_DFID_NAME, number, b"a")) + event(
            fanotify.FAN_DELETE,
            record(fanotify.INFO_DFID_NAME, number, b"b", large.layout, other_fsid),
            record(fanotify.INFO_FID, FILE, layout=large.layout, fsid=other_fsid),
        )

    state = WatchState()
    state.count_known(DIRECTORY)
    data = both(DIRECTORY) + both(OTHER) + both(DIRECTORY)
    batch = parse(bytearray(data + bytes(SLACK)), len(data), {FSID: SMALL, other_fsid: large}, state.known)
    assert [(one.device, one.name) for one in batch.events] == [(DEVICE, b"a"), (DEVICE + 1, b"b")] * 2
    assert batch.ignored == 2


@pytest.mark.parametrize("layout", [Layout.FIRST_64, Layout.AFTER_GENERATION])
def test_numbers_of_more_than_32_bits_are_told_apart(layout: Layout) -> None:
    file_system = FileSystem(DEVICE, layout)
    large = DIRECTORY + (1 << 40)
    data = event(fanotify.FAN_DELETE, record(fanotify.INFO_DFID_NAME, large, b"a", layout))
    assert [one.directory for one in parsed(data, known=(large,), file_system=file_system).events] == [large]


def test_overflow_is_noticed() -> None:
    known = event(fanotify.FAN_DELETE, record(fanotify.INFO_DFID_NAME, DIRECTORY, b"a"))
    batch = parsed(known, event(fanotify.FAN_Q_OVERFLOW), known)
    assert (batch.overflow, len(batch.events)) == (True, 2)
    assert not parsed(known).overflow


def test_only_a_layout_that_gives_the_number_is_taken() -> None:
    assert layout_of(0x01, struct.pack("=II", 300, 9), 300) is Layout.FIRST_32
    assert layout_of(0x01, struct.pack("=IQ", 9, 1 << 40), 1 << 40) is Layout.AFTER_GENERATION
    assert layout_of(0x81, struct.pack("=QI", 1 << 40, 9), 1 << 40) is Layout.FIRST_64
    assert layout_of(0x01, struct.pack("=II", 300, 9), 301) is None
    assert layout_of(0xF8, bytes(40), 0) is None


def test_counter_of_known_inodes_is_never_too_low() -> None:
    state = WatchState()
    colliding = FILE + NUMBER_MASK + 1
    state.count_known(FILE)
    state.count_known(colliding)
    state.count_forgotten(colliding)
    assert state.known[FILE]
    for _ in range(300):
        state.count_known(FILE)
    for _ in range(300):
        state.count_forgotten(FILE)
    assert state.known[FILE], "it has lost count, so it must stay"
