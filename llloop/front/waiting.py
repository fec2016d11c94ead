"""How the front waits for the next request: with `--wake-latency`, it polls while that pays.

While a program makes one request after the other, the CPU of the front is idle during the program's part of the time,
and the CPU of the program during the front's part. Waking a halted CPU takes longer than the front's work for most
requests (docs/performance.md). `--wake-latency` allows two remedies, both only while many requests arrive:

* The front polls the device for some microseconds before it sleeps, so that its own CPU does not halt.
* If the supervisor can do it, it keeps all idle CPUs awake (`llloop.supervisor.cpu_latency`).

Whether polling pays depends on the load. On one CPU, or beside other busy processes, it only takes time from those who
make the requests. So the front measures it. It counts requests in rounds, and in some of the rounds it alternates
between polling and sleeping. After that it does what took less time.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from contextlib import suppress

from llloop.shared.metrics import AWAKE, Gauge, Metrics

# The number of requests in a round. All decisions are made between two rounds.
ROUND = 32
# If a round takes longer than this, in nanoseconds, few requests arrive, and the front sleeps (4,000 per second).
SLOW = AWAKE
# For how long the front polls before it sleeps, in nanoseconds.
LIMIT = 60_000
# If one check takes longer than this, in nanoseconds, another process has used the CPU, and wants it again.
INTERRUPTED = 50_000
# The front then sleeps for so many rounds.
PAUSE = 32
# A comparison takes so many rounds, half of them with polling.
COMPARED = 8
# So many rounds after the start of a comparison, the next one starts.
INTERVAL = 128
# The front polls if its rounds take at most this share of the time of the others.
_WORTHWHILE = 0.95


class Waiting:
    """Decides how the front waits. The loop calls `poll` while `polls`, and counts `left` down to 0 for `review`.

    Args:
        device: the descriptor of /dev/fuse.
        metrics: the counters of the mount.
        can_poll: whether polling is allowed and may help.
        awake: the write end of the non-blocking pipe for asking the supervisor to keep idle CPUs awake, or None.
        clock: returns the time (monotonic clock, nanoseconds).

    Attributes:
        polls: whether to call `poll` before the next request is received.
        left: the number of requests until the end of the round.
    """

    def __init__(
        self,
        device: int,
        metrics: Metrics,
        can_poll: bool,
        awake: int | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.polls = False
        self.left = ROUND
        self._clock = clock
        self._can_poll = can_poll
        self._poller = select.poll()
        self._poller.register(device, select.POLLIN)
        self._began = 0
        self._round = 0
        self._pays = False
        self._pause = 0
        # The durations of the rounds of a comparison, without polling and with it.
        self._durations: tuple[list[int], list[int]] = ([], [])
        self._awake = awake
        self._awake_until = metrics.gauge(Gauge.AWAKE_UNTIL)
        self._halt_until = metrics.gauge(Gauge.HALT_UNTIL)

    def poll(self) -> None:
        """Return when a request can be received, or when polling for it would cost more than it may save."""
        is_ready = self._poller.poll
        if is_ready(0):
            return
        clock = self._clock
        last = clock()
        end = last + LIMIT
        while last < end:
            os.sched_yield()  # let others run, such as the program that has just got its answer
            if is_ready(0):
                return
            now = clock()
            if now - last > INTERRUPTED:
                self.polls = False
                self._pause = PAUSE
                return
            last = now

    def review(self, now: int) -> None:
        """Decide how to wait in the next round, when one has ended at the time *now*."""
        duration = now - self._began
        self._began = now
        self.left = ROUND
        if duration > SLOW:
            self.polls = False
            self._restart()
            return
        self._have_cpus_awake(now)
        if not self._can_poll:
            return
        if self._pause:
            self._pause -= 1
            self._restart()
            return
        if self._round < COMPARED:
            self._durations[self.polls].append(duration)
            if self._round == COMPARED - 1:
                self._pays = _middle(self._durations[True]) < _WORTHWHILE * _middle(self._durations[False])
        self._round += 1
        if self._round == INTERVAL:
            self._restart()
        self.polls = self._round % 2 == 1 if self._round < COMPARED else self._pays

    def _restart(self) -> None:
        """Make the next round the first one of a comparison."""
        self._round = 0
        self._durations = ([], [])

    def _have_cpus_awake(self, now: int) -> None:
        if self._awake is None or now < self._halt_until[0]:
            return
        asked = now < self._awake_until[0]
        self._awake_until[0] = now + AWAKE
        if not asked:
            with suppress(BlockingIOError):  # the supervisor has not read earlier questions
                os.write(self._awake, b"!")


def _middle(durations: list[int]) -> int:
    """Return the sum of the durations without the longest, in which another process may have had the CPU."""
    return sum(durations) - max(durations)
