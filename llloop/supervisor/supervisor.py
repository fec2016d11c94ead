"""The supervisor: it mounts, starts the processes that serve the mount, and replaces those that die.

It serves no request and only waits in its event loop. So a mount that hangs does not block it.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from llloop.config import ServeConfig
from llloop.errors import HostError, LlloopError
from llloop.front.llfuse.operations import Operations
from llloop.linux import limits, mounts
from llloop.linux.syscalls import is_readable
from llloop.logging import setup as log
from llloop.supervisor import connection, control_server, mounting, start_checks
from llloop.supervisor.child import show_title
from llloop.supervisor.control_commands import ControlCommands
from llloop.supervisor.control_server import ControlServer
from llloop.supervisor.cpu_latency import CpuLatency
from llloop.supervisor.event_loop import EventLoop
from llloop.supervisor.orphaned_mount import detach_dead_mount
from llloop.supervisor.process_state import ProcessState
from llloop.supervisor.processes import Processes
from llloop.supervisor.reload import Reload
from llloop.supervisor.reports import Reports
from llloop.supervisor.restarts import Restarts
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
        self._control: ControlServer | None = None
        self._loop = loop = EventLoop()
        self._signals = cleanup.enter_context(closing(Signals(loop)))
        # Allocate everything that may run out before mounting.
        self._resources = resources = cleanup.enter_context(closing(SharedResources(config, self.source)))
        self._cpu_latency = CpuLatency(loop, resources.awake[0], resources.slots.metrics, config.wake_latency)
        cleanup.callback(self._cpu_latency.end)
        cleanup.callback(log.stop_collecting)
        log.start_collecting()
        cleanup.callback(self._log_end)

        operations = Operations()
        guard = cleanup.enter_context(closing(StartGuard(checked.mountpoint)))
        _log.debug("mounting %s at %s", self.source, checked.mountpoint)
        made = cleanup.enter_context(closing(mounting.mount(config, checked.mountpoint, operations)))
        # The keeper stays until the mount is gone, because the supervisor may be killed while it ends.
        after_unmounting = cleanup.enter_context(ExitStack())
        cleanup.callback(made.detach)
        self._connection = connection.initialise(made.device, config, self.source)
        self.mount = made.attach(self._connection.capabilities)
        mounts.raise_read_ahead(self.mount.device)  # after INIT, whose reply may lower it
        self.description = self._describe(config.workers)
        self._unmounting = cleanup.enter_context(closing(Unmounting(loop, self.mount, made.device, self._finish)))
        cleanup.callback(resources.close)  # frees descriptors before the steps above, which need some

        self._processes = processes = Processes(
            config,
            resources,
            self.source,
            self._connection,
            self.mount,
            operations,
            self._supervisor_died,
            detached=detached,
            cleanup=after_unmounting,
        )
        cleanup.callback(processes.end_serving)
        self._reload = Reload(processes, self._connection, notifier, self.description)
        restarts = Restarts(loop, processes, resources, self._connection, self._ends_with_front, self._reload.go_on)
        self._watchdog = Watchdog(loop, notifier, processes.front, resources.slots, self.mount.device)
        self._control = self._open_control(config, cleanup)
        cleanup.callback(notifier.stopping)
        self._register_callbacks(cleanup.enter_context(closing(Reports(loop, processes, resources.slots))))
        restarts.start_all()
        guard.close()

    def _open_control(self, config: ServeConfig, cleanup: ExitStack) -> ControlServer | None:
        resources = self._resources
        source_check = SourceCheck(self._loop, self.source, resources.root, changes=not config.read_only)
        cleanup.callback(source_check.close)
        commands = ControlCommands(
            config,
            self.source,
            self.mount,
            self._connection,
            self._processes,
            resources,
            self._cpu_latency,
            source_check,
            Tracing(self._loop, self._connection.capabilities, resources),
            phase=self._phase,
            reload=self._request_reload,
            stop=self._request_stop,
        )
        control = control_server.open_for(self.mount, self._loop, commands.table())
        if control is not None:
            cleanup.callback(control.close)
        return control

    def _register_callbacks(self, reports: Reports) -> None:
        self._signals.on({signal.SIGUSR1}, reports.log_counters)
        self._signals.on({signal.SIGUSR2}, reports.dump_stacks)
        self._signals.on({signal.SIGHUP}, self._hang_up)
        self._signals.on({signal.SIGTERM, signal.SIGINT}, self._request_stop)
        self._loop.watch(self._resources.ready[0], self._front_is_ready)
        for fd in self._lifelines:
            self._loop.watch(fd, self._lifeline_ended)

    def _describe(self, workers: int) -> str:
        number = f"{workers} worker{'' if workers == 1 else 's'}"
        return f"serving {self.source} at {self.mount.mountpoint} with {number}: {self._connection.describe()}"

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
        if not is_readable(self._resources.ready[0]):  # not yet, or `_request_stop` was faster
            return
        os.read(self._resources.ready[0], 1)
        if not self._announced and not self._unmounting.begun:
            self._announced = True
            self._on_ready(self)
            _log.info("%s", self.description)  # after on_ready: with --daemon, that redirects standard error
            self._notifier.ready(self.description)
            self._watchdog.look()

    def _log_end(self) -> None:
        if self._announced:
            _log.info("stopped serving %s at %s", self.source, self.mount.mountpoint)

    def _ends_with_front(self, code: int, how: str) -> bool:
        """Return whether the mount ends with a front that has ended, and if so make `run` return."""
        if code == 0:  # unmounted
            self._finish(False)
            return True
        if not self._announced:
            _log.error("llloop-front %s before it served a request; the mount ends", how)
        elif self._connection.capabilities is None:
            _log.error("llloop-front %s; with --loop llfuse no other front can take over, so the mount ends", how)
        else:
            return False
        self._finish(True)
        return True

    def _supervisor_died(self) -> None:
        """Clean up; this runs in the descriptor keeper."""
        detach_dead_mount(self.mount, self._connection.device)
        if self._control is not None:
            self._control.remove()

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
        # The front says that it is ready before it serves anything. Who has seen the mount work may stop it at once.
        self._front_is_ready()
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
