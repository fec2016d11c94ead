"""The watcher process, which hears of changes in the source and makes the kernel drop what it has cached of them.

The watcher only reads events and writes notifications to /dev/fuse. It opens no file in the mount and changes nothing
in the source. If it dies, events are lost: the supervisor takes back what the watcher has published, so that the front
uses short timeouts, and the next watcher drops everything.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llloop.linux import fanotify, fuse, syscalls
from llloop.linux.credentials import drop_capabilities_except
from llloop.shared.leadership import Leadership, Postponed
from llloop.shared.table import Table
from llloop.shared.watch_state import Method, WatchState
from llloop.watch.coherence import Coherence
from llloop.watch.events import Event
from llloop.watch.file_systems import CannotHear, FileSystems, mounts_or_nothing
from llloop.watch.known import Known
from llloop.watch.own_processes import OwnProcesses
from llloop.watch.parsing import SLACK, parse

_log = logging.getLogger(__name__)

_BUFFER = 256 * 1024
_GROUP = fanotify.FAN_CLOEXEC | fanotify.FAN_NONBLOCK | fanotify.FAN_REPORT_DFID_NAME_TARGET
_CAPABILITIES = 1 << syscalls.CAP_SYS_ADMIN | 1 << syscalls.CAP_DAC_READ_SEARCH
# After a read that has brought so many bytes, wait for so many seconds: more events then come with one wake-up, and the
# kernel merges those of one file. The second number is for reads that have brought nothing of interest.
_MANY = 4096
_PAUSE, _IDLE_PAUSE = 0.002, 0.006
# How long to wait if all threads wait for requests that hang in the source, in seconds.
_STUCK_PAUSE = 0.05


class Relay(Protocol):
    """What passes events on to programs that watch the mount.

    Attributes:
        active: whether it does.
    """

    active: bool

    def tell(self, events: Sequence[Event]) -> None:
        """Pass events on, after the kernel has dropped what they have changed. Does not wait."""


class Silent:
    """Passes nothing on."""

    active = False

    def tell(self, events: Sequence[Event]) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class WatcherSetup:
    """What the watcher inherits from the supervisor.

    Attributes:
        source: the absolute path of the source.
        root: an O_PATH descriptor of the source.
        device: a descriptor of /dev/fuse.
        mount_device: st_dev of the mount, as (major, minor).
        minor: the minor version of the FUSE protocol.
        state: what front and watcher tell each other.
        table: the inode table.
        relay: makes the object that passes events on.
    """

    source: str
    root: int
    device: int
    mount_device: tuple[int, int]
    minor: int
    state: WatchState
    table: Table
    relay: Callable[[], Relay] = Silent


def run_watcher(setup: WatcherSetup) -> None:
    """Watch until the file system is unmounted."""
    drop_capabilities_except(_CAPABILITIES)
    leadership = Leadership()
    try:
        watcher = Watcher(setup, leadership)
    except CannotHear as reason:
        _log.warning(
            "the source %s cannot be heard: %s; changes there are seen after the timeouts", setup.source, reason
        )
        setup.state.publish(Method.TIMEOUTS, frozenset())
        while True:
            time.sleep(86400)
    try:
        watcher.begin()
        leadership.run(watcher.lead)
    except OSError as error:
        if error.errno != errno.ENODEV:  # unmounted
            raise


class Watcher:
    """Hears with fanotify.

    Args:
        setup: what the watcher inherits.
        leadership: decides which thread reads events while others wait for the kernel.

    Raises:
        CannotHear: this is not possible.
    """

    def __init__(self, setup: WatcherSetup, leadership: Leadership) -> None:
        self._state = setup.state
        self._leadership = leadership
        try:
            self._group = fanotify.fanotify_init(_GROUP)
        except OSError as error:
            raise CannotHear(_why_not(error)) from None
        self._file_systems = FileSystems(self._group, setup.source, setup.mount_device)
        self._file_systems.add_source()
        self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        known = Known(setup.state, setup.table)
        self._relay = setup.relay()
        self._coherence = Coherence(
            setup.device,
            known,
            setup.state,
            leadership.call,
            relays=self._relay.active,
            epochs=setup.minor >= fuse.EPOCH_SINCE,
        )
        self._own = OwnProcesses(os.getppid())
        self._buffer = bytearray(_BUFFER + SLACK)
        self._view = memoryview(self._buffer)[:_BUFFER]
        self._poll = select.poll()
        self._poll.register(self._group, select.POLLIN)
        self._poll.register(self._mounts, select.POLLPRI)

    def begin(self) -> None:
        """Tell the front that it may cache for long from now on, and drop what it has cached before."""
        mounts_or_nothing(self._file_systems)
        self._publish()
        self._drop_everything()

    def _publish(self) -> None:
        self._state.publish(Method.FANOTIFY, self._file_systems.devices(), len(self._file_systems.left_out))

    def lead(self, thread: int) -> bool:
        """Read events as the leader; return False if another thread has become the leader."""
        leadership = self._leadership
        while True:
            self._wait_and_serve()
            if leadership.stalled and not leadership.is_leader:
                leadership.become_follower()
                return False

    def _wait_and_serve(self) -> None:
        due = self._coherence.next_repetition()
        timeout = None if due is None else max(0, int((due - time.monotonic()) * 1000) + 1)
        for fd, _ in self._leadership.wait(self._poll.poll, timeout):
            if fd == self._mounts:
                if mounts_or_nothing(self._file_systems):  # no event says that a name leads to another directory now
                    self._publish()
                    self._drop_everything()
            else:
                self._read()
        if due is not None:
            try:
                self._coherence.repeat(time.monotonic())
            except Postponed:
                self._drop_names()

    def _read(self) -> None:
        """Read what has happened, and act on it."""
        try:
            length = os.readv(self._group, [self._view])
        except BlockingIOError:
            return
        began = time.monotonic_ns()
        state = self._state
        state.clock[0] += 1
        syscalls.synchronise()
        events, ignored, overflow = parse(self._buffer, length, self._file_systems.heard, state.known)
        own = self._own
        own.refresh()
        foreign = [event for event in events if not own.include(event.pid)]
        notified = 0
        try:
            if foreign:
                self._coherence.note(foreign)
                overflow = not self._coherence.drop_again_later(foreign, began / 1e9) or overflow
            if overflow:
                _log.warning(
                    "too much happened in the source at once; the kernel drops everything that it has cached of it",
                    extra={"once": "overflow"},
                )
                self._drop_everything()
            if foreign:
                notified = self._coherence.drop(foreign)
        except Postponed:
            self._drop_names()
        state.count(heard=len(foreign), own=len(events) - len(foreign), ignored=ignored, notified=notified)
        if foreign:
            state.count_delay(time.monotonic_ns() - began, len(foreign))
            self._relay.tell(foreign)
        if length > _MANY:
            self._leadership.wait(time.sleep, _PAUSE if foreign else _IDLE_PAUSE)

    def _drop_everything(self) -> None:
        try:
            self._coherence.drop_everything()
        except Postponed:
            self._drop_names()

    def _drop_names(self) -> None:
        """Drop names only, until a thread has returned from a call that hangs; then drop everything."""
        self._coherence.drop_names()
        while True:
            while self._leadership.in_last_thread:
                self._leadership.wait(time.sleep, _STUCK_PAUSE)
            try:
                self._coherence.drop_everything()
                return
            except Postponed:
                pass


def _why_not(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "this needs root (CAP_SYS_ADMIN)"
    if error.errno in (errno.EINVAL, errno.ENOSYS):
        return "this needs Linux 5.17 with fanotify"
    return error.strerror or str(error)
