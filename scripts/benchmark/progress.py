"""Progress messages on standard error."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line that is overwritten on a terminal; in a log, a new line from time to time."""

    def __init__(self) -> None:
        """Start the clock."""
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._last = ""
        self._width = 0

    def say(self, text: str) -> None:
        """Write a message that is not overwritten."""
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def step(self, done: int, total: int, group: str, detail: str) -> None:
        """Show the progress.

        Args:
            done: the number of finished steps.
            total: the number of all steps.
            group: text that changes seldom, such as round and workload.
            detail: text that changes often, such as the contender.
        """
        elapsed = time.monotonic() - self._start
        left = f", {_clock(elapsed / done * (total - done))} left" if done else ""
        line = f"[{done * 100 // total:3}%] {group}"
        if self._terminal:
            line = f"{line}, {detail}{left}"
            print(f"\r{line:{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(line)
        elif group != self._last:
            print(f"{line}{left}", file=sys.stderr, flush=True)
            self._last = group

    def clear(self) -> None:
        """Remove the current line."""
        if self._terminal and self._width:
            print(f"\r{'':{self._width}}\r", end="", file=sys.stderr, flush=True)
            self._width = 0


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"
