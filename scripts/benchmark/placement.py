"""Where load and servers run: the two classes of workloads.

Waking a sleeping CPU costs more than many a request does, so what is measured would be the scheduler's luck. Class
*requests* has load and server on one CPU: the cost of a request. Class *bandwidth* lets them run where they like.
A contender is served once for each class: a server decides by the CPUs it finds at its start how many threads it runs.
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
    """Return the CPUs on which load and servers of a class run."""
    usable = os.sched_getaffinity(0)
    # The last one: the first takes most interrupts.
    return {max(usable)} if kind == REQUESTS else usable
