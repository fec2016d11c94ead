"""Fixtures of all tests: a shared mount with a directory for each test, and mounts with other options."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from tests import expect
from tests.server import Server, Tree, reachable_directory, remove_tree
from tests.watchdog import Watchdog

DEFAULT_TIMEOUT = 60.0
MARKERS = (
    "root: needs to be root",
    "user: of interest as an ordinary user too",
    "mounted: says nothing about a plain directory, left out with --via native",
    "own_loop: only llloop's own request loop can do it",
    "by_workers: of I/O that passes through llloop, left out with --serve-option=--io=kernel",
    "at_once(reason): needs what --writeback does not promise, left out with --serve-option=--writeback",
    "within_a_second: of changes in the source that --cache=always does not look for, left out with that option",
    "slow: takes many seconds",
)


class Serve(Protocol):
    def __call__(
        self,
        *arguments: str,
        source: Path | None = None,
        env: Mapping[str, str] | None = None,
        command: list[str] | None = None,
    ) -> Server: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--via",
        choices=["own", "llfuse", "native"],
        default="own",
        help="own: llloop as it is; llfuse: its fallback through llfuse.main(); native: no mount, the tests themselves",
    )
    parser.addoption(
        "--serve-option", action="append", default=[], metavar="STR", help="a further argument of every llloop serve"
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    expect.collecting = "--writeback" in config.getoption("--serve-option")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    via = config.getoption("--via")
    for item in items:
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("own_loop") and via == "llfuse":
            item.add_marker(pytest.mark.skip(reason="only llloop's own loop can do this"))
        if item.get_closest_marker("by_workers") and "--io=kernel" in config.getoption("--serve-option"):
            item.add_marker(pytest.mark.skip(reason="the kernel does the I/O itself, and this its own way"))
        if item.get_closest_marker("within_a_second") and "--cache=always" in config.getoption("--serve-option"):
            item.add_marker(pytest.mark.skip(reason="the kernel keeps names and attributes for a day"))
        at_once = item.get_closest_marker("at_once")
        if at_once and "--writeback" in config.getoption("--serve-option"):
            item.add_marker(pytest.mark.skip(reason=at_once.args[0]))
        if item.get_closest_marker("mounted") and via == "native":
            item.add_marker(pytest.mark.skip(reason="says nothing about a plain directory"))


def timeout_of(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    if marker:
        value = marker.args[0] if marker.args else marker.kwargs.get("timeout")
    else:
        value = item.config.getoption("timeout", None)
        if value is None and item.config.pluginmanager.hasplugin("timeout"):
            value = item.config.getini("timeout")
    return float(value) if value else DEFAULT_TIMEOUT


WATCHDOG = pytest.StashKey[Watchdog]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if WATCHDOG in item.config.stash:
        item.config.stash[WATCHDOG].expect_within(timeout_of(item) + 2)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    # Set it again, because the setup of the first test has just started the watchdog.
    if WATCHDOG in item.config.stash:
        item.config.stash[WATCHDOG].expect_within(timeout_of(item) + 2)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if WATCHDOG in item.config.stash:
        item.config.stash[WATCHDOG].expect_within(DEFAULT_TIMEOUT)


@pytest.fixture(scope="session")
def watchdog(request: pytest.FixtureRequest) -> Iterator[Watchdog]:
    dog = Watchdog()
    request.config.stash[WATCHDOG] = dog
    dog.expect_within(DEFAULT_TIMEOUT)
    try:
        yield dog
    finally:
        del request.config.stash[WATCHDOG]
        dog.close()


@pytest.fixture(scope="session", autouse=True)
def common_umask() -> Iterator[None]:
    previous = os.umask(0o022)
    yield
    os.umask(previous)


@pytest.fixture(scope="session")
def via(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--via"))


@pytest.fixture(scope="session")
def serve_options(request: pytest.FixtureRequest) -> list[str]:
    return list(request.config.getoption("--serve-option"))


@contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
        server.stop()
    finally:
        server.clean_up()
        server.forget_files()


def skip_contradiction(arguments: Iterable[str]) -> None:
    if {"--io=kernel", "--writeback"} <= {*arguments}:
        pytest.skip("--writeback and --io=kernel exclude each other")


@pytest.fixture(scope="session")
def servers(via: str, serve_options: list[str], watchdog: Watchdog) -> Iterator[Callable[..., Server]]:
    """The mounts that tests share: one for each set of options."""
    started: dict[tuple[str, ...], Server] = {}
    with ExitStack() as stack:

        def with_options(*arguments: str) -> Server:
            skip_contradiction([*serve_options, *arguments])
            if arguments not in started:
                own = Server.prepare(via, watchdog, [*serve_options, *arguments])
                started[arguments] = stack.enter_context(running(own))
            return started[arguments]

        yield with_options


@pytest.fixture(scope="session")
def server(servers: Callable[..., Server]) -> Server:
    """The mount that most tests share."""
    return servers()


@pytest.fixture(scope="session")
def disk_server(via: str, serve_options: list[str], watchdog: Watchdog) -> Iterator[Server]:
    """A second shared mount, whose source is mostly on a disk (O_DIRECT, blocks) instead of in RAM."""
    holder = reachable_directory("llloop-source-", "/var/tmp")
    try:
        with running(Server.prepare(via, watchdog, serve_options, source=holder)) as shared:
            yield shared
    finally:
        remove_tree(holder)


_numbers = itertools.count(1)


@contextmanager
def fresh_directory(server: Server, test: str) -> Iterator[Tree]:
    if not server.alive():
        # Another test ended it and failed because of that. This test must not fail, too.
        server.clean_up()
        server.start()
    name = f"{re.sub('[^A-Za-z0-9_]+', '-', test)[:80]}-{next(_numbers)}"
    own = Tree(server.source / name, server.mountpoint / name, server)
    own.src.mkdir(mode=0o755)
    yield own
    assert server.alive(), f"the server ended during the test\n{server.all_output()}"
    remove_tree(own.src)
    server.check_log()


@pytest.fixture
def tree(server: Server, request: pytest.FixtureRequest) -> Iterator[Tree]:
    """A new directory in the shared mount."""
    with fresh_directory(server, request.node.name) as own:
        yield own


@pytest.fixture
def tree_with(servers: Callable[..., Server], request: pytest.FixtureRequest) -> Iterator[Callable[..., Tree]]:
    """Makes new directories in mounts with the options given, which tests with the same options share."""
    with ExitStack() as stack:
        yield lambda *options: stack.enter_context(fresh_directory(servers(*options), request.node.name))


@pytest.fixture(params=["server", "disk_server"], ids=["shared", "disk"])
def tree_of_each(request: pytest.FixtureRequest) -> Iterator[Tree]:
    """A new directory in the shared mount, and in a second run in the one whose source is on a disk."""
    with fresh_directory(request.getfixturevalue(request.param), request.node.name) as own:
        yield own


@pytest.fixture
def serve(via: str, serve_options: list[str], watchdog: Watchdog) -> Iterator[Serve]:
    """Starts mounts for the test; stops and checks them at its end."""
    started: list[Server] = []

    def start(
        *arguments: str,
        source: Path | None = None,
        env: Mapping[str, str] | None = None,
        command: list[str] | None = None,
    ) -> Server:
        skip_contradiction([*serve_options, *arguments])
        own = Server.prepare(via, watchdog, [*serve_options, *arguments], source, command, env)
        started.append(own)
        own.start()
        return own

    try:
        yield start
        for own in started:
            own.stop()
    finally:
        for own in started:
            own.clean_up()
            own.forget_files()
