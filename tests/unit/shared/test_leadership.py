"""Which of several threads serves while system calls hold others up."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from llloop.shared.leadership import Leadership, Postponed
from tests.server_processes import wait_until

PATIENCE = 10.0


class InHand:
    """One value that stands for what belongs to a request."""

    def __init__(self) -> None:
        self.value: Any = None
        self.done: list[Any] = []

    def set_aside(self, thread: int) -> Any:
        aside, self.value = self.value, None
        return aside

    def exchange(self, other: Any) -> Any:
        mine, self.value = self.value, other
        return mine

    def finished(self) -> None:
        self.done.append(self.value)


class Server:
    """Serves numbers that come in a queue: each is one call, in which the negative ones stay until they are let go."""

    def __init__(self, most: int) -> None:
        self.in_hand = InHand()
        self.leadership = Leadership(self.in_hand, most)
        self.requests: queue.Queue[int | None] = queue.Queue()
        self.served: list[int] = []
        self.postponed: list[int] = []
        self.held: dict[int, threading.Event] = {}
        self.entered = 0
        self._at_work = 0
        self._thread = threading.Thread(target=self.leadership.run, args=(self._serve,))
        self._thread.start()

    def _serve(self) -> bool:
        while True:
            request = self.leadership.wait(self.requests.get)
            if request is None:
                return True
            self._at_work += 1
            assert self._at_work == 1, "two threads are at work at a time"
            self.in_hand.value = request
            self._at_work -= 1
            try:
                self.leadership.call(self._do, request)
                self.leadership.call(lambda: None)
                assert self.in_hand.value == request
                self.served.append(request)
            except Postponed:
                self.postponed.append(request)
            if self.leadership.stalled and self.leadership.must_leave():
                return False

    def _do(self, request: int) -> None:
        if request < 0:
            self.entered += 1
            assert self.held.setdefault(request, threading.Event()).wait(PATIENCE)

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
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    own = Server(getattr(request, "param", 4))
    yield own
    own.end()


def test_what_holds_nothing_up_is_served_by_one_thread(server: Server) -> None:
    for number in range(20):
        server.serve(number)
    assert server.leadership.stalled == 0
    assert server.served == list(range(20))


def test_others_are_served_while_a_call_takes_long(server: Server) -> None:
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
    assert sorted(server.in_hand.done) == [-2, -1], "what belonged to each came back to it"


def test_threads_that_were_held_up_serve_again(server: Server) -> None:
    for number in range(1, 10):
        server.hold(-number)
        server.serve(number)
        server.let_go(-number)
        assert wait_until(lambda: server.leadership.stalled == 0)
    assert threading.active_count() < 10


@pytest.mark.parametrize("server", [3], indirect=True)
def test_the_last_thread_makes_no_call(server: Server) -> None:
    server.hold(-1, -2)
    assert wait_until(lambda: server.leadership.alone)
    for number in (3, 4):
        server.requests.put(number)
    assert wait_until(lambda: server.postponed == [3, 4])
    assert server.served == []
    server.let_go(-1)
    assert wait_until(lambda: not server.leadership.alone)
    server.serve(5)


def test_followers_sleep_while_there_is_nothing_to_do(server: Server) -> None:
    server.serve(1)
    assert wait_until(lambda: server.leadership._resting)
    server.hold(-1)
    server.serve(2)


def test_a_call_that_fails_is_told_to_who_made_it(server: Server) -> None:
    with pytest.raises(ZeroDivisionError):
        Leadership().call(lambda: 1 // 0)


def test_it_ends_though_a_thread_is_held_up(server: Server) -> None:
    server.hold(-1)
    server.serve(1)
    server.requests.put(None)
    assert wait_until(lambda: server.leadership._ended)


def test_descriptors_are_closed_once_every_call_that_could_use_them_has_begun(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that waits for a lock or a processor has not begun its system call, and is replaced all the same."""
    leadership = server.leadership
    assert leadership.may_close()
    server.hold(-1)
    assert wait_until(lambda: leadership.stalled == 1)
    assert not leadership.may_close()
    server.let_go(-1)
    assert wait_until(lambda: leadership.stalled == 0)
    reader, writer = os.pipe()
    try:
        monkeypatch.setattr(server, "_do", lambda request: os.read(reader, 1))
        server.requests.put(1)
        assert wait_until(lambda: leadership.stalled == 1 and leadership.may_close())
        monkeypatch.undo()
    finally:
        os.write(writer, b"x")
        assert wait_until(lambda: leadership.stalled == 0)
        os.close(reader)
        os.close(writer)
