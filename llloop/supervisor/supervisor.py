"""The supervisor: it mounts, starts the processes that serve the mount, and replaces those that die.

It serves no request and only waits in its event loop. So a mount that hangs does not block it.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial

from llloop.config import ServeConfig
from llloop.errors import HostError, LlloopError
from llloop.front.llfuse.operations import Operations
from llloop.linux import fuse, limits, mounts, syscalls
from llloop.logging import setup as log
from llloop.shared import notifications
from llloop.shared.watch_state import Method
from llloop.supervisor import connection, control_server, mounting, start_checks
from llloop.supervisor.child import LONGEST_PAUSE, Child, show_title
from llloop.supervisor.control_commands import ControlCommands
from llloop.supervisor.cpu_latency import CpuLatency
from llloop.supervisor.event_loop import EventLoop
from llloop.supervisor.orphaned_mount import detach_dead_mount
from llloop.supervisor.process_state import ProcessState
from llloop.supervisor.processes import Processes
from llloop.supervisor.reload import Reload
from llloop.supervisor.reports import Reports
from llloop.supervisor.sd_notify import Notifier
from llloop.supervisor.shared_resources import SharedResources
from llloop.supervisor.signals import SIGNALS, Signals
from llloop.supervisor.source_check import SourceCheck
from llloop.supervisor.start_guard import StartGuard
from llloop.supervisor.tracing import Tracing
from llloop.supervisor.unmounting import Unmounting
from llloop.supervisor.watchdog import Watchdog

_log = logging.getLogger(__name__)


def serve(
    config: ServeConfig,
    on_ready: Callable[[Supervisor], None],
    *,
    lifelines: Sequence[int] = (),
    detached: bool = False,
    notifier: Notifier | None = None,
) -> int:
    """Mount, serve until unmounted or told to stop, and clean up.

    Args:
        config: the mount's options.
        on_ready: called when the mount answers requests.
        lifelines: descriptors to watch; the mount ends when one becomes readable.
        detached: whether all processes redirect their standard descriptors to /dev/null.
        notifier: notifies the service manager, if it has started this process.

    Returns:
        0 after a clean stop, 1 if the mount ended otherwise.

    Raises:
        LlloopError: mounting failed.
    """
    checked = start_checks.make_way(config)
    with ProcessState(SIGNALS):
        try:
            with ExitStack() as cleanup:
                return Supervisor(
                    config, checked, on_ready, lifelines, notifier or Notifier({}), detached=detached, cleanup=cleanup
                ).run()
        except (OSError, MemoryError) as error:
            raise HostError(f"mount point {checked.mountpoint}: serving failed: {_reason(error)}") from None


class Supervisor:
    """One mount. The constructor mounts and starts the processes. For the arguments see `serve`.

    Args:
        cleanup: gets the steps that end the mount, which run in reverse order, even if some of them fail. A program may
            serve several mounts one after the other, so nothing may remain.

    Attributes:
        source: the absolute path of the source.
        mount: the mount.
        description: one line with source, mount point and features.

    Raises:
        LlloopError, OSError, MemoryError: mounting failed.
    """

    def __init__(
        self,
        config: ServeConfig,
        checked: start_checks.Checked,
        on_ready: Callable[[Supervisor], None],
        lifelines: Sequence[int],
        notifier: Notifier,
        *,
        detached: bool,
        cleanup: ExitStack,
    ) -> None:
        show_title("llloop-supervisor", checked.mountpoint)
        multiprocessing.current_process().name = "llloop-supervisor"
        limits.raise_limits()
        self.source = checked.source
        self._on_ready = on_ready
        self._lifelines = lifelines
        self._notifier = notifier
        self._announced = False
        self._failed = False
        self._loop = loop = EventLoop()
        self._restart = loop.deadline(self._start_due_children)
        self._signals = Signals(loop)
        cleanup.callback(self._signals.close)
        # Allocate everything that may run out before mounting.
        self._resources = resources = SharedResources(config, self.source)
        cleanup.callback(resources.close)
        cpu_latency = CpuLatency(loop, resources.awake[0], resources.slots.metrics, config.wake_latency)
        cleanup.callback(cpu_latency.end)
        cleanup.callback(log.stop_collecting)
        log.start_collecting()
        cleanup.callback(self._log_end)

        operations = Operations()
        _log.debug("mounting %s at %s", self.source, checked.mountpoint)
        guard = StartGuard(checked.mountpoint)
        cleanup.callback(guard.dismiss)
        made = mounting.mount(config, checked.mountpoint, operations)
        device = made.device
        cleanup.callback(made.close)
        # The keeper stays until the mount is gone, because the supervisor may be killed while it ends.
        after_unmounting = cleanup.enter_context(ExitStack())
        cleanup.callback(made.detach)
        self._connection = connection.initialise(device, config, self.source)
        self.mount = made.attach(self._connection.capabilities)
        self._unmounting = Unmounting(loop, self.mount, device, self._finish)
        cleanup.callback(self._unmounting.close)
        cleanup.callback(resources.close)  # frees descriptors before the steps above, which need some
        mounts.raise_read_ahead(self.mount.device)  # after INIT, whose reply may lower it
        workers = f"{config.workers} worker{'' if config.workers == 1 else 's'}"
        how = self._connection.describe()
        self.description = f"serving {self.source} at {self.mount.mountpoint} with {workers}: {how}"

        def on_supervisor_death() -> None:
            detach_dead_mount(self.mount, device)
            if control is not None:
                control.remove()

        self._processes = processes = Processes(
            config,
            resources,
            self.source,
            self._connection,
            self.mount,
            operations,
            on_supervisor_death,
            detached=detached,
            cleanup=after_unmounting,
        )
        cleanup.callback(processes.end_serving)
        self._reload = Reload(processes, self._connection, notifier, self.description)
        self._watchdog = Watchdog(loop, notifier, processes.front, resources.slots, self.mount.device)
        reports = Reports(loop, processes, resources.slots)
        cleanup.callback(reports.close)
        source_check = SourceCheck(loop, self.source, resources.root, changes=not config.read_only)
        cleanup.callback(source_check.close)
        commands = ControlCommands(
            config,
            self.source,
            self.mount,
            self._connection,
            processes,
            resources.slots,
            cpu_latency,
            source_check,
            resources.watch,
            Tracing(loop, self._connection.capabilities, resources),
            phase=self._phase,
            reload=self._request_reload,
            stop=self._request_stop,
        )
        control = control_server.open_for(self.mount, loop, commands.table())
        if control is not None:
            cleanup.callback(control.close)
        cleanup.callback(notifier.stopping)

        self._signals.on({signal.SIGUSR1}, reports.log_counters)
        self._signals.on({signal.SIGUSR2}, reports.dump_stacks)
        self._signals.on({signal.SIGHUP}, self._hang_up)
        self._signals.on({signal.SIGTERM, signal.SIGINT}, self._request_stop)
        loop.watch(resources.ready[0], self._front_is_ready)
        for fd in lifelines:
            loop.watch(fd, self._lifeline_ended)
        processes.descriptor_keeper.initial_descriptors = syscalls.open_descriptors()
        for child in processes.all:
            self._start(child)
        guard.dismiss()

    def run(self) -> int:
        """Serve until unmounted or told to stop.

        Returns:
            0 after a clean stop, 1 if the mount ended otherwise.

        Raises:
            LlloopError: a signal stopped it before the mount was ready.
        """
        self._loop.run()
        if not self._announced and self._signals.stopped_by is not None:
            raise LlloopError(
                f"mount point {self.mount.mountpoint}: stopped by {self._signals.stopped_by} before it was ready"
            )
        return 1 if self._failed else 0

    def _finish(self, failed: bool) -> None:
        """Make `run` return."""
        self._failed = failed
        self._loop.stop()

    def _front_is_ready(self) -> None:
        os.read(self._resources.ready[0], 1)
        if not self._announced and self._signals.stopped_by is None:
            self._announced = True
            self._on_ready(self)
            _log.info("%s", self.description)  # after on_ready: with --daemon, that redirects standard error
            self._notifier.ready(self.description)
            self._watchdog.look()

    def _log_end(self) -> None:
        if self._announced:
            _log.info("stopped serving %s at %s", self.source, self.mount.mountpoint)

    # The processes

    def _start(self, child: Child) -> None:
        child.start()
        self._loop.watch(child.sentinel, partial(self._child_ended, child))

    def _child_ended(self, child: Child) -> None:
        self._loop.forget(child.sentinel)
        code = child.reap()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if child is self._processes.front:
            self._resources.slots.clear_front()
            if code == 0:  # unmounted
                self._finish(False)
                return
            if not self._announced:
                _log.error("%s %s before it served a request; the mount ends", child.name, how)
                self._finish(True)
                return
            if self._connection.capabilities is None:
                _log.error("%s %s; with --loop llfuse no other front can take over, so the mount ends", child.name, how)
                self._finish(True)
                return
        if child in self._processes.watchers:
            self._nothing_is_heard()
        asked = child.ending_on_purpose
        pause = child.schedule_restart()
        # Logged once, and again only if the cause is another one or some time has passed.
        once = {"once": child.name}
        if pause < 1 and not asked:
            _log.warning("%s %s; a new process takes over", child.name, how, extra=once)
        elif not asked:
            text = "%s %s again and again; the supervisor now waits up to %g seconds before each restart"
            _log.error(text, child.name, how, LONGEST_PAUSE, extra=once)
        self._set_restart()

    def _nothing_is_heard(self) -> None:
        """Make the kernel ask again for what it has cached, because changes in the source are not heard any more."""
        watch, capabilities = self._resources.watch, self._connection.capabilities
        assert watch is not None and capabilities is not None
        watch.publish(Method.STARTING, frozenset())
        if capabilities.minor >= fuse.EPOCH_SINCE:
            with suppress(OSError):  # unmounted
                notifications.increase_epoch(self._connection.device)

    def _set_restart(self) -> None:
        due = min((child.due for child in self._processes.all if child.process is None), default=None)
        if due is not None:
            self._restart.set_in(due - time.monotonic())

    def _start_due_children(self) -> None:
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
                    self._hand_descriptors_over()
        self._set_restart()
        self._reload.go_on()

    def _hand_descriptors_over(self) -> None:
        """Make a new keeper fetch the front's descriptors, and replace the front by one that shares them with it."""
        front, keeper = self._processes.front, self._processes.descriptor_keeper
        if front.process is None or front.process.pid is None or not keeper.can_share:
            return
        if self._connection.capabilities is None:  # with --loop llfuse, another front cannot take over
            return
        try:
            front.signal(signal.SIGSTOP)
            keeper.fetch(front.process.pid)
        except OSError as error:
            front.signal(signal.SIGCONT)
            if not syscalls.is_readable(front.sentinel):  # otherwise it has ended, and the loop handles that next
                _log.warning(
                    "the keeper could not fetch the front's descriptors: %s; "
                    "if the front dies now, programs lose the deleted files that they have open",
                    error,
                )
        else:
            front.replace()

    # Requests to reload or stop

    def _phase(self) -> str:
        return "stopping" if self._unmounting.begun else "reloading" if self._reload.running else "serving"

    def _hang_up(self) -> None:
        """Reload on SIGHUP; stop if the kernel has sent it because the terminal was closed."""
        if self._signals.lost_terminal():
            self._request_stop()
        else:
            self._request_reload()

    def _request_reload(self) -> None:
        if self._unmounting.begun:
            log.reopen()
        else:
            self._reload.begin()

    def _lifeline_ended(self) -> None:
        for fd in self._lifelines:  # a second one must not count as a second request to stop
            self._loop.forget(fd)
        self._request_stop()

    def _request_stop(self) -> None:
        self._watchdog.stop()
        self._notifier.stopping()
        self._unmounting.request()


def _reason(error: OSError | MemoryError) -> str:
    """Return an error message with the file and what to do."""
    if isinstance(error, MemoryError):
        return "there is not enough memory; allow more (ulimit -v) or serve with fewer workers"
    hints = {
        errno.EMFILE: "; allow more open files (ulimit -n) or serve with fewer workers",
        errno.ENFILE: "; allow more open files (/proc/sys/fs/file-max) or serve with fewer workers",
        errno.EAGAIN: "; allow more processes (ulimit -u, or the cgroup's pids.max) or serve with fewer workers",
        errno.ENOMEM: "; allow more memory (ulimit -v) or serve with fewer workers",
    }
    file = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{file}{error.strerror or error}{hints.get(error.errno or 0, '')}"
