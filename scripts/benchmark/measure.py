"""The rounds: every workload on every contender, several times. The order changes, so it favours no contender."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .bench import Bench
from .progress import Progress
from .site import Failed, Sample, Site
from .workloads import Workload


@dataclass(slots=True)
class Results:
    """The results of a measurement.

    Attributes:
        samples: for each workload and contender, one sample for each round.
        failures: for each workload and contender, why samples are missing.
        rounds: how many rounds were begun.
    """

    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)
    rounds: int = 0


class Meter:
    """Measures workloads on the contenders of a bench."""

    def __init__(self, bench: Bench, load: Path, progress: Progress) -> None:
        """Prepare.

        Args:
            bench: the mounts.
            load: the compiled load generator.
            progress: shows the progress.
        """
        self._bench = bench
        self._load = load
        self._progress = progress
        self._runs = 0

    def rounds(self, workloads: Sequence[Workload], count: int, deadline: float | None = None) -> Results:
        """Measure all workloads on all contenders.

        Args:
            workloads: the workloads in their order.
            count: the number of rounds.
            deadline: when to end (monotonic clock, seconds). No round starts that would probably end later.
        """
        results = Results()
        start = time.monotonic()
        for number in range(count):
            now = time.monotonic()
            if number and deadline and now + (now - start) / number > deadline:
                break
            results.rounds += 1
            if not self._round(number, count, workloads, results, deadline):
                self._progress.say("out of time: not all workloads were run")
                break
        self._progress.clear()
        return results

    def _round(
        self, number: int, count: int, workloads: Sequence[Workload], results: Results, deadline: float | None
    ) -> bool:
        for index, workload in enumerate(workloads):
            if deadline and time.monotonic() > deadline:
                return False
            servers = self._bench.servers[workload.kind]
            names = list(servers)
            # Rotate the order by workload too, so that the contender after a heavy one changes.
            turn = (number + index) % max(1, len(names))
            for place, name in enumerate(names[turn:] + names[:turn]):
                done = (number * len(workloads) + index) * len(names) + place
                total = count * len(workloads) * len(names)
                self._progress.step(done, total, f"round {number + 1} of {count}, {workload.name}", name)
                self._measure(workload, name, results)
        return True

    def _measure(self, workload: Workload, name: str, results: Results) -> None:
        server = self._bench.servers[workload.kind][name]
        try:
            sample = self.once(workload, name)
        except Failed as failure:
            reason = str(failure)
            if not server.alive():
                reason = f"{reason}; the server ended: {server.last_words()}"
                self._bench.restart(workload.kind, name)
            results.failures.setdefault(workload.name, {})[name] = reason
            self._progress.say(f"{workload.name} on {name}: {reason}")
        else:
            results.samples.setdefault(workload.name, {}).setdefault(name, []).append(sample)

    def once(self, workload: Workload, name: str) -> Sample:
        """Run a workload once on a contender.

        Raises:
            Failed: the workload failed.
        """
        self._runs += 1
        bench = self._bench
        site = Site(bench.servers[workload.kind][name], bench.source, bench.sizes, self._load, self._runs)
        try:
            workload.run(site)
        finally:
            site.close()
        if not site.sample.work or not site.sample.seconds:
            raise Failed("too little was done to be measured")
        return site.sample
