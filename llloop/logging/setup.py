"""Logging of all processes of a mount, gathered by the supervisor through multiprocessing-logging.

One line per event: time, level, the process's role, message. What others chose, such as names of files, is escaped,
and the lines that follow the first of a record are indented, so that nothing in a message looks like a record. Where
standard error is the journal (systemd sets JOURNAL_STREAM), the journal knows the time, and the level is told in its
own way (sd-daemon(3)).
"""

from __future__ import annotations

import datetime
import errno
import logging
import mmap
import os
import re
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

import multiprocessing_logging

from llloop.linux import trusted_files
from llloop.logging.escape import printable, printable_lines
from llloop.logging.transport import LogTransport

LEVELS = ("debug", "info", "warning", "error")

# Of an answer that the kernel no longer waits for, since the mount was ended while its request was in hand.
_TOO_LATE = f"fuse_reply_* failed with {os.strerror(errno.ENOENT)}"

_FORMAT = "%(asctime)s %(levelname)s %(processName)s: %(message)s"
_JOURNAL_FORMAT = "%(processName)s: %(message)s"

# Of messages of one kind, that is from one place in the program and one process, so many pass in such a time (seconds).
_MOST = 20
_WINDOW = 60.0

# The lines in a traceback as it is printed.
_TRACED = re.compile(r'^  File ".*", line (\d+), in ', re.MULTILINE)

_log = logging.getLogger(__name__)


class _Threshold:
    """The least severe level that is logged, in memory that all processes share, so that it can be changed in all."""

    def __init__(self, level: int) -> None:
        self._cell = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self.set(level)

    def set(self, level: int) -> None:
        self._cell[0] = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._cell[0] or getattr(record, "asked_for", False)


class _Kind:
    """What is known of one kind of message."""

    def __init__(self, now: float) -> None:
        self.begun = now
        self.passed = 0
        self.left_out = 0
        self.text = ""
        self.last = 0.0


class Limiter:
    """Keeps the log readable: of one kind of message only so many in a minute, and then how many there were.

    A record with the attribute ``once`` (``extra={"once": NAME}``) passes only if it says something else than the
    last of its kind and name, or if there has been none for a minute: for what fails again and again.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[object, ...], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether *record* is to be logged."""
        now = time.monotonic()
        once = getattr(record, "once", None)
        key = (record.processName, record.name, record.pathname, record.lineno, once, _lines(record))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(now)
        if once is not None:
            text = record.getMessage() + (record.exc_text or "")
            news = text != kind.text or now - kind.last > _WINDOW
            kind.text, kind.last = text, now
            return news
        if now - kind.begun > _WINDOW:
            left_out = kind.left_out
            kind.begun, kind.passed, kind.left_out = now, 0, 0
            if left_out:
                _append(record, f" ({left_out} more like this were left out before)")
        kind.passed += 1
        if kind.passed > _MOST:
            kind.left_out += 1
            return False
        if kind.passed == _MOST:
            _append(record, f" (more like this are left out for up to {_WINDOW:g} seconds)")
        return True


def _lines(record: logging.LogRecord) -> tuple[int, ...]:
    """Return the lines that an exception came through, for all that is unexpected is logged in the same place."""
    if record.exc_info and record.exc_info[2] is not None:
        return tuple(frame.lineno or 0 for frame in traceback.extract_tb(record.exc_info[2]))
    return tuple(map(int, _TRACED.findall(record.exc_text or "")))


def _append(record: logging.LogRecord, text: str) -> None:
    message = record.getMessage()
    if not message.endswith(text):  # the process that it comes from may have said so
        record.msg, record.args = message + text, None


class Lines(str):
    """An argument of a log message that has several lines, and keeps its line breaks."""


class _Escaping:
    """Makes the arguments of messages safe to print, in the process that logs them."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_escaped(one) for one in record.args)
        return True


def _escaped(argument: object) -> object:
    if isinstance(argument, (int, float)):
        return argument
    return printable_lines(argument) if isinstance(argument, Lines) else printable(argument)


class _Formatter(logging.Formatter):
    """Records as lines with a time as ISO 8601 has it, with the offset from UTC."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record)).replace("\n", "\n  ")


