"""Destination and format of log messages, and the limit on repeated messages."""

from __future__ import annotations

import datetime
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from llloop.linux.process import fork
from llloop.logging import setup as log
from tests.as_user import Child
from tests.server_processes import wait_until
from tests.unit.support import open_descriptors

LOGGER = logging.getLogger("llloop.tests")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    yield
    log.stop_collecting()
    log.unconfigure()


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_line_contains_time_level_process_and_message(tmp_path: Path) -> None:
    log.configure("info", tmp_path / "log")
    LOGGER.info("hello %s", "world")
    LOGGER.debug("not this")
    (line,) = lines(tmp_path / "log")
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"
    assert re.fullmatch(rf"{time} INFO \S+: hello world", line)


def test_time_is_local_with_utc_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "IST-05:30")
    time.tzset()
    try:
        log.configure("info", tmp_path / "log")
        LOGGER.info("hello")
        (line,) = lines(tmp_path / "log")
        assert datetime.datetime.fromisoformat(line.split(" ")[0]).utcoffset() == datetime.timedelta(hours=5.5)
    finally:
        monkeypatch.undo()
        time.tzset()


FORGED = "a\n2026-01-01T00:00:00.000+00:00 ERROR llloop-front: forged\x1b[2J\r\x85\u202e"


def test_unprintable_characters_in_names_are_escaped(tmp_path: Path) -> None:
    log.configure("info", tmp_path / "log")
    LOGGER.info("file %s", FORGED)
    LOGGER.info("file %s", Path(FORGED))
    LOGGER.info(f"file {FORGED}")
    try:
        raise ValueError(FORGED)
    except ValueError:
        LOGGER.exception("failed")
    text = (tmp_path / "log").read_text()
    assert all(one.isprintable() or one == "\n" for one in text)
    records = [line for line in text.split("\n") if line and not line.startswith(" ")]
    assert [re.sub(r"^\S+ ([A-Z]+) \S+ ", r"\1 ", line).split(" ")[0] for line in records] == ["INFO"] * 3 + ["ERROR"]
    assert records[0].endswith(r"forged\x1b[2J\r\x85\u202e")


@needs_root
def test_log_file_of_another_user_is_refused(tmp_path: Path) -> None:
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    shared.mkdir()
    shared.chmod(0o1777)
    victim.touch()
    (shared / "log").symlink_to(victim)
    os.lchown(shared / "log", 4001, 4001)
    with pytest.raises(OSError, match="symbolic link"):
        log.configure("info", shared / "log")
    log.configure("info", shared / "own")
    LOGGER.info("one")
    (shared / "own").rename(shared / "own.1")
    os.mkfifo(shared / "own")
    os.chown(shared / "own", 4001, 4001)
    log.reopen()
    LOGGER.info("two")
    found = lines(shared / "own.1")
    assert "cannot be opened again" in found[1]
    assert found[2].endswith("two")
    assert victim.read_text() == ""


def test_undecodable_names_are_escaped(tmp_path: Path) -> None:
    log.configure("info", tmp_path / "log")
    LOGGER.info("file %s", os.fsdecode(b"caf\xe9"))
    assert lines(tmp_path / "log")[0].endswith(r"file caf\udce9")


def test_set_level_applies_to_running_children(tmp_path: Path) -> None:
    log.configure("error", tmp_path / "log")
    reader, writer = os.pipe()

    def work() -> None:
        LOGGER.info("before")
        os.read(reader, 1)
        LOGGER.info("after")

    child = Child(work)
    assert log.set_level("info")
    os.write(writer, b"!")
    child.result()
    os.close(reader)
    os.close(writer)
    assert lines(tmp_path / "log")[-1].endswith("after")


def test_unconfigure_restores_what_the_program_had(tmp_path: Path) -> None:
    root, llfuse = logging.getLogger(), logging.getLogger("llfuse")
    before = root.handlers[:], root.level, llfuse.filters[:], open_descriptors()
    log.configure("info", tmp_path / "log")
    log.unconfigure()
    assert (root.handlers, root.level, llfuse.filters, open_descriptors()) == before
    log.unconfigure()


def test_set_level_returns_false_without_configure() -> None:
    assert not log.set_level("debug")


def test_on_demand_records_ignore_the_level(tmp_path: Path) -> None:
    log.configure("error", tmp_path / "log")
    LOGGER.info("stacks", extra={"on_demand": True})
    assert len(lines(tmp_path / "log")) == 1


