"""Logging of all processes of a mount. The supervisor collects the records through multiprocessing-logging.

Each record is one line: time, level, role of the process, message. Untrusted text such as file names is escaped, and
continuation lines are indented, so that no part of a message looks like another record. If standard error is the
systemd journal (systemd sets JOURNAL_STREAM), lines have no time, and begin with a priority (sd-daemon(3)).
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
from typing import Any

import multiprocessing_logging

from llloop.linux import trusted_files
from llloop.logging.escape import printable, printable_lines
from llloop.logging.transport import LogTransport

LEVELS = ("debug", "info", "warning", "error")

# libfuse's message for a reply to a request that the kernel aborted because the mount was unmounted.
_ABORTED_REPLY = f"fuse_reply_* failed with {os.strerror(errno.ENOENT)}"

_FORMAT = "%(asctime)s %(levelname)s %(processName)s: %(message)s"
_JOURNAL_FORMAT = "%(processName)s: %(message)s"

# Messages of one kind come from one line of the program and one process. So many of them are logged in each window of
# so many seconds.
_MAX_MESSAGES = 20
_WINDOW = 60.0

# The line numbers in a printed traceback.
_TRACEBACK_LINE = re.compile(r'^  File ".*", line (\d+), in ', re.MULTILINE)

_log = logging.getLogger(__name__)


class _Threshold:
    """The minimum level of records that are logged, in shared memory, so that a change applies to all processes."""

    def __init__(self, level: int) -> None:
        self._cell = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self.set(level)

    def set(self, level: int) -> None:
        self._cell[0] = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._cell[0] or getattr(record, "on_demand", False)


class _Kind:
    """The counters of one kind of message."""

    def __init__(self, now: float) -> None:
        self.window_start = now
        self.passed = 0
        self.suppressed = 0
        self.text = ""
        self.last = 0.0


class Limiter:
    """Logs at most `_MAX_MESSAGES` messages of one kind in a minute, and reports how many it left out.

    A record with the attribute ``once`` (``extra={"once": NAME}``) is for something that fails again and again. It is
    logged only if its text differs from the last one of its kind and name, or if the last one is a minute old.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[object, ...], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log *record*."""
        now = time.monotonic()
        once = getattr(record, "once", None)
        key = (record.processName, record.name, record.pathname, record.lineno, once, _lines(record))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(now)
        if once is not None:
            text = record.getMessage() + (record.exc_text or "")
            is_new = text != kind.text or now - kind.last > _WINDOW
            kind.text, kind.last = text, now
            return is_new
        if now - kind.window_start > _WINDOW:
            suppressed = kind.suppressed
            kind.window_start, kind.passed, kind.suppressed = now, 0, 0
            if suppressed:
                _append(record, f" ({suppressed} more like this were left out before)")
        kind.passed += 1
        if kind.passed > _MAX_MESSAGES:
            kind.suppressed += 1
            return False
        if kind.passed == _MAX_MESSAGES:
            _append(record, f" (more like this are left out for up to {_WINDOW:g} seconds)")
        return True


def _lines(record: logging.LogRecord) -> tuple[int, ...]:
    """Return the line numbers of the record's traceback.

    One line of the program logs all unexpected exceptions, so their kinds differ by the traceback only.
    """
    if record.exc_info and record.exc_info[2] is not None:
        return tuple(frame.lineno or 0 for frame in traceback.extract_tb(record.exc_info[2]))
    return tuple(map(int, _TRACEBACK_LINE.findall(record.exc_text or "")))


def _append(record: logging.LogRecord, text: str) -> None:
    message = record.getMessage()
    if not message.endswith(text):  # the sending process may have appended the same text
        record.msg, record.args = message + text, None


class Lines(str):
    """A log message argument whose line breaks are kept."""


class _EscapingFilter:
    """Escapes the arguments of messages, in the process that logs them."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_escaped(one) for one in record.args)
        return True


def _escaped(argument: object) -> object:
    if isinstance(argument, (int, float)):
        return argument
    return printable_lines(argument) if isinstance(argument, Lines) else printable(argument)


