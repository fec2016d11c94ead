"""The main function of a worker process."""

from __future__ import annotations

from dataclasses import dataclass

from llloop.linux.credentials import SetidGuard, Writer, drop_capabilities_except, worker_capabilities
from llloop.shared.leadership import Leadership
from llloop.shared.slots import Slots
from llloop.shared.trace import Trace
from llloop.workers.descriptors import Descriptors
from llloop.workers.invalidations import Invalidations
from llloop.workers.loop import Worker
from llloop.workers.operations import Operations
from llloop.workers.preflight import Probes
from llloop.workers.replies import FrontReplies, KernelReplies, Replies, TracedReplies


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker inherits from the supervisor.

    Attributes:
        shard: the worker's number.
        slots: the request slots in shared memory.
        pipe: the read end of the worker's request pipe.
        device: a descriptor of /dev/fuse.
        answers: the write end of the pipe for answers to the front (with `--loop llfuse`); None if the worker answers
            the kernel directly.
        root: an O_PATH descriptor of the source.
        probed: the write end of the pipe for results of PROBE requests to the front.
        wanted: the write end of the pipe to the invalidator.
        trace: the trace of requests.
    """

    shard: int
    slots: Slots
    pipe: int
    device: int
    answers: int | None
    root: int
    probed: int
    wanted: int
    trace: Trace


def run_worker(setup: WorkerSetup) -> None:
    """Serve one shard until all writers of the request pipe are closed."""
    slots = setup.slots
    leadership = Leadership()
    replies: Replies
    if setup.answers is None:
        replies = KernelReplies(setup.device, slots.payload_size, leadership)
    else:
        replies = FrontReplies(setup.answers, slots, leadership)
    drop_capabilities_except(worker_capabilities())
    counters = slots.metrics.workers[setup.shard]
    descriptors = Descriptors(slots)
    probes = Probes(setup.root, descriptors, setup.probed, leadership)
    invalidations = Invalidations(setup.wanted)
    traced = TracedReplies(replies, setup.trace.worker(setup.shard))

    def choose_replies() -> Replies:
        return traced if setup.trace.wanted else replies

    operations = Operations(
        slots,
        descriptors,
        replies,
        SetidGuard(),
        Writer(),
        counters,
        invalidations,
        probes.probe,
        leadership,
        choose_replies,
    )
    worker = Worker(setup.shard, slots, setup.pipe, operations, counters, descriptors, leadership, invalidations)
    worker.recover()
    worker.run()