class _Journal(_Formatter):
    """Lines as sd-daemon(3) wants them: each begins with its syslog priority."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        if record.levelno < logging.INFO:
            priority = 7
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


class _Destination(logging.StreamHandler):  # type: ignore[type-arg]
    """Where all records end: the log file, or standard error."""

    def __init__(self, file: Path | None) -> None:
        super().__init__(sys.stderr if file is None else self._opened(file))
        self._file = file
        self._limiter = Limiter()
        self.addFilter(self._limiter)

    @staticmethod
    def _opened(file: Path):  # type: ignore[no-untyped-def]
        # As root too, whatever other users may have put there; and it is not to hang where a named pipe is.
        fd = trusted_files.open_file(str(file), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        return open(fd, "a", encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        # Records of other processes come here past the filters. Theirs have let pass what they may each, but a
        # process that dies again and again begins afresh each time.
        if record.process == os.getpid() or self._limiter.filter(record):
            with self.lock or nullcontext():  # they come from the thread that gathers them
                super().emit(record)

    def reopen(self) -> None:
        """Open the file again by its name.

        Raises:
            OSError: it cannot be opened; the one that is open stays in use.
        """
        if self._file is not None:
            old = self.setStream(self._opened(self._file))
            if old is not None:
                old.close()


_threshold: _Threshold | None = None
_destination: _Destination | None = None


def configure(level: str, file: Path | None) -> None:
    """Send records of *level* and above to *file*, or to standard error.

    Args:
        level: one of `LEVELS`.
        file: appended to.

    Raises:
        OSError: the file cannot be opened.
    """
    global _threshold, _destination
    _destination = _Destination(file)
    journal = file is None and _is_journal()
    _destination.setFormatter(_Journal(_JOURNAL_FORMAT) if journal else _Formatter(_FORMAT))
    _threshold = _Threshold(_number(level))
    # First of the filters: what is not logged is not to be counted either.
    _destination.filters[:0] = [_threshold, _Escaping()]
    root = logging.getLogger()
    root.handlers[:] = [_destination]
    # The threshold decides; no message is so frequent that making it for nothing would cost anything.
    root.setLevel(logging.DEBUG)
    logging.getLogger("llfuse").addFilter(lambda record: not record.getMessage().endswith(_TOO_LATE))


def check(file: Path) -> None:
    """Check that *file* can be appended to, or made; change nothing.

    Raises:
        OSError: not so.
    """
    trusted_files.check_appendable(str(file))


def _is_journal() -> bool:
    """Whether standard error is connected to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        kind = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{kind.st_dev}:{kind.st_ino}"


def _number(level: str) -> int:
    return int(logging.getLevelName(level.upper()))


def set_level(level: str) -> bool:
    """Log records of *level* and above from now on, in all processes.

    Args:
        level: one of `LEVELS`.

    Returns:
        False if logging was not set up by `configure`: it is then the program's own, and left alone.
    """
    if _threshold is None:
        return False
    _threshold.set(_number(level))
    return True


def reopen() -> None:
    """Open the log file again, which may have been renamed meanwhile."""
    if _destination is not None:
        try:
            _destination.reopen()
        except OSError as error:
            _log.warning("the log file cannot be opened again, the old one stays in use: %s", error)


class _Multiprocessing:
    """What multiprocessing-logging takes from `multiprocessing`: the start method that is used here, and a queue.

    multiprocessing's own queue needs /dev/shm, and has locks that die with their holders.
    """

    @staticmethod
    def get_start_method() -> str:
        return "fork"

    @staticmethod
    def Queue(size: int) -> LogTransport:
        return LogTransport()


multiprocessing_logging.multiprocessing = _Multiprocessing

_gatherer = 0  # the process that `gather` was called in


def gather() -> None:
    """Have the records of processes forked from now on written by this one.

    Raises:
        RuntimeError: the thread that does this cannot be started.
    """
    global _gatherer
    _gatherer = os.getpid()
    # One that could not be started would leave a half-made handler behind, which fails again when Python ends.
    threading.Thread(target=lambda: None).start()
    multiprocessing_logging.install_mp_handler()


def release() -> None:
    """Undo `gather`: write what has been sent and log directly again."""
    handlers = logging.getLogger().handlers
    gathering = [one for one in handlers if isinstance(one, multiprocessing_logging.MultiProcessingHandler)]
    multiprocessing_logging.uninstall_mp_handler()
    if _gatherer == os.getpid():  # no fork of it has the threads
        for handler in gathering:
            handler.queue.end()
            handler._receive_thread.join()
            handler.queue.forget()