class _Formatter(logging.Formatter):
    """Formats records with an ISO 8601 time with its UTC offset."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record)).replace("\n", "\n  ")


class _JournalFormatter(_Formatter):
    """Formats records for the systemd journal: each line begins with its syslog priority (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        if record.levelno < logging.INFO:
            priority = 7
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


class _Destination(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes all records to the log file, or to standard error."""

    def __init__(self, file: Path | None) -> None:
        super().__init__(sys.stderr if file is None else self._opened(file))
        self._file = file
        self._limiter = Limiter()
        self.addFilter(self._limiter)

    @staticmethod
    def _opened(file: Path):  # type: ignore[no-untyped-def]
        # Safe for root in a directory where other users can create files; never blocks on a named pipe.
        fd = trusted_files.open_file(str(file), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        return open(fd, "a", encoding="utf-8", errors="backslashreplace")

    def emit(self, record: logging.LogRecord) -> None:
        # Records of other processes bypass the filters here. The sender has filtered them, but a process that is
        # restarted again and again has a new limiter each time.
        if record.process == os.getpid() or self._limiter.filter(record):
            with self.lock or nullcontext():  # the collecting thread calls emit() directly
                super().emit(record)

    def reopen(self) -> None:
        """Open the log file again by its name.

        Raises:
            OSError: it cannot be opened; the old file stays in use.
        """
        if self._file is not None:
            old = self.setStream(self._opened(self._file))
            if old is not None:
                old.close()

    def close(self) -> None:
        """Close the log file; called by logging.shutdown()."""
        super().close()
        if self._file is not None:
            self.stream.close()


_threshold: _Threshold | None = None
_destination: _Destination | None = None
# What `configure` found: the handlers and the level of the root logger, and the filters of llfuse's.
_before: tuple[list[logging.Handler], int, list[Any]] | None = None


def configure(level: str, file: Path | None) -> None:
    """Log records of *level* and above to *file*, or to standard error.

    Args:
        level: one of `LEVELS`.
        file: the log file, to which records are appended; None for standard error.

    Raises:
        OSError: the file cannot be opened.
    """
    global _threshold, _destination, _before
    _destination = _Destination(file)
    journal = file is None and _is_journal()
    _destination.setFormatter(_JournalFormatter(_JOURNAL_FORMAT) if journal else _Formatter(_FORMAT))
    _threshold = _Threshold(_level_number(level))
    # The level comes first, so that the limiter does not count records below it.
    _destination.filters[:0] = [_threshold, _EscapingFilter()]
    root, llfuse = logging.getLogger(), logging.getLogger("llfuse")
    if _before is None:
        _before = root.handlers[:], root.level, llfuse.filters[:]
    root.handlers[:] = [_destination]
    # The threshold filters by level. No message is frequent enough that creating a discarded record matters.
    root.setLevel(logging.DEBUG)
    llfuse.addFilter(lambda record: not record.getMessage().endswith(_ABORTED_REPLY))


def unconfigure() -> None:
    """Undo `configure`: close the log file, and log as the program did before."""
    global _threshold, _destination, _before
    if _destination is None or _before is None:
        return
    handlers, level, filters = _before
    root = logging.getLogger()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("llfuse").filters[:] = filters
    _destination.close()
    _threshold = _destination = _before = None


def check(file: Path) -> None:
    """Check that *file* can be appended to or created; change nothing.

    Raises:
        OSError: it cannot.
    """
    trusted_files.check_appendable(str(file))


def _is_journal() -> bool:
    """Return whether standard error is connected to the systemd journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        kind = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{kind.st_dev}:{kind.st_ino}"


def _level_number(level: str) -> int:
    return int(logging.getLevelName(level.upper()))


def set_level(level: str) -> bool:
    """Change the minimum level of records in all processes.

    Args:
        level: one of `LEVELS`.

    Returns:
        False if `configure` was not called. Then the calling program has set up logging, and nothing changes.
    """
    if _threshold is None:
        return False
    _threshold.set(_level_number(level))
    return True


def reopen() -> None:
    """Open the log file again by its name, after logrotate(8) has renamed it."""
    if _destination is not None:
        try:
            _destination.reopen()
        except OSError as error:
            _log.warning("the log file cannot be opened again: %s; llloop goes on writing to the old one", error)


class _Multiprocessing:
    """Replaces the module `multiprocessing` in multiprocessing-logging, which uses its start method and its queue.

    The queue of `multiprocessing` needs /dev/shm, and a process that is killed while it holds a lock blocks all others.
    """

    @staticmethod
    def get_start_method() -> str:
        return "fork"

    @staticmethod
    def Queue(size: int) -> LogTransport:
        return LogTransport()


multiprocessing_logging.multiprocessing = _Multiprocessing

_collector_pid = 0  # id of the process that called `start_collecting`


def start_collecting() -> None:
    """Write the records of processes that are forked from now on in this process.

    Raises:
        OSError: the thread for this cannot be started.
    """
    global _collector_pid
    _collector_pid = os.getpid()
    # Check that a thread can be started. Otherwise multiprocessing-logging leaves a half-initialised handler behind,
    # which fails again when Python exits.
    try:
        threading.Thread(target=lambda: None).start()
    except RuntimeError as error:  # what Python raises if the system has no more threads
        raise OSError(errno.EAGAIN, str(error)) from None
    multiprocessing_logging.install_mp_handler()


def stop_collecting() -> None:
    """Undo `start_collecting`: write the records that other processes have sent, and log directly again."""
    handlers = logging.getLogger().handlers
    gathering = [one for one in handlers if isinstance(one, multiprocessing_logging.MultiProcessingHandler)]
    multiprocessing_logging.uninstall_mp_handler()
    if _collector_pid == os.getpid():  # a forked process does not have the threads
        for handler in gathering:
            handler.queue.end()
            handler._receive_thread.join()  # noqa: SLF001 - it has no other way to wait for the last record
            handler.queue.close_writer()
