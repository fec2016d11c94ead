"""Makes the files that lines are recorded in, and says in the end which were run.

`python -m tests.coverage.report prepare DIRECTORY`, then run tests with PYTHONPATH=tests/coverage and
LINES_RUN=DIRECTORY, then `python -m tests.coverage.report show DIRECTORY`. Its last line is a summary.
"""

from __future__ import annotations

import ast
import marshal
import sys
from collections.abc import Iterator
from pathlib import Path

import coverage

CHECKOUT = Path(__file__).parents[2]
PACKAGES = ("llloop", "workers")


class Recording(ast.NodeTransformer):
    """Inserts before each statement a store that records its line.

    Args:
        start: the place of the file's line 0 in the record of all lines.
    """

    def __init__(self, start: int) -> None:
        self._start = start

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):  # the body of a lambda is no list
                setattr(node, name, list(self._recorded(statements)))
        if isinstance(node, ast.ExceptHandler):
            node.body.insert(0, self._store(node.lineno))
        return node

    def _recorded(self, statements: list[ast.stmt]) -> Iterator[ast.stmt]:
        # What has to stand at the beginning is recorded behind that.
        leading = next((n for n, statement in enumerate(statements) if not _must_lead(statement)), len(statements))
        yield from statements[:leading]
        for number, statement in enumerate(statements):
            decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
            yield from (self._store(decorator.lineno) for decorator in decorators)
            yield self._store(statement.lineno)
            if number >= leading:
                yield statement

    def _store(self, line: int) -> ast.stmt:
        (store,) = ast.parse(f"lines_run[{self._start + line}] = 1").body
        for node in ast.walk(store):
            if hasattr(node, "lineno"):
                vars(node).update(lineno=line, end_lineno=line)
        return store


def _must_lead(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "__future__"
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def prepare(directory: Path) -> None:
    """Make the index of all lines, a file with a byte for each, and the modules that record them."""
    size = 0
    entries = []
    for path in sorted(path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py")):
        source = path.read_bytes()
        recording = Recording(size).visit(ast.parse(source))
        (directory / str(size)).write_bytes(marshal.dumps(compile(recording, path, "exec", dont_inherit=True)))
        entries.append(f"{size} {path}\n")
        size += len(source.splitlines()) + 2  # lines count from 1; an empty file has one
    (directory / "index").write_text(f"{size} {sys.implementation.cache_tag}\n{''.join(entries)}")
    (directory / "run").write_bytes(bytes(size))
    (directory / "run").chmod(0o666)  # some of what tests start runs as another user


def lines_run(directory: Path) -> dict[str, list[int]]:
    """The numbers of the lines that were run, by file."""
    _, *entries = (directory / "index").read_text().splitlines()
    starts = [(int(start), path) for start, _, path in (entry.partition(" ") for entry in entries)]
    run = (directory / "run").read_bytes()
    ends = [start for start, _ in starts[1:]] + [len(run)]
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
