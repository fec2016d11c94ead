"""The main function of the front process."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

import llfuse

from llloop.config import ServeConfig
from llloop.front.context import Context, build_context
from llloop.front.llfuse.exchange import Exchange
from llloop.front.llfuse.operations import Operations
from llloop.front.loop import Loop
from llloop.front.preflight import Preflight
from llloop.front.recovery.takeover import begin_takeover
from llloop.front.tracing import Tracer, TraceSwitch
from llloop.linux import syscalls
from llloop.linux.credentials import FRONT_CAPABILITIES, drop_capabilities_except
from llloop.shared.journal import Journal
from llloop.shared.negotiation import Capabilities
from llloop.shared.relay import RelayState
from llloop.shared.slots import Slots
from llloop.shared.table import Table
from llloop.shared.trace import Trace
from llloop.shared.watch_state import WatchState
from llloop.shared.watches import Watches

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FrontSetup:
    """What a front inherits from the supervisor.

    Attributes:
        config: the mount's options.
        slots: the request slots in shared memory.
        journal, table: the records and the inodes, which survive the front.
        pipes: the write ends of the workers' request pipes.
        root: an O_PATH descriptor of the source.
        device: a descriptor of /dev/fuse.
        operations: the object that was passed to ``llfuse.init()``.
        capabilities: the result of the negotiation with the kernel, or None with `--loop llfuse`.
        awake: the write end of the pipe for asking the supervisor to keep idle CPUs awake.
        answers: the read end of the pipe for workers' answers with `--loop llfuse`.
        probed: the read end of the pipe for workers' answers to PROBE, or None without preflight checks.
        watch: what the front and the watcher tell each other; None without `--watch`.
        watches: the inotify watches; None without inotify.
        trace: the trace of requests.
        trace_switch: the read end of the pipe that tells when readers of the trace come and leave.
        relay: what the event relay does; None without one.
    """

    config: ServeConfig
    slots: Slots
    journal: Journal
    table: Table
    pipes: list[int]
    root: int
    device: int
    operations: Operations
    capabilities: Capabilities | None
    awake: int
    answers: int
    probed: int | None
    watch: WatchState | None
    watches: Watches | None
    trace: Trace
    trace_switch: int
    relay: RelayState | None


def run_front(setup: FrontSetup, own: Collection[int], ready: Callable[[], None]) -> None:
    """Serve until the file system is unmounted.

    Args:
        setup: what the front inherits.
        own: the descriptors that every front starts with. Those of a dead front are open, too.
        ready: called before the first request is served.
    """
    slots = setup.slots
    _let_workers_pull()
    slots.lock()
    drop_capabilities_except(FRONT_CAPABILITIES)
    slots.empty_pipes()
    context = build_context(
        setup.config,
        setup.capabilities,
        slots,
        setup.journal,
        setup.table,
        setup.pipes,
        setup.root,
        setup.device,
        watch=setup.watch,
        watches=setup.watches,
    )
    is_successor = slots.generation > 0
    if is_successor:
        begin_takeover(context, setup.journal, own)
    slots.set_front(os.getpid())  # from now on, descriptors have the same numbers as in the dead front
    if not is_successor:
        slots.note_resent_received()
    slots.touch()
    signal.signal(signal.SIGUSR1, lambda number, frame: _report(context))
    # The front creates no reference cycles, and a garbage collection would block all requests.
    gc.freeze()
    gc.disable()
    if setup.capabilities is not None:
        preflight = Preflight(context, setup.probed) if setup.probed is not None else None
        loop = Loop(context, setup.device, setup.journal, preflight, setup.relay, setup.awake)
        tracer = Tracer(setup.trace, slots.memory, context.inodes)
        trace_switch = TraceSwitch(setup.trace, setup.trace_switch, tracer, loop.trace)
        ready()
        if is_successor:
            loop.serve_resent()
        trace_switch.start()
        loop.run()
    else:
        setup.operations.attach(context, Exchange(context.router, setup.answers), setup.device)
        ready()
        llfuse.main(workers=1, handle_signals=False)


def _report(context: Context) -> None:
    """Log the number of inodes, handles, directories and slots of this front."""
    states = context.router.slots.states
    lent = sum(1 for state in states if state)
    _log.info(
        "%d inodes, %d open handles, %d directories kept open, %d of %d slots in use",
        len(context.inodes),
        len(context.handles),
        context.tree.directory_fds.kept,
        lent,
        len(states),
    )


def _let_workers_pull() -> None:
    """Allow the supervisor and its descendants to duplicate this process's descriptors.

    If the Yama security module restricts tracing to descendants, pidfd_getfd(2) between siblings needs this (prctl(2),
    PR_SET_PTRACER). Without Yama, the call fails and is not needed.
    """
    with suppress(OSError):
        syscalls.prctl(syscalls.PR_SET_PTRACER, os.getppid())
