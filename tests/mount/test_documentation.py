"""The examples in README and docs/ work as shown; the documentation is complete and its links are valid."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest

from llloop.cli.main import main
from llloop.errors import LlloopError
from llloop.front.nowait import LONE_WRITE_LIMIT, READ_LIMIT, WRITE_LIMIT
from llloop.linux import syscalls
from llloop.linux.credentials import FRONT_CAPABILITIES, WORKER_CAPABILITIES
from llloop.shared import negotiation
from llloop.shared.negotiation import MAX_BACKGROUND, MAX_BACKGROUND_COLLECTED
from llloop.supervisor.child import LONGEST_PAUSE
from llloop.supervisor.unmounting import GRACE
from llloop.workers.replies import COPY_LIMIT
from tests.mount.command_line import environment, wait_until
from tests.server import reachable_directory, remove_tree
from tests.watchdog import abort_connection, kill_session, unescaped, unmount_lazily

CHECKOUT = Path(__file__).parents[2]
PAGES = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md")])
TEXT = {page.name: page.read_text() for page in PAGES}
BLOCK = re.compile(r"^<!-- test: ([\w-]+)((?:, [\w. -]+)*) -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = 40.0
# A separator between the outputs of two commands; no example prints it.
MARK = "\x1e"
# The next command of the example may use the exit code of the last.
KEEPING_STATUS = f"{{ status=$?; printf '{MARK}'; (exit $status); }}\n"


@dataclass
class Example:
    """The commands and the output of all blocks with one name."""

    as_root: bool = False
    files: dict[str, str] = field(default_factory=dict)
    commands: list[tuple[str, str]] = field(default_factory=list)

    def take(self, remarks: list[str], text: str) -> None:
        names = [remark for remark in remarks if remark != "as root"]
        self.as_root = self.as_root or "as root" in remarks
        if names:
            self.files[names[0]] = text
            return
        command, output = "", ""
        for line in text.splitlines(keepends=True):
            if line.startswith("$ "):
                if command:
                    self.commands.append((command, output))
                command, output = line[2:], ""
            else:
                assert command, f"output before the first command: {line}"
                output += line
        self.commands.append((command, output))


def examples() -> dict[str, Example]:
    found: dict[str, Example] = {}
    for page in TEXT.values():
        for name, remarks, _, text in BLOCK.findall(page):
            found.setdefault(name, Example()).take([part for part in remarks.split(", ") if part], text)
    return found


EXAMPLES = examples()


def matches(expected: str, found: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    return re.fullmatch(pattern, found, re.DOTALL) is not None


def mounts_below(directory: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    mountpoints = [unescaped(line.split(" ")[4]) for line in lines]
    return [mountpoint for mountpoint in mountpoints if mountpoint.startswith(f"{directory}/")]


def users_of(directory: Path) -> list[int]:
    """The processes that have something open below the directory, as every process of a mount of it has."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and int(entry) != os.getpid():
                links = [os.readlink(f"/proc/{entry}/fd/{fd}") for fd in os.listdir(f"/proc/{entry}/fd")]
                if any(link.startswith(f"{directory}/") for link in links):
                    found.append(int(entry))
    return found


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory with the commands of the examples beside it; whatever is left mounted there is taken away."""
    holder = reachable_directory("llloop-readme-")
    (holder / "bin").mkdir()
    for name, arguments in {"llloop": "-m llloop", "python": ""}.items():
        command = holder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        command.chmod(0o755)
    directory = holder / "here"
    directory.mkdir()
    try:
        yield directory
    finally:
        for mountpoint in mounts_below(holder):
            abort_connection(mountpoint)
            unmount_lazily(mountpoint)
        if not mounts_below(holder):
            remove_tree(holder)


def run(example: Example, directory: Path) -> list[str]:
    """What each command printed, on standard output and standard error together."""
    for name, text in example.files.items():
        (directory / name).write_text(text)
    script = "".join(f"{command}{KEEPING_STATUS}" for command, _ in example.commands)
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=directory,
        env={
            **environment(),
            "PATH": f"{directory.parent}/bin:{os.environ['PATH']}",
            "LC_ALL": "C.UTF-8",
            # Ignore messages of level INFO: they depend on the machine's limits and on other programs.
            "LLLOOP_SERVE_LOG_LEVEL": "warning",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        kill_session(process.pid)
        process.wait()
    return output.decode(errors="replace").split(MARK)[:-1]


@pytest.mark.mounted
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.root] if one.as_root else []) for name, one in EXAMPLES.items()]
)
def test_example_does_what_it_shows(name: str, place: Path, via: str) -> None:
    if via == "llfuse":
        pytest.skip("the examples start the default loop: this would be the same again")
    example = EXAMPLES[name]
    outputs = run(example, place)
    assert len(outputs) == len(example.commands)
    for (command, expected), found in zip(example.commands, outputs, strict=True):
        assert matches(expected, found), f"$ {command}shown: {expected!r}\nfound: {found!r}"
    assert mounts_below(place) == []
    wait_until(lambda: not users_of(place), "the processes of the example's mounts end", 10)


def test_examples_exist() -> None:
    assert {"readme", "tour", "namespace", "sandbox", "front", "supervisor", "inside", "report"} <= set(EXAMPLES)
    for name, text in TEXT.items():
        assert text.count("<!-- test:") == len(BLOCK.findall(text)), f"{name}: a marked block is not understood"


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_is_on_one_page(name: str) -> None:
    pages = [page for page, text in TEXT.items() if f"<!-- test: {name} -->" in text or f"<!-- test: {name}," in text]
    assert len(pages) == 1, pages


@pytest.mark.parametrize("command", ["umount", "status", "stats"])
def test_documentation_explains_each_option(command: str) -> None:
    text = TEXT["commands.md"] + TEXT["monitoring.md"]
    parameters = main.commands[command].params
    options = [one for one in parameters if isinstance(one, click.Option) and not one.hidden]
    assert options
    for one in options:
        for spelling in [*one.opts, *one.secondary_opts]:
            assert re.search(rf"^- `{spelling}\b", text, re.MULTILINE), f"{spelling} has no entry"


def test_documentation_lists_each_exit_code() -> None:
    table = dict(re.findall(r"^\| (\d) \| (.+) \|$", TEXT["commands.md"], re.MULTILINE))
    kinds: list[type[LlloopError]] = [LlloopError, *LlloopError.__subclasses__()]
    assert set(table) == {"0", *(str(kind.exit_code) for kind in kinds)}
    shown = dict(re.findall(r"^  (\d)  (.+)$", str(main.epilog), re.MULTILINE))
    assert shown == table


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_are_valid(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        path = (page.parent / target) if target else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors_of(path), f"{page.name} links to {target}#{anchor}"


def test_readme_is_short() -> None:
    assert len(TEXT["README.md"].splitlines()) <= 200


def test_each_page_is_in_the_navigation() -> None:
    navigation = (CHECKOUT / "scripts" / "mkdocs.yml").read_text()
    for page in CHECKOUT.glob("docs/*.md"):
        assert re.search(rf"(?:- |: ){page.name}$", navigation, re.MULTILINE), page.name


def names_in(text: str) -> set[str]:
    """What stands between backquotes, outside of code blocks."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)))


