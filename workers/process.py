"""A worker process, from its fork to its end."""

from __future__ import annotations

from dataclasses import dataclass

from llloop.arena import Arena
from llloop.leadership import Leadership
from llloop.privilege import SetidGuard, Writer, keep_only, worker_capabilities

from .invalidations import Invalidations
from .leases import Leases
from .loop import Worker
from .probes import Probes
from .replies import FrontReplies, KernelReplies, Replies
from .transfers import Transfers


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
    arena: Arena
    pipe: int
    device: int
    answers: int | None
    root: int
    probed: int
    wanted: int


def run_worker(setup: WorkerSetup) -> None:
    """Serve one shard until the request pipe has no writer any more."""
    arena = setup.arena
    leadership = Leadership()
    replies: Replies
    if setup.answers is None:
        replies = KernelReplies(setup.device, arena.payload_size, leadership)
    else:
        replies = FrontReplies(setup.answers, arena, leadership)
    keep_only(worker_capabilities())
    sheet = arena.metrics.workers[setup.shard]
    leases = Leases(arena)
    probes = Probes(setup.root, leases, setup.probed, leadership)
    invalidations = Invalidations(setup.wanted)
    transfers = Transfers(arena, leases, replies, SetidGuard(), Writer(), sheet, invalidations, probes.look, leadership)
    worker = Worker(setup.shard, arena, setup.pipe, transfers, sheet, leases, leadership, invalidations)
    worker.recover()
    worker.run()
