"""Sending log records between processes, also when senders die or the reader is slow."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import pytest

from llloop.linux.process import fork
from llloop.logging.transport import LogTransport


@pytest.fixture
def records() -> Iterator[LogTransport]:
    own = LogTransport()
    yield own
    own.close_writer()
    own.close()


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("llloop.tests", logging.WARNING, __file__, 1, text, None, None)


def test_get_returns_the_record_that_was_sent(records: LogTransport) -> None:
    sent = record("caf\udce9")
    sent.once = "name"
    sent.exc_text = "Traceback"
    records.put_nowait(sent)
    assert records.qsize() == 1
    got = records.get(1)
    for name in ("msg", "levelno", "name", "process", "processName", "created", "once", "exc_text"):
        assert getattr(got, name) == getattr(sent, name), name
    assert records.qsize() == 0


def test_sent_records_can_be_read_after_end(records: LogTransport) -> None:
    records.put_nowait(record("the last"))
    records.end()
    assert records.get(1).getMessage() == "the last"
    with pytest.raises(EOFError):
        records.get(1)
    with pytest.raises(OSError):
        records.put_nowait(record("too late"))


def test_long_record_is_truncated_at_its_end(records: LogTransport) -> None:
    records.put_nowait(record("beginning" + "x" * 1_000_000))
    assert records.get(1).getMessage().startswith("beginningxxx")


def test_send_times_out_when_nobody_reads(records: LogTransport) -> None:
    start = time.monotonic()
    with pytest.raises(OSError, match="timed out"):
        for _ in range(100_000):
            records.put_nowait(record("flood"))
    assert time.monotonic() - start < 30


def test_killing_a_sender_does_not_block_others(records: LogTransport) -> None:
    def flood() -> None:
        while True:
            with contextlib.suppress(OSError):
                records.put_nowait(record("flood"))

    for _ in range(5):
        process = fork(flood, "flood")
        for _ in range(20):
            assert records.get(10).getMessage() == "flood"
        assert process.end(10)
    while records.qsize():
        assert records.get(1).getMessage() == "flood"
    records.put_nowait(record("still there"))
    assert records.get(1).getMessage() == "still there"
