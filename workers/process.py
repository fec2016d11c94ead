"""A worker process, from its fork to its end."""

from __future__ import annotations

from dataclasses import dataclass

from llloop.linux.credentials import SetidGuard, Writer, drop_capabilities_except, worker_capabilities
from llloop.shared.leadership import Leadership
from llloop.shared.slots import Slots
from llloop.workers.descriptors import Descriptors
from llloop.workers.invalidations import Invalidations
from llloop.workers.loop import Worker
from llloop.workers.operations import Operations
from llloop.workers.preflight import Probes
from llloop.workers.replies import FrontReplies, KernelReplies, Replies


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker inherits from the supervisor.

    Attributes:
        shard: its number.
        arena: the shared memory.
        pipe: the read end of its request pipe.
        device: the descriptor of /dev/fuse.
        answers: the write end of the pipe to a front that waits for answers, or None where they go to the kernel.
        root: an O_PATH descriptor of the source.
        probed: the write end of the pipe by which the front is told of what was looked at for it.
        wanted: the write end of the pipe to the invalidator.
    """

    shard: int
    slots: Slots
    pipe: int
    device: int
    answers: int | None
    root: int
    probed: int
    wanted: int


def run_worker(setup: WorkerSetup) -> None:
    """Serve one shard until the request pipe has no writer any more."""
    slots = setup.slots
    leadership = Leadership()
    replies: Replies
    if setup.answers is None:
        replies = KernelReplies(setup.device, slots.payload_size, leadership)
    else:
        replies = FrontReplies(setup.answers, slots, leadership)
    drop_capabilities_except(worker_capabilities())
    sheet = slots.metrics.workers[setup.shard]
    descriptors = Descriptors(slots)
    probes = Probes(setup.root, descriptors, setup.probed, leadership)
    invalidations = Invalidations(setup.wanted)
    operations = Operations(
        slots, descriptors, replies, SetidGuard(), Writer(), sheet, invalidations, probes.look, leadership
    )
    worker = Worker(setup.shard, slots, setup.pipe, operations, sheet, descriptors, leadership, invalidations)
    worker.recover()
    worker.run()
