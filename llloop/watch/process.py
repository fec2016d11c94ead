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
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from llloop.errors import HostError
from llloop.linux import fuse, syscalls
from llloop.linux.credentials import drop_capabilities_except
from llloop.linux.mount_identity import MountIdentity
from llloop.shared.leadership import Leadership, Postponed
from llloop.shared.table import Table
from llloop.shared.watch_state import Method, WatchState
from llloop.shared.watches import Watches
from llloop.watch.coherence import Coherence
from llloop.watch.events import Event
from llloop.watch.fanotify import FanotifyQueue
from llloop.watch.file_systems import CannotHear, FileSystems, mounts_or_nothing
from llloop.watch.inotify import InotifyQueue
from llloop.watch.known import Known
from llloop.watch.own_processes import OwnProcesses
from llloop.watch.parsing import Batch

_log = logging.getLogger(__name__)

_CAPABILITIES = 1 << syscalls.CAP_SYS_ADMIN | 1 << syscalls.CAP_DAC_READ_SEARCH
# After a read that has brought so many bytes, wait for so many seconds: more events then come with one wake-up, and the
# kernel merges those of one file. The second number is for reads that have brought nothing of interest.
_MANY = 4096
_PAUSE, _IDLE_PAUSE = 0.002, 0.006
# How long to wait if all threads wait for requests that hang in the source, in seconds.
_STUCK_PAUSE = 0.05


class Queue(Protocol):
    """Where events come from.

    Attributes:
        method: how they are heard.
        fd: the descriptor that becomes readable when there are events.
        file_systems: the file systems that are heard.
    """

    method: Method
    fd: int

    @property
    def file_systems(self) -> FileSystems: ...

    def read(self) -> int:
        """Read events; return how many bytes, 0 if there are none."""

    def batch(self) -> Batch:
        """Return the events that were read."""

    def forget(self) -> None:
        """Forget what earlier events have told, because events were lost."""


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
        mount: the mount.
        minor: the minor version of the FUSE protocol.
        state: what front and watcher tell each other.
        table: the inode table.
        watches: the inotify watches; None to hear with fanotify.
        relay: makes the object that passes events on.
    """

    source: str
    root: int
    device: int
    mount: MountIdentity
    minor: int
    state: WatchState
    table: Table
    watches: Watches | None = None
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
    """Hears, and makes the kernel drop what has changed.

    Args:
        setup: what the watcher inherits.
        leadership: decides which thread reads events while others wait for the kernel.

    Raises:
        CannotHear: this is not possible.
    """

    def __init__(self, setup: WatcherSetup, leadership: Leadership) -> None:
        self._state = setup.state
        self._leadership = leadership
        self._queue = _queue(setup)
        self._mount = setup.mount
        self._file_systems = self._queue.file_systems
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
        self._poll = select.poll()
        self._poll.register(self._queue.fd, select.POLLIN)
        self._poll.register(self._mounts, select.POLLPRI)

    def begin(self) -> None:
        """Tell the front that it may cache for long from now on, and drop what it has cached before."""
        mounts_or_nothing(self._file_systems)
        self._let_kernel_know_root()
        self._publish()
        self._drop_everything()

    def _let_kernel_know_root(self) -> None:
        """Make the kernel ask for the root's attributes before the first notification.

        A notification makes the kernel ignore attributes for which it is just asking. It then uses those that it has,
        and it starts with a root that nobody but root may use.
        """
        with suppress(OSError, HostError):  # unmounted meanwhile, or no list of mounts
            path = self._mount.current_path()
            if path is not None:
                os.stat(path)

    def _publish(self) -> None:
        self._state.publish(self._queue.method, self._file_systems.devices(), len(self._file_systems.left_out))

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
        length = self._queue.read()
        if not length:
            return
        began = time.monotonic_ns()
        state = self._state
        state.clock[0] += 1
        syscalls.synchronise()
        events, ignored, overflow = self._queue.batch()
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
        self._queue.forget()
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


def _queue(setup: WatcherSetup) -> Queue:
    if setup.watches is not None:
        return InotifyQueue(setup.watches, setup.table, setup.source, setup.mount.device)
    return FanotifyQueue(setup.state, setup.source, setup.mount.device)
