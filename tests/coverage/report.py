"""Makes the file that lines are recorded in, and says in the end which were run.

`python -m tests.coverage.report prepare DIRECTORY`, then run tests with PYTHONPATH=tests/coverage and
LINES_RUN=DIRECTORY, then `python -m tests.coverage.report show DIRECTORY`. Its last line is a summary.
"""

from __future__ import annotations

import sys
from pathlib import Path

import coverage

CHECKOUT = Path(__file__).parents[2]
PACKAGES = ("llloop", "workers")


def prepare(directory: Path) -> None:
    """Make the index of all lines, and a file with a byte for each."""
    size = 0
    entries = []
    for path in sorted(path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py")):
        entries.append(f"{size} {path}\n")
        size += len(path.read_bytes().splitlines()) + 2  # lines count from 1; an empty file has one
    (directory / "index").write_text(f"{size}\n{''.join(entries)}")
    (directory / "run").write_bytes(bytes(size))
    (directory / "run").chmod(0o666)  # some of what tests start runs as another user


def lines_run(directory: Path) -> dict[str, list[int]]:
    """The numbers of the lines that were run, by file."""
    size, *entries = (directory / "index").read_text().splitlines()
    starts = [(int(start), path) for start, _, path in (entry.partition(" ") for entry in entries)]
    run = (directory / "run").read_bytes()
    ends = [start for start, _ in starts[1:]] + [int(size)]
    return {
        path: [line - start for line in range(start, end) if run[line]]
        for (start, path), end in zip(starts, ends, strict=True)
    }


def show(directory: Path) -> None:
    """Print what is missing in each file, and then a summary in one line."""
    measured = coverage.Coverage(data_file=None, config_file=False, source=[str(CHECKOUT / name) for name in PACKAGES])
    measured.get_data().add_lines(lines_run(directory))
    share = measured.report(show_missing=True, skip_covered=True, file=sys.stdout)
    print(f"{share:.1f} % of the lines")


if __name__ == "__main__":
    {"prepare": prepare, "show": show}[sys.argv[1]](Path(sys.argv[2]))
