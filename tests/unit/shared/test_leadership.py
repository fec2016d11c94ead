"""Which of several threads serves while system calls block others."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from llloop.shared.leadership import Leadership, Postponed
from tests.server_processes import wait_until

TIMEOUT = 10.0


class Server:
    """Serves numbers from a queue. Each is one call; calls of negative numbers block until `let_go`."""

    def __init__(self, most: int) -> None:
        self.leadership = Leadership(most)
        self.leadership.on_new_leader = self._set_aside
        self.at_hand: int | None = None
        self.aside: list[int | None] = []
        self.finished: list[int] = []
        self.requests: queue.Queue[int | None] = queue.Queue()
        self.served: list[int] = []
        self.postponed: list[int] = []
        self.held: dict[int, threading.Event] = {}
        self.entered = 0
        self._at_work = 0
        self._thread = threading.Thread(target=self.leadership.run, args=(self._serve,))
        self._thread.start()

    def _set_aside(self) -> None:
        self.aside.append(self.at_hand)
        self.at_hand = None

    def _serve(self, thread: int) -> bool:
        while True:
            request = self.leadership.wait(self.requests.get)
            if request is None:
                return True
            self._at_work += 1
            assert self._at_work == 1, "two threads are at work at a time"
            self.at_hand = request
            self._at_work -= 1
            try:
                self.leadership.call(self._do, request)
                self.leadership.call(lambda: None)
                self.served.append(request)
            except Postponed:
                self.postponed.append(request)
            if self.leadership.stalled and not self.leadership.is_leader:
                self.finished.append(request)
                self.leadership.become_follower()
                return False

    def _do(self, request: int) -> None:
        if request < 0:
            self.entered += 1
            assert self.held.setdefault(request, threading.Event()).wait(TIMEOUT)

    def hold(self, *requests: int) -> None:
        """Have requests held up, each by a thread."""
        for request in requests:
            entered = self.entered
            self.held.setdefault(request, threading.Event())
            self.requests.put(request)
            assert wait_until(lambda: self.entered > entered)  # noqa: B023

    def serve(self, request: int) -> None:
        """Have a request served."""
        self.requests.put(request)
        assert wait_until(lambda: request in self.served)

    def let_go(self, request: int) -> None:
        self.held[request].set()

    def end(self) -> None:
        self.requests.put(None)
        for event in self.held.values():
            event.set()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    own = Server(getattr(request, "param", 4))
    yield own
    own.end()


def test_one_thread_serves_if_no_call_blocks(server: Server) -> None:
    for number in range(20):
        server.serve(number)
    assert server.leadership.stalled == 0
    assert server.served == list(range(20))


def test_other_requests_are_served_while_a_call_blocks(server: Server) -> None:
    server.hold(-1)
    server.serve(1)
    server.hold(-2)
    server.serve(2)
    assert server.served == [1, 2]
    server.let_go(-2)
    assert wait_until(lambda: -2 in server.served)
    server.let_go(-1)
    assert wait_until(lambda: -1 in server.served)
    assert wait_until(lambda: server.leadership.stalled == 0)
    assert server.aside == [-1, -2]
    assert sorted(server.finished) == [-2, -1]


def test_stalled_threads_serve_again(server: Server) -> None:
    for number in range(1, 10):
        server.hold(-number)
        server.serve(number)
        server.let_go(-number)
        assert wait_until(lambda: server.leadership.stalled == 0)
    assert threading.active_count() < 10


@pytest.mark.parametrize("server", [3], indirect=True)
def test_last_thread_makes_no_call(server: Server) -> None:
    server.hold(-1, -2)
    assert wait_until(lambda: server.leadership.in_last_thread)
    for number in (3, 4):
        server.requests.put(number)
    assert wait_until(lambda: server.postponed == [3, 4])
    assert server.served == []
    server.let_go(-1)
    assert wait_until(lambda: not server.leadership.in_last_thread)
    server.serve(5)


def test_followers_sleep_without_calls(server: Server) -> None:
    server.serve(1)
    assert wait_until(lambda: server.leadership.idle)
    server.hold(-1)
    server.serve(2)


def test_error_of_a_call_is_raised_to_its_caller(server: Server) -> None:
    with pytest.raises(ZeroDivisionError):
        Leadership().call(lambda: 1 // 0)


def test_run_ends_although_a_thread_is_stalled(server: Server) -> None:
    server.hold(-1)
    server.serve(1)
    server.requests.put(None)
    assert wait_until(lambda: server.leadership.ended)


def test_uses_knows_the_descriptors_of_calls_under_way(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    leadership = server.leadership
    gate = threading.Event()

    def wait(*arguments: object, dir_fd: int = -1) -> None:
        assert gate.wait(TIMEOUT)

    monkeypatch.setattr(
        server, "_do", lambda request: leadership.call(wait, 70, b"name", "/proc/self/fd/71", dir_fd=72)
    )
    server.requests.put(1)
    assert wait_until(lambda: leadership.stalled == 1)
    assert [fd for fd in range(100) if leadership.is_in_use(fd)] == [70, 71, 72]
    gate.set()
    assert wait_until(lambda: leadership.stalled == 0)
    assert not leadership.is_in_use(70)