def test_reopen_writes_to_a_new_file(tmp_path: Path) -> None:
    file, old = tmp_path / "log", tmp_path / "log.1"
    log.configure("info", file)
    LOGGER.info("one")
    file.rename(old)
    LOGGER.info("two")
    log.reopen()
    LOGGER.info("three")
    assert [line.rpartition(" ")[2] for line in lines(old)] == ["one", "two"]
    assert [line.rpartition(" ")[2] for line in lines(file)] == ["three"]


def test_failed_reopen_keeps_the_old_file(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    log.configure("info", directory / "log")
    directory.rename(tmp_path / "elsewhere")
    log.reopen()
    LOGGER.info("hello")
    found = lines(tmp_path / "elsewhere" / "log")
    assert "cannot be opened again" in found[0]
    assert found[1].endswith("hello")


def test_repeated_messages_are_limited_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    log.configure("info", tmp_path / "log")

    def flood(count: int) -> None:
        for number in range(count):
            LOGGER.warning("request %d failed", number)

    flood(500)
    LOGGER.warning("something else")
    found = lines(tmp_path / "log")
    assert len(found) == 21
    assert found[19].endswith("request 19 failed (more like this are left out for up to 60 seconds)")
    assert found[20].endswith("something else")
    clock[0] += 61
    flood(1)
    assert lines(tmp_path / "log")[21].endswith("request 0 failed (480 more like this were left out before)")


def test_limit_applies_to_all_processes_together(tmp_path: Path) -> None:
    log.configure("info", tmp_path / "log")
    log.start_collecting()

    def flood() -> None:
        for _ in range(30):
            LOGGER.warning("again")

    for _ in range(3):
        fork(flood, "flood").wait()
    LOGGER.warning("the end")
    assert wait_until(lambda: "the end" in (tmp_path / "log").read_text())
    found = lines(tmp_path / "log")
    log.stop_collecting()
    assert 20 <= len(found) - 1 <= 3 * 20


def test_once_records_are_logged_only_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    log.configure("info", tmp_path / "log")

    def died(name: str, how: str) -> None:
        LOGGER.warning("%s was %s", name, how, extra={"once": name})

    for _ in range(100):
        died("front", "killed")
        clock[0] += 5
    died("worker", "killed")
    died("front", "ended by itself")
    died("front", "ended by itself")
    clock[0] += 61
    died("front", "ended by itself")
    assert [line.partition(": ")[2] for line in lines(tmp_path / "log")] == [
        "front was killed",
        "worker was killed",
        "front was ended by itself",
        "front was ended by itself",
    ]


def test_once_records_with_another_traceback_are_logged(tmp_path: Path) -> None:
    log.configure("info", tmp_path / "log")

    def fail(error: Exception) -> None:
        try:
            raise error
        except Exception:
            LOGGER.exception("it ends", extra={"once": "front"})

    log.start_collecting()
    for error in (KeyError("a"), KeyError("a"), ValueError("b"), ValueError("b")):
        # A process of `fork` sends its records before it ends.
        fork(partial(fail, error), "front").wait()
    assert wait_until(lambda: "ValueError" in (tmp_path / "log").read_text())
    log.stop_collecting()
    assert len([line for line in lines(tmp_path / "log") if line.endswith("it ends")]) == 2


@pytest.mark.parametrize("is_journal", [True, False])
def test_journal_lines_begin_with_a_priority(is_journal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "stderr").open("w") as stderr:
        kind = os.fstat(stderr.fileno())
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("JOURNAL_STREAM", f"{kind.st_dev}:{kind.st_ino}" if is_journal else "8:1")
        log.configure("debug", None)
        for level in ("debug", "info", "warning", "error", "critical"):
            getattr(LOGGER, level)("a %s\nof two lines", level)
    found = lines(tmp_path / "stderr")
    if not is_journal:
        assert not any(line.startswith("<") for line in found)
        return
    assert [line[:3] for line in found] == [f"<{priority}>" for priority in (7, 7, 6, 6, 4, 4, 3, 3, 3, 3)]
    assert re.fullmatch(r"<7>\S+: a debug", found[0])
    assert found[1] == "<7>  of two lines"


def test_log_file_lines_have_no_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{kind.st_dev}:{kind.st_ino}")
    log.configure("info", tmp_path / "log")
    LOGGER.info("hello")
    assert lines(tmp_path / "log")[0].startswith("2")