def test_the_architecture_names_what_there_is() -> None:
    """Files, directories, and methods of classes (`Class.method`)."""
    names = names_in(TEXT["architecture.md"])
    places = {name for name in names if re.fullmatch(r"(llloop|workers|tests|scripts)/[\w./]*", name)}
    assert len(places) > 20
    assert [place for place in sorted(places) if not (CHECKOUT / place).exists()] == []
    found = set()
    for path in [path for top in ("llloop", "workers") for path in (CHECKOUT / top).rglob("*.py")]:
        for one in ast.walk(ast.parse(path.read_text())):
            if isinstance(one, ast.ClassDef):
                found |= {
                    one.name,
                    *(f"{one.name}.{part.name}" for part in one.body if isinstance(part, ast.FunctionDef)),
                }
    named = {name for name in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*(\.\w+)?", name)}
    assert len(named) > 10
    assert named <= found, named - found


def test_each_test_of_a_claim_exists() -> None:
    named = [name for name in names_in(TEXT["claims.md"]) if name.startswith("tests/")]
    assert len(named) > 30
    for name in named:
        file, _, function = name.partition("::")
        assert (CHECKOUT / file).exists(), name
        assert not function or f"def {function}(" in (CHECKOUT / file).read_text(), name


def test_troubleshooting_quotes_messages_that_exist() -> None:
    sources = " ".join(path.read_text() for path in (CHECKOUT / "llloop").rglob("*.py"))
    known = {os.strerror(number) for number in errno.errorcode}
    headings = re.findall(r"^## (.*)$", TEXT["troubleshooting.md"], re.MULTILINE)
    messages = [message for heading in headings for message in re.findall(r"^`([^`]+)`", heading)]
    assert len(messages) > 8
    for message in messages:
        # Text in parentheses is the text of an errno. The name of a constant stands for its value.
        text = message.partition(" (")[0].replace("/dev/fuse ", "{DEVICE} ").replace("/etc/fuse.conf", "{FUSE_CONF}")
        assert message in known or text in sources, message


def test_the_capabilities_are_those_that_the_processes_keep() -> None:
    table = re.findall(r"^\| (front|worker) \| (.*) \|$", TEXT["security.md"], re.MULTILINE)
    for process, kept in (("front", FRONT_CAPABILITIES), ("worker", WORKER_CAPABILITIES)):
        names = re.findall(r"`(\w+)`", dict(table)[process])
        assert sum(1 << getattr(syscalls, f"CAP_{name}") for name in names) == kept, process


@pytest.mark.parametrize(
    ("page", "text", "values"),
    [
        ("architecture", "reads of up to {} KiB and writes of up to {} KiB", (READ_LIMIT >> 10, WRITE_LIMIT >> 10)),
        ("architecture", "the front also does writes of up to {} KiB", (LONE_WRITE_LIMIT >> 10,)),
        ("architecture", "For reads of up to {} KiB the worker copies", (COPY_LIMIT >> 10,)),
        ("architecture", "requests of {} KiB instead of 128 KiB", (negotiation.MAX_WRITE >> 10,)),
        ("recovery", "{} requests, and {} requests with `--writeback`", (MAX_BACKGROUND, MAX_BACKGROUND_COLLECTED)),
        ("recovery", "it waits before each restart, at most {:g} seconds", (LONGEST_PAUSE,)),
        ("commands", "These programs may continue for {:g} seconds", (GRACE,)),
    ],
)
def test_the_numbers_are_those_of_the_code(page: str, text: str, values: tuple[float, ...]) -> None:
    assert text.format(*values) in " ".join(TEXT[f"{page}.md"].split())
