"""The rounds: every workload on every contender, again and again, in an order that gives nobody the better place."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .bench import Bench
from .progress import Progress
from .site import Failed, Sample, Site
from .tools import Unavailable
from .workloads import REQUESTS, Workload


@dataclass(slots=True)
class Results:
    """What was measured.

    Attributes:
        samples: by workload and contender, one for each round.
        failures: by workload and contender, why there is no sample, or fewer.
        rounds: how many were completed, or begun if none was.
    """

    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    rounds: int = 0


class Meter:
    """Measures workloads on the contenders of a bench."""

    def __init__(self, bench: Bench, load: Path, progress: Progress) -> None:
        """Prepare.

        Args:
            bench: what is mounted.
            load: the compiled load generator.
            progress: told how far it is.
        """
        self._bench = bench
        self._load = load
        self._progress = progress
        self._runs = 0
        self._cpus = os.sched_getaffinity(0)

    def rounds(self, workloads: Sequence[Workload], count: int, budget: float | None) -> Results:
        """Measure all of them.

        Args:
            workloads: in the order in which they are to be run.
            count: how many rounds.
            budget: seconds after which no further round is begun that would not end in time.
        """
        results = Results()
        start = time.monotonic()
        for number in range(count):
            if number and budget and (time.monotonic() - start) * (number + 1) / number > budget:
                break
            self._round(number, count, workloads, results)
            results.rounds += 1
        self._progress.clear()
        return results

    def _round(self, number: int, count: int, workloads: Sequence[Workload], results: Results) -> None:
        names = list(self._bench.servers)
        total = count * len(workloads) * len(names)
        for index, workload in enumerate(workloads):
            # Rotated by workload too, so that the one who follows a heavy contender is not always the same.
            turn = (number + index) % len(names)
            for place, name in enumerate(names[turn:] + names[:turn]):
                done = (number * len(workloads) + index) * len(names) + place
                self._progress.step(done, total, f"round {number + 1} of {count}, {workload.name}", name)
                if name in self._bench.servers:
                    self._measure(workload, name, results)

    def _measure(self, workload: Workload, name: str, results: Results) -> None:
        try:
            sample = self.once(workload, name)
        except Failed as reason:
            server = self._bench.servers[name]
            dead = "" if server.alive() else f" (the server ended: {server.last_words()})"
            results.failures.setdefault(workload.name, {})[name] = f"{reason}{dead}"
            self._progress.say(f"{workload.name} on {name}: {reason}{dead}")
            if dead:
                try:
                    self._bench.restart(name)
                except Unavailable as error:
                    self._bench.skipped[name] = f"ended, and could not be served again: {error}"
        else:
            results.samples.setdefault(workload.name, {}).setdefault(name, []).append(sample)

    def once(self, workload: Workload, name: str) -> Sample:
        """Run a workload once on a contender.

        Raises:
            Failed: if it does not get through.
        """
        self._runs += 1
        # The last CPU: the first one takes most interrupts.
        cpus = {max(self._cpus)} if workload.kind == REQUESTS else self._cpus
        bench = self._bench
        site = Site(bench.servers[name], bench.source, bench.sizes, self._load, cpus, self._runs)
        try:
            workload.run(site)
        finally:
            site.close()
        return site.sample
