"""Keeping idle CPUs awake while programs wait for answers.

On an idle machine, two CPUs halt during each request: that of the program while the front works, and that of the front
while the program works. Waking a halted CPU takes longer than most requests. While a process has /dev/cpu_dma_latency
open and has written 0 to it, idle CPUs poll instead of halting (Documentation/power/pm_qos_interface.rst in the
kernel's source). This concerns all CPUs of the machine and costs energy, so the supervisor does it only while the front
gets many requests.

The front notes in shared memory until when CPUs should be awake, and extends this time with every few requests
(`llloop/front/waiting.py`). It writes to a pipe if the noted time had passed. Until then the supervisor sleeps. Only
the supervisor has the descriptor, so the kernel closes it if the supervisor dies.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from llloop.config import WakeLatency
from llloop.errors import HostError
from llloop.shared.metrics import AWAKE, NEVER, Gauge, Metrics
from llloop.supervisor.event_loop import EventLoop

_log = logging.getLogger(__name__)

DEVICE = "/dev/cpu_dma_latency"
DRIVER = Path("/sys/devices/system/cpu/cpuidle/current_driver")
# With `auto`, the maximum number of CPUs of the machine. All idle ones poll, but programs wait for one or two of them.
_MOST_CPUS = 4
# CPUs poll in vain for AWAKE at the end of each burst of requests. This may be one part in so many of the time ...
_SHARE = 10
# ... apart from bursts within so many nanoseconds, which may follow each other more closely.
_ALLOWANCE = 1_000_000_000


class CpuLatency:
    """Keeps idle CPUs awake while the front asks for it.

    Args:
        loop: the supervisor's event loop.
        asked: the read end of the non-blocking pipe to which the front writes.
        metrics: the counters of the mount.
        wanted: when to keep CPUs awake.
        device: the path of /dev/cpu_dma_latency.
        clock: returns the time (monotonic clock, nanoseconds).
    """

    def __init__(
        self,
        loop: EventLoop,
        asked: int,
        metrics: Metrics,
        wanted: WakeLatency,
        *,
        device: str = DEVICE,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._asked = asked
        self._device = device
        self._clock = clock
        self._awake_until = metrics.gauge(Gauge.AWAKE_UNTIL)
        self._halt_until = metrics.gauge(Gauge.HALT_UNTIL)
        self._descriptor: int | None = None
        self._since = self._total = self._paid = 0
        _all.add(self)
        self._end = loop.deadline(self._end_if_due)
        if is_possible(wanted, device):
            loop.watch(asked, self._begin)
        else:
            self._halt_until[0] = NEVER

    @property
    def seconds(self) -> float:
        """For how long CPUs were kept awake since the start of the mount."""
        current = self._clock() - self._since if self._descriptor is not None else 0
        return (self._total + current) / 1e9

    def _begin(self) -> None:
        """Keep CPUs awake, because the front has asked for it."""
        os.read(self._asked, 4096)
        if self._descriptor is not None or self._awake_until[0] <= self._clock() or self._halt_until[0] == NEVER:
            return
        self._since = self._clock()
        try:
            self._descriptor = os.open(self._device, os.O_WRONLY | os.O_CLOEXEC)
            os.write(self._descriptor, bytes(4))
        except OSError as error:
            _log.warning("%s cannot be used any more: %s; llloop lets idle CPUs halt", self._device, error.strerror)
            self.end()
            self._halt_until[0] = NEVER
        else:
            self._set_end()

    def _set_end(self) -> None:
        self._end.set_in(max(0, self._awake_until[0] - self._clock()) / 1e9)

    def _end_if_due(self) -> None:
        if self._awake_until[0] > self._clock():
            self._set_end()
        else:
            self.end()

    def end(self) -> None:
        """Let idle CPUs halt; for some time, if bursts of requests were short and many."""
        if self._descriptor is None:
            return
        os.close(self._descriptor)
        self._descriptor = None
        self._awake_until[0] = 0  # the front then asks again
        self._end.cancel()
        now = self._clock()
        self._total += now - self._since
        self._paid = max(self._paid, now - _ALLOWANCE) + _SHARE * AWAKE
        self._halt_until[0] = max(self._paid, now)

    def abandon(self) -> None:
        """Close the copy of the descriptor in a forked child, which may live longer than the supervisor."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_all: weakref.WeakSet[CpuLatency] = weakref.WeakSet()


def _abandon_all() -> None:
    for one in list(_all):
        one.abandon()
    _all.clear()


os.register_at_fork(after_in_child=_abandon_all)


def is_possible(wanted: WakeLatency, device: str = DEVICE) -> bool:
    """Return whether CPUs are to be kept awake, and can be."""
    if wanted is WakeLatency.NEVER or (wanted is WakeLatency.AUTO and not _helps()):
        return False
    return _error(device) is None


def _helps() -> bool:
    """Return whether keeping CPUs awake has an effect, and few of them poll without need.

    Without a cpuidle driver, the kernel's idle loop does not look at the latency (kernel/sched/idle.c,
    cpuidle_idle_call()).
    """
    try:
        driver = DRIVER.read_text().strip()
    except OSError:
        return False
    return driver != "none" and (os.cpu_count() or 1) <= _MOST_CPUS


def check(wanted: WakeLatency, device: str = DEVICE) -> None:
    """Check that CPUs can be kept awake if *wanted* demands it.

    Raises:
        HostError: they cannot.
    """
    error = _error(device) if wanted is WakeLatency.HOLD else None
    if error is not None:
        hint = "" if os.geteuid() == 0 else "; this needs root"
        raise HostError(f"--wake-latency hold is not possible: {device}: {error.strerror}{hint}; use auto or never")


def _error(device: str) -> OSError | None:
    """Return the error of opening *device*, or None."""
    try:
        os.close(os.open(device, os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        return error
    return None
