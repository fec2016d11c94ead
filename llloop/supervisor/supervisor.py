"""The supervisor: owns the mount, answers INIT, and keeps a front and the workers running.

It makes everything the others share before the first fork (the mount, the arena, the pipes), so
that any of them can be forked again at any time. It does no request itself, waits for nothing
but the end of a child or a signal, and therefore is hard to kill by anything that happens in the mount.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import fields
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NamedTuple

import llfuse

from llloop import mount_options
from llloop.config import ServeConfig
from llloop.errors import HostError, LlloopError
from llloop.front.llfuse.operations import Operations
from llloop.front.process import FrontSetup, run_front
from llloop.linux import fuse, limits, mount_identity, mounts, syscalls
from llloop.linux.mount_identity import MountIdentity
from llloop.logging import setup as log
from llloop.logging.escape import printable
from llloop.logging.stacks import Stacks
from llloop.shared import negotiation
from llloop.shared.journal import Journal
from llloop.shared.negotiation import Feature
from llloop.shared.slots import Slots
from llloop.supervisor import connection, start_checks, unmounting
from llloop.supervisor.admin import Oversight, Sight
from llloop.supervisor.child import (
    LONGEST_PAUSE,
    PATIENCE,
    STOP_SIGNALS,
    Child,
    Cloned,
    child_main,
    end,
    forked,
    show_title,
)
from llloop.supervisor.descriptor_keeper import DescriptorKeeper
from llloop.supervisor.invalidator import InvalidatorSetup, run_invalidator
from llloop.supervisor.orphaned_mount import detach_dead_mount
from llloop.supervisor.process_state import ProcessState
from llloop.supervisor.sd_notify import Notifier
from llloop.supervisor.source_check import SourceCheck
from llloop.supervisor.start_guard import StartGuard
from llloop.supervisor.unmounting import GRACE
from llloop.workers.process import WorkerSetup, run_worker

_log = logging.getLogger(__name__)

_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1, signal.SIGUSR2)


class _Shared(NamedTuple):
    """What the processes share besides the arena: the journal of the front, and pipes as (reader, writer).

    Attributes:
        journal: what a front leaves to the next.
        requests: to each worker.
        wanted: from each worker to the invalidator.
        ready: the end that a front writes to when it serves.
        answers: from the workers to a front that waits for answers.
        probed: from the workers, of what they have looked at for the front.
    """

    journal: Journal
    requests: list[tuple[int, int]]
    wanted: list[tuple[int, int]]
    ready: int
    answers: tuple[int, int]
    probed: tuple[int, int]


class Supervisor:
    """One mount, from its making to its end.

    Args:
        config: the mount's options.
        on_ready: called with a line that describes the mount when it answers requests.
        lifelines: descriptors to watch; the mount ends when one becomes readable.
        detached: whether the processes of the tree let go of the standard descriptors.
        notifier: the service manager, if it is this process that it has started.
    """

    def __init__(
        self,
        config: ServeConfig,
        on_ready: Callable[[str], None],
        *,
        lifelines: Sequence[int] = (),
        detached: bool = False,
        notifier: Notifier | None = None,
    ) -> None:
        self._config = config
        self._on_ready = on_ready
        self._lifelines = list(lifelines)
        self._detached = detached
        self._notifier = notifier or Notifier({})
        checked = start_checks.make_way(config)
        self._source, self._mountpoint = checked.source, checked.mountpoint
        self._options = mount_options.for_libfuse(config)
        self._stop_asked = False
        self._stopped_by: str | None = None
        self._report_asked = False
        self._stacks_asked = False
        self._reload_asked = False
        # Those still to be replaced, the one being replaced last; None where no reload is going on.
        self._replacing: list[Child] | None = None
        self._oversight: Oversight | None = None
        self._deadline: float | None = None
        self._unmounter: BaseProcess | None = None
        self._lazy = False
        self._guard: StartGuard | None = None
        self._journal: Journal | None = None
        self._device: int | None = None
        self._mount: MountIdentity | None = None
        self._children: list[Child] = []
        self._keeper: DescriptorKeeper | None = None
        self._keepers: Child | None = None
        self._announced = False
        self._ended = False
        self._failed = False
        # Everything opened here, to be closed at the end: a program may serve more than one mount in its life.
        self._descriptors: list[int] = []

    @property
    def source(self) -> str:
        """The source, an absolute path without symlinks."""
        return self._source

    @property
    def mount(self) -> MountIdentity:
        """The mount, once it is made."""
        assert self._mount is not None
        return self._mount

    def run(self) -> int:
        """Mount, serve until unmounted or told to stop, and clean up.

        Returns:
            0 after a clean stop, 1 if the mount ended otherwise.

        Raises:
            LlloopError: the mount could not be made.
        """
        with ProcessState(_SIGNALS):
            try:
                self._start()
                self._watch()
            except (OSError, MemoryError) as error:
                raise HostError(f"mount point {self._mountpoint}: serving failed: {_reason(error)}") from None
            finally:
                self._clean_up()
        if not self._announced and self._stopped_by is not None:
            raise LlloopError(f"mount point {self._mountpoint}: stopped by {self._stopped_by} before it was ready")
        return 1 if self._failed else 0

    def _start(self) -> None:
        """Mount and start all processes. What can fail for want of something comes before the mount."""
        show_title("llloop-supervisor", self._mountpoint)
        multiprocessing.current_process().name = "llloop-supervisor"
        limits.raise_limits()
        self._catch_signals()
        root = os.open(self._source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._descriptors.append(root)
        self._root = root
        shared = self._make_shared()
        try:
            log.start_collecting()
        except RuntimeError as error:  # Python's word for a thread that cannot be started
            raise OSError(errno.EAGAIN, str(error)) from None
        operations = Operations()
        _log.debug("mounting %s at %s with %s", self._source, self._mountpoint, self._options)
        self._guard = StartGuard(self._mountpoint)
        device = connection.mount(operations, self._mountpoint, self._options)
        self._device = device
        self._mount = mount = mount_identity.identify(self._mountpoint)
        if mount is None:
            raise LlloopError(f"mount point {self._mountpoint}: the mount disappeared right after it was made")
        self._connection = connection.initialise(device, self._config, self._source)
        mounts.raise_read_ahead(mount.device)  # only now: INIT's answer may lower it
        self._make_children(root, operations, shared, mount)
        self._oversight = Oversight(self._sight(mount), self._notifier)
        assert self._keeper is not None
        self._keeper.own = syscalls.open_descriptors()
        for child in self._children:
            child.start()
        self._dismiss_guard()

    def _dismiss_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.dismiss()

    # The children

    def _pipe(self, flags: int = 0) -> tuple[int, int]:
        ends = os.pipe2(os.O_CLOEXEC | flags)
        self._descriptors += ends
        return ends

    def _make_shared(self) -> _Shared:
        """Make what the processes share and the mount has no part in."""
        config = self._config
        self._slots = Slots(config.slots, negotiation.MAX_WRITE, config.workers)
        pipes = []
        for _ in range(config.workers):
            pipes.append(self._pipe(os.O_DIRECT))
            _make_room(pipes[-1][1], config.slots)
        wanted = []
        for _ in range(config.workers):
            wanted.append(self._pipe(os.O_DIRECT))
            _make_room(wanted[-1][1], config.slots)
        self._ready_reader, ready_writer = self._pipe()
        self._journal = Journal()
        return _Shared(self._journal, pipes, wanted, ready_writer, self._pipe(os.O_DIRECT), self._pipe())

    def _make_children(self, root: int, operations: Operations, shared: _Shared, mount: MountIdentity) -> None:
        config, slots = self._config, self._slots
        device, own_loop = self._connection.device, self._connection.capabilities is not None
        pipes, wanted, ready_writer = shared.requests, shared.wanted, shared.ready
        answers_reader, answers_writer = shared.answers
        probed_reader, probed_writer = shared.probed
        if own_loop:
            self._descriptors += slots.open_pipes().descriptors
        setup = FrontSetup(
            config=config,
            slots=slots,
            journal=shared.journal,
            pipes=[writer for _, writer in pipes],
            root=root,
            device=device,
            operations=operations,
            capabilities=self._connection.capabilities,
            answers=answers_reader,
            probed=probed_reader if self._connection.preflight else None,
        )

        supervisor, detached, place = os.getpid(), self._detached, self._mountpoint

        def serve(own: Collection[int]) -> None:
            run_front(setup, own, lambda: _tell(ready_writer))

        def front(own: Collection[int]) -> None:
            child_main("llloop-front", lambda: serve(own), supervisor, detached, self._front.stacks, mountpoint=place)

        def worker(shard: int) -> Child:
            name = f"llloop-worker-{shard}"
            answers = None if own_loop else answers_writer
            setup = WorkerSetup(shard, slots, pipes[shard][0], device, answers, root, probed_writer, wanted[shard][1])
            return Child(
                name,
                lambda stacks: forked(name, lambda: run_worker(setup), stacks, detached=detached, mountpoint=place),
            )

        def farewell() -> None:
            detach_dead_mount(mount, device)
            if self._oversight is not None:
                self._oversight.remove_socket()

        def start_front(stacks: Stacks) -> BaseProcess | Cloned:
            if keeper.can_share:
                return keeper.start_front()
            own = syscalls.open_descriptors()
            return forked("llloop-front", lambda: serve(own), stacks, detached=detached, mountpoint=place)

        def invalidator(stacks: Stacks) -> BaseProcess:
            writers = [writer for _, writer in pipes]
            setup = InvalidatorSetup(device, [reader for reader, _ in wanted], writers)
            name = "llloop-invalidator"
            return forked(name, lambda: run_invalidator(setup), stacks, detached=detached, mountpoint=place)

        name = "llloop-keeper"
        keeper = self._keeper = DescriptorKeeper(front, farewell)
        self._keepers = Child(
            name, lambda stacks: forked(name, keeper.run, stacks, detached=detached, outlives=True, mountpoint=place)
        )
        keepers = self._keepers
        keeper.sentinel = lambda: keepers.sentinel
        self._front = Child("llloop-front", start_front)
        self._workers = [worker(shard) for shard in range(config.workers)]
        # Where llfuse runs the loop, no request waits for the kernel to drop pages.
        self._invalidators = [Child("llloop-invalidator", invalidator)] if own_loop else []
        self._children = [self._keepers, *self._workers, *self._invalidators, self._front]

    def _watch(self) -> None:
        """Wait for children to end and signals to come until the mount has ended."""
        while not self._ended:
            running = {child.sentinel: child for child in self._children if child.process is not None}
            watched: list[Any] = [*running, self._signal_reader, self._ready_reader, *self._lifelines]
            if self._unmounter is not None:
                watched.append(self._unmounter.sentinel)
            assert self._oversight is not None
            watched += self._oversight.watched
            for event in wait(watched, self._patience()):
                if event == self._signal_reader:
                    self._take_signals(self._signal_reader)
                elif event == self._ready_reader:
                    os.read(self._ready_reader, 1)
                    if not self._announced and self._stopped_by is None:
                        self._announced = True
                        self._on_ready(self._describe())
                        _log.info("%s", self._describe())  # now: with --daemon, standard error is let go of
                        self._oversight.ready(self._describe())
                elif event in running:
                    self._child_ended(running[event])
                elif event in self._lifelines:
                    # One is enough: another at the same time must not count as impatience.
                    self._lifelines.clear()
                    self._request_stop()
                elif self._unmounter is not None and event == self._unmounter.sentinel:
                    self._unmount_ended(self._unmounter)
            self._start_due_children()
            self._go_on_reloading()
            self._oversight.tend()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                _log.warning("%s is still in use after %g seconds; the server ends anyway", self._mountpoint, GRACE)
                self._ended = True

    def _patience(self) -> float | None:
        """How long to wait for events, in seconds."""
        times = [child.due for child in self._children if child.process is None]
        if self._deadline is not None:
            times.append(self._deadline)
        due = self._oversight.due() if self._oversight is not None else None
        if due is not None:
            times.append(due)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _child_ended(self, child: Child) -> None:
        code = child.gone()
        if child is self._front:
            self._slots.no_front()
        if child is self._front and code == 0:
            self._ended = True  # unmounted
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if child is self._front and not self._announced:
            _log.error("%s %s before it served a request; the mount ends", child.name, how)
            self._failed = self._ended = True
            return
        if child is self._front and self._connection.capabilities is None:
            _log.error("%s %s; with --loop llfuse no other front can take over, so the mount ends", child.name, how)
            self._failed = self._ended = True
            return
        asked = child.asked
        pause = child.schedule_restart()
        # Told once, and again only when the cause is another or it had gone well for a while.
        once = {"once": child.name}
        if pause < 1 and not asked:
            _log.warning("%s %s; a new process takes over", child.name, how, extra=once)
        elif not asked:
            text = "%s %s again and again; the supervisor now waits up to %g seconds before each restart"
            _log.error(text, child.name, how, LONGEST_PAUSE, extra=once)

    def _start_due_children(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.process is None and child.due <= now and not self._ended:
                try:
                    child.start()
                except OSError as error:
                    pause = child.schedule_restart()
                    _log.error("%s could not be started: %s; next attempt in %g seconds", child.name, error, pause)
                    continue
                if child is self._keepers:
                    self._hand_descriptors_over()

    def _hand_descriptors_over(self) -> None:
        """Have a new keeper take over what the front has open, and replace the front by one that shares it."""
        front = self._front.process
        if front is None or front.pid is None or self._keeper is None or not self._keeper.can_share:
            return
        if self._connection.capabilities is None:  # llfuse's loop cannot be taken up by another front
            return
        try:
            self._front.signal(signal.SIGSTOP)
            self._keeper.fetch(front.pid)
        except OSError as error:
            self._front.signal(signal.SIGCONT)
            if not syscalls.is_readable(self._front.sentinel):  # else it has ended, which is seen to next
                _log.warning(
                    "the keeper could not fetch the front's descriptors: %s; "
                    "if the front dies now, programs lose the deleted files that they have open",
                    error,
                )
        else:
            self._front.replace()

    def _describe(self) -> str:
        count = self._config.workers
        plural = "" if count == 1 else "s"
        how = self._connection.describe()
        return f"serving {self._source} at {self._mountpoint} with {count} worker{plural}: {how}"

    # Signals and the end

    def _catch_signals(self) -> None:
        self._terminal = _has_terminal()
        self._signal_reader, writer = self._pipe(os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # whoever started this may have blocked them

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._report_asked = True
        elif number == signal.SIGUSR2:
            self._stacks_asked = True
        elif number == signal.SIGHUP:
            self._reload_asked = True
        else:
            self._stop_asked = True
            self._stopped_by = signal.Signals(number).name

    def _take_signals(self, reader: int) -> None:
        os.read(reader, 4096)
        if self._report_asked:
            self._report_asked = False
            self._report()
        if self._stacks_asked and self._oversight is not None:
            self._stacks_asked = False
            self._oversight.dump_stacks()
        if self._reload_asked:
            self._reload_asked = False
            if self._terminal and not _has_terminal():  # it was closed, and nobody asked for anything
                self._request_stop()
            else:
                self.request_reload()
        if self._stop_asked:
            self._stop_asked = False
            self._request_stop()

    def _report(self) -> None:
        """Log what the workers have done so far, and have the front log what it holds."""
        for child, sheet in zip(self._workers, self._slots.metrics.workers, strict=True):
            counts = sheet.snapshot()
            _log.info(
                "%s: %d requests, %d errors, %d bytes read, %d bytes written, %d restarts",
                child.name,
                sum(count.requests for count in counts.values()),
                sum(count.errors for count in counts.values()),
                *(counts[name].bytes if name in counts else 0 for name in ("READ", "WRITE")),
                child.restarts,
            )
        self._front.signal(signal.SIGUSR1)

    def _sight(self, mount: MountIdentity) -> Sight:
        """Return what is to be seen of this mount from outside."""
        config, capabilities = self._config, self._connection.capabilities
        options = {
            one.name: getattr(value := getattr(config, one.name), "value", value)
            for one in fields(config)
            if one.name not in ("source", "mountpoint", "loop", "slots")
        }
        facts = {
            "source": self._source,
            "mountpoint": self._mountpoint,
            "options": options,
            "loop": "own" if capabilities is not None else "llfuse",
            "protocol": f"7.{capabilities.minor}" if capabilities is not None else None,
            "capabilities": capabilities.names() if capabilities is not None else [],
            "in_force": self._connection.in_force(config),
        }
        return Sight(
            mountpoint=self._mountpoint,
            device=mount.device,
            facts=facts,
            children=self._children,
            front=self._front,
            workers=self._workers,
            slots=self._slots,
            source=SourceCheck(self._source, self._root, changes=not config.read_only),
            reload=self.request_reload,
            stop=self._request_stop,
        )

    def request_reload(self) -> None:
        """Open the log file again, and replace the workers, the keeper and the front, one after the other."""
        log.reopen()
        if self._replacing is None and self._unmounter is None and self._deadline is None:
            _log.info("reloading: replacing the processes one by one")
            self._replacing = [*self._workers, *self._invalidators]
            capabilities = self._connection.capabilities
            # Where the kernel does not send them again, the front's requests would fail.
            if capabilities is not None and Feature.HAS_RESEND in capabilities.features and self._keepers is not None:
                self._replacing.append(self._keepers)  # and with it the front
            assert self._oversight is not None
            self._oversight.reload_begun()

    def _go_on_reloading(self) -> None:
        """Replace the next one, when the last one is."""
        if self._replacing is None or any(child.asked or child.process is None for child in self._children):
            return
        if self._replacing:
            self._replacing.pop(0).replace()
            return
        self._replacing = None
        _log.info("reloaded")
        assert self._oversight is not None
        self._oversight.reload_ended(self._describe())

    def _request_stop(self) -> None:
        """Begin to unmount; if that is done and somebody still uses the mount, end all the same."""
        if self._oversight is not None:
            self._oversight.stopping()
        if self._deadline is not None or self._unmounter is not None:
            self._ended = True
        else:
            self._start_unmounting(lazy=False)

    def _start_unmounting(self, lazy: bool) -> None:
        self._lazy = lazy
        if lazy:  # it can hang as any who uses the mount, where the source does
            self._deadline = time.monotonic() + 2 * GRACE
        assert self._mount is not None
        self._unmounter = unmounting.start(self._mount, self._connection.device, lazy=lazy)

    def _unmount_ended(self, process: BaseProcess) -> None:
        process.join()
        self._unmounter = None
        if process.exitcode == errno.EBUSY and not self._lazy:
            _log.warning(
                "%s is busy: detaching it lazily; programs that use it may go on for %g seconds",
                self._mountpoint,
                GRACE,
            )
            print(f"llloop: {printable(self._mountpoint)} is busy, detaching it lazily", file=sys.stderr, flush=True)
            self._start_unmounting(lazy=True)
        elif process.exitcode != 0 and (self._is_mounted() or self._is_covered()):
            _log.error("%s could not be unmounted", self._mountpoint)
            self._failed = self._ended = True
        else:
            self._deadline = time.monotonic() + GRACE

    def _tell_end(self) -> None:
        if self._announced:
            _log.info("stopped serving %s at %s", self._source, self._mountpoint)

    def _is_mounted(self) -> bool:
        return self._mount is not None and self._mount.is_reachable(self._device)

    def _is_covered(self) -> bool:
        return self._mount is not None and self._mount.is_covered()

    def _clean_up(self) -> None:
        """End every process and what is left of the mount. Each step is taken whatever becomes of the others."""
        with ExitStack() as steps:  # the last first
            steps.callback(log.stop_collecting)
            steps.callback(self._tell_end)
            steps.callback(self._dismiss_guard)
            if self._device is not None:
                # If it was not found out which mount it is, llfuse takes away what it has made a moment ago.
                steps.callback(llfuse.close, unmount=self._mount is None)
            if self._keeper is not None:
                steps.callback(self._keeper.close)
            for child in self._children:
                steps.callback(child.stacks.close)
                steps.callback(child.end)
            steps.callback(self._detach)
            steps.callback(self._end_unmounter)
            steps.callback(self._let_go)  # before these, for they need descriptors, and there may be none left
            # The keeper stays to the end: a supervisor that is killed in the middle of this leaves a mount behind, too.
            serving = [child for child in self._children if child is not self._keepers]
            for child in serving:
                steps.callback(child.end)
            for child in serving:
                steps.callback(child.signal, signal.SIGKILL)  # all at once, for each may take its time
            if self._oversight is not None:
                steps.callback(self._oversight.close)
                steps.callback(self._oversight.stopping)

    def _end_unmounter(self) -> None:
        unmounter, self._unmounter = self._unmounter, None  # with it go its descriptors
        if unmounter is not None:
            if not self._is_mounted():
                unmounter.join(PATIENCE)  # it has nothing left to do; killed, it would leave its fusermount behind
            end(unmounter)

    def _detach(self) -> None:
        try:
            if self._mount is not None and self._is_mounted():
                self._mount.unmount(lazy=True)
        except (OSError, LlloopError) as error:
            _log.error("%s could not be detached: %s", self._mountpoint, error)

    def _let_go(self) -> None:
        """Close what was opened for this mount."""
        signal.set_wakeup_fd(-1)
        for fd in self._descriptors:
            os.close(fd)
        if self._journal is not None:
            self._journal.close()


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal (tty(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _tell(writer: int) -> None:
    os.write(writer, b"!")


def _make_room(writer: int, messages: int) -> None:
    """Make room in a pipe in packet mode (pipe(7)) for that many messages; its writer never waits."""
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, messages * fuse.PAGE_SIZE)
    except PermissionError:  # the user's share of pipe pages is used up: fewer messages fit, the front does the rest
        _log.debug("request pipes hold fewer messages than usual; see pipe(7), pipe-user-pages-soft")
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    fcntl.fcntl(writer, fcntl.F_SETFL, flags | os.O_NONBLOCK)


def _reason(error: OSError | MemoryError) -> str:
    """Return what *error* says, with the file it is about and what can be done."""
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
