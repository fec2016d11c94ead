"""The CPUs of load and servers: the two classes of workloads.

Waking a sleeping CPU takes longer than many requests, so the results would depend on the scheduler. Class *requests*
runs load and server on one CPU and measures the cost of a request. Class *bandwidth* lets them run on any CPU. Each
class has its own servers, because a server chooses its number of threads by the CPUs that it may use at its start.
"""

from __future__ import annotations

import os

BANDWIDTH = "bandwidth"
REQUESTS = "requests"
KINDS = (BANDWIDTH, REQUESTS)

DESCRIPTION = {
    BANDWIDTH: "load and servers run on whatever CPUs the scheduler gives them",
    REQUESTS: "load and all of the server's processes are pinned to one CPU: the cost of a request",
}


def cpus(kind: str) -> set[int]:
    """Return the CPUs for the load and the servers of a class."""
    usable = os.sched_getaffinity(0)
    # Use the last CPU, because the first one gets most interrupts.
    return {max(usable)} if kind == REQUESTS else usable
