"""The supervisor's child processes: what each of them runs and inherits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial

from llloop.config import ServeConfig
from llloop.front.llfuse.operations import Operations
from llloop.front.process import FrontSetup, run_front
from llloop.linux import syscalls
from llloop.linux.mount_identity import MountIdentity
from llloop.linux.process import Process
from llloop.logging.stacks import Stacks
from llloop.shared.negotiation import Feature
from llloop.supervisor.child import Child, child_main, start_child
from llloop.supervisor.connection import Connection
from llloop.supervisor.descriptor_keeper import DescriptorKeeper
from llloop.supervisor.invalidator import InvalidatorSetup, run_invalidator
from llloop.supervisor.shared_resources import SharedResources
from llloop.watch.known import Known
from llloop.watch.process import Relay, Silent, WatcherSetup, run_watcher
from llloop.watch.relay import RelaySetup, run_relay
from llloop.watch.telling import Telling
from llloop.workers.process import WorkerSetup, run_worker


class Processes:
    """The processes of one mount, not started yet.

    Args:
        config: the mount's options.
        resources: the memory and pipes that they share.
        source: the absolute path of the source.
        connection: the mount's connection with the kernel.
        mount: the mount.
        operations: the object that was passed to ``llfuse.init()``.
        on_supervisor_death: runs in the descriptor keeper after the supervisor has died.
        detached: whether the processes redirect their standard descriptors to /dev/null.
        cleanup: gets the steps that end the processes, the keeper last.

    Attributes:
        keeper: the descriptor keeper process.
        descriptor_keeper: the supervisor's interface to it.
        workers: the workers, by shard.
        invalidators: the invalidator process; empty with `--loop llfuse`.
        watchers: the process that hears of changes in the source; empty without `--watch`.
        relays: the event relay; empty without one.
        front: the front process.
        all: all of them in the order in which they are started.
    """

    def __init__(
        self,
        config: ServeConfig,
        resources: SharedResources,
        source: str,
        connection: Connection,
        mount: MountIdentity,
        operations: Operations,
        on_supervisor_death: Callable[[], None],
        *,
        detached: bool,
        cleanup: ExitStack,
    ) -> None:
        mountpoint = mount.mountpoint
        own_loop = connection.capabilities is not None
        if own_loop:
            resources.open_payload_pipes()
        start = partial(start_child, detached=detached, mountpoint=mountpoint)
        supervisor = os.getpid()
        front_setup = FrontSetup(
            config=config,
            slots=resources.slots,
            journal=resources.journal,
            table=resources.table,
            pipes=[writer for _, writer in resources.requests],
            root=resources.root,
            device=connection.device,
            operations=operations,
            capabilities=connection.capabilities,
            awake=resources.awake[1],
            answers=resources.answers[0],
            probed=resources.probed[0] if connection.preflight else None,
            watch=resources.watch,
            watches=resources.watches,
            trace=resources.trace,
            trace_switch=resources.trace_switch[0],
            relay=resources.relay,
        )
        invalidator_setup = InvalidatorSetup(
            connection.device, [reader for reader, _ in resources.wanted], [writer for _, writer in resources.requests]
        )

        def serve(own: Collection[int]) -> None:
            run_front(front_setup, own, lambda: _tell(resources.ready[1]))

        def front_of_keeper(own: Collection[int]) -> None:
            stacks = self.front.stacks
            child_main("llloop-front", lambda: serve(own), supervisor, detached, stacks, mountpoint=mountpoint)

        def start_keeper(stacks: Stacks) -> Process:
            return start("llloop-keeper", self.descriptor_keeper.run, stacks, outlives=True)

        def start_front(stacks: Stacks) -> Process:
            if self.descriptor_keeper.can_share:
                return self.descriptor_keeper.start_front()
            own = syscalls.open_descriptors()
            return start("llloop-front", lambda: serve(own), stacks)

        def start_worker(shard: int, stacks: Stacks) -> Process:
            setup = WorkerSetup(
                shard=shard,
                slots=resources.slots,
                pipe=resources.requests[shard][0],
                device=connection.device,
                answers=None if own_loop else resources.answers[1],
                root=resources.root,
                probed=resources.probed[1],
                wanted=resources.wanted[shard][1],
                trace=resources.trace,
            )
            return start(f"llloop-worker-{shard}", lambda: run_worker(setup), stacks)

        def start_invalidator(stacks: Stacks) -> Process:
            return start("llloop-invalidator", lambda: run_invalidator(invalidator_setup), stacks)

        def passes_on() -> Relay:
            if resources.events is None or resources.relay is None:
                return Silent()
            assert resources.watch is not None and connection.capabilities is not None
            known = Known(resources.watch, resources.table)
            data = Feature.PASSTHROUGH not in connection.capabilities.features
            return Telling(resources.events, resources.watch, known, data=data)

        def start_relay(stacks: Stacks) -> Process:
            assert resources.events is not None and resources.relay is not None
            setup = RelaySetup(resources.events, resources.relay, connection.device, mount, config.writeback)
            return start("llloop-relay", lambda: run_relay(setup), stacks)

        def start_watcher(stacks: Stacks) -> Process:
            assert resources.watch is not None and connection.capabilities is not None
            setup = WatcherSetup(
                source=source,
                root=resources.root,
                device=connection.device,
                mount=mount,
                minor=connection.capabilities.minor,
                state=resources.watch,
                table=resources.table,
                watches=resources.watches,
                relay=passes_on,
            )
            return start("llloop-watcher", lambda: run_watcher(setup), stacks)

        def child(name: str, launch: Callable[[Stacks], Process]) -> Child:
            one = Child(name, launch)
            cleanup.callback(one.close)
            return one

        self.descriptor_keeper = DescriptorKeeper(front_of_keeper, on_supervisor_death, lambda: self.keeper.process)
        cleanup.callback(self.descriptor_keeper.close)
        self.keeper = child("llloop-keeper", start_keeper)
        self.workers = [
            child(f"llloop-worker-{shard}", partial(start_worker, shard)) for shard in range(config.workers)
        ]
        self.invalidators = [child("llloop-invalidator", start_invalidator)] if own_loop else []
        self.watchers = [child("llloop-watcher", start_watcher)] if config.watch else []
        self.relays = [child("llloop-relay", start_relay)] if resources.relay is not None else []
        self.front = child("llloop-front", start_front)
        self.all = [self.keeper, *self.workers, *self.invalidators, *self.watchers, *self.relays, self.front]

    def end_serving(self) -> None:
        """End all processes except the keeper."""
        serving = [one for one in self.all if one is not self.keeper]
        for one in serving:
            one.signal(signal.SIGKILL)  # all at once, because each may take some time to end
        with ExitStack() as steps:
            for one in serving:
                steps.callback(one.end)


def _tell(writer: int) -> None:
    os.write(writer, b"!")
