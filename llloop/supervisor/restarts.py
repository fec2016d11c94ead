"""Starting the processes of a mount, and starting each again after its end."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from functools import partial

from llloop.linux import syscalls
from llloop.linux.process import exit_in_words
from llloop.shared import notifications
from llloop.shared.watch_state import Method
from llloop.supervisor.child import LONGEST_PAUSE, Child
from llloop.supervisor.connection import Connection
from llloop.supervisor.event_loop import EventLoop
from llloop.supervisor.processes import Processes
from llloop.supervisor.shared_resources import SharedResources

_log = logging.getLogger(__name__)


class Restarts:
    """Starts the processes of one mount, and others when they end.

    Args:
        loop: the supervisor's event loop.
        processes: the processes.
        resources: the memory and pipes that they share.
        connection: the mount's connection with the kernel.
        ends_with_front: called after the end of a front with its exit code and a description of its end; returns
            whether the mount ends with it, so that no other front is started.
        on_started: called after processes were started again.
    """

    def __init__(
        self,
        loop: EventLoop,
        processes: Processes,
        resources: SharedResources,
        connection: Connection,
        ends_with_front: Callable[[int, str], bool],
        on_started: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._processes = processes
        self._slots = resources.slots
        self._watch = resources.watch
        self._connection = connection
        self._ends_with_front = ends_with_front
        self._on_started = on_started
        self._next = loop.deadline(self._start_due)

    def start_all(self) -> None:
        """Start all processes for the first time.

        Raises:
            OSError: there are no free processes or descriptors.
        """
        self._processes.descriptor_keeper.initial_descriptors = syscalls.open_descriptors()
        for child in self._processes.all:
            self._start(child)

    def _start(self, child: Child) -> None:
        process = child.start()
        self._loop.watch_process(process, partial(self._ended, child))

    def _ended(self, child: Child, code: int) -> None:
        how = exit_in_words(code)
        if child is self._processes.front:
            self._slots.clear_front()
            if self._ends_with_front(code, how):
                return
        if child in self._processes.watchers:
            self._drop_cached()
        on_purpose = child.ending_on_purpose
        pause = child.schedule_restart()
        # Logged once, and again only if the cause is another one or some time has passed.
        once = {"once": child.name}
        if pause < 1 and not on_purpose:
            _log.warning("%s %s; a new process takes over", child.name, how, extra=once)
        elif not on_purpose:
            text = "%s %s again and again; the supervisor now waits up to %g seconds before each restart"
            _log.error(text, child.name, how, LONGEST_PAUSE, extra=once)
        self._set_next()

    def _drop_cached(self) -> None:
        """Make the kernel drop what it has cached. Without a watcher, nobody hears of changes in the source."""
        assert self._watch is not None
        self._watch.publish(Method.STARTING, frozenset())
        notifications.expire_all_entries(self._connection.device)

    def _set_next(self) -> None:
        due = min((child.due for child in self._processes.all if child.process is None), default=None)
        if due is not None:
            self._next.set_in(due - time.monotonic())

    def _start_due(self) -> None:
        for child in self._processes.all:  # the keeper first: it starts the front
            if child.process is None and child.due <= time.monotonic():
                try:
                    self._start(child)
                except OSError as error:
                    pause = child.schedule_restart()
                    if isinstance(error, ProcessLookupError):  # the keeper has died and must be started first
                        continue
                    _log.error("%s could not be started: %s; next attempt in %g seconds", child.name, error, pause)
                    continue
                if child is self._processes.keeper:
                    self._share_descriptors_with_keeper()
        self._set_next()
        self._on_started()

    def _share_descriptors_with_keeper(self) -> None:
        """Make a new keeper fetch the front's descriptors, and replace the front by one that shares them with it."""
        front, keeper = self._processes.front, self._processes.descriptor_keeper
        if front.process is None or not keeper.can_share:
            return
        if self._connection.capabilities is None:  # with --loop llfuse, another front cannot take over
            return
        try:
            front.signal(signal.SIGSTOP)
            keeper.fetch(front.process.pid)
        except OSError as error:
            front.signal(signal.SIGCONT)
            if front.process.is_alive():  # otherwise it has ended, and the loop handles that next
                _log.warning(
                    "the keeper could not fetch the front's descriptors: %s; "
                    "if the front dies now, programs lose the deleted files that they have open",
                    error,
                )
        else:
            front.replace()
