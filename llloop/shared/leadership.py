"""The leader/followers pattern: one thread serves requests; another takes over when a system call blocks it.

The *leader* takes requests and serves them. It makes system calls that may block through `Leadership.call`: calls
that wait for a disk, a server, a frozen file system, or the freeing of a large file's blocks. A *follower* checks at
short intervals whether the leader is still in the same call. If so, the follower becomes the leader, and the blocked
thread is *stalled*. When its call returns, the stalled thread finishes its request while the new leader waits for the
next one. Then it becomes a follower.

Only the thread that holds the lock uses shared state. The leader holds the lock except during such a call and while
it waits for a request. So other code need not consider threads, with one exception: what it read before a call may be
out of date after it.

As long as no call blocks, this costs two list operations for each call, and no system call. Followers only check
while calls are made, and sleep otherwise.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from llloop.linux import syscalls

# The interval of the follower's checks in seconds. Another thread takes over after one to two intervals.
CHECK_INTERVAL = 0.004
# The interval while threads are stalled, because the next requests may well block on the same thing.
_STALLED_CHECK_INTERVAL = 0.001
# After so many checks without a call, the follower sleeps until the next call.
_CHECKS_BEFORE_SLEEP = 5
# The maximum number of threads. The last of them only serves requests that make no blocking call.
MAX_THREADS = 32

_CLONE_FS = 0x200  # <linux/sched.h>
_STACK_SIZE = 512 * 1024  # bytes

_Result = TypeVar("_Result")
# The arguments of a call, by position and by name.
_CallArguments = tuple[tuple[Any, ...], dict[str, Any]]


def _do_nothing() -> None:
    """The default of `Leadership.on_new_leader`."""


class Postponed(Exception):
    """A call was not made, because it could block the last thread. The request must be served later."""


class Leadership:
    """Decides which thread serves. Before `run`, there is only one thread.

    Attributes:
        stalled: the number of threads that were replaced and have not finished their requests.
        in_last_thread: whether the leader is the last thread: no follower is left that could take over.
        idle: whether the followers sleep until the leader's next call.
        ended: whether `run` has ended, or will end when the current request is finished.
        on_new_leader: a thread that becomes the leader calls it before it serves. The owner puts the old leader's
            current request aside there.

    Args:
        max_threads: the maximum number of threads.
    """

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self.on_new_leader: Callable[[], None] = _do_nothing
        self._max_threads = max_threads
        self.stalled = 0
        self.in_last_thread = False
        self._leader = threading.get_ident()
        self._serve: Callable[[int], bool] | None = None
        self.ended = False
        self._failure: BaseException | None = None
        # The leader appends the arguments of a call before it. Whoever pops them decides: if the leader does, it goes
        # on; if the follower does, the leader is replaced. Each new leader gets a new list.
        self._in_call: list[_CallArguments] = []
        self._calls = 0
        self._lock = threading.Lock()
        self._lock.acquire()  # held by the leader
        # The follower that holds this lock checks on the leader; the others wait for the lock.
        self._checker = threading.Lock()
        self._threads = 1
        self.idle = False
        self._wake_follower = threading.Lock()
        self._wake_follower.acquire()
        # A number for each thread, counted from 0, by its Python identifier.
        self._numbers: dict[int, int] = {}
        # The arguments of each stalled thread's current call.
        self._stalled_calls: dict[int, _CallArguments] = {}

    def run(self, serve: Callable[[int], bool]) -> None:
        """Call *serve* until it returns True.

        Args:
            serve: serves requests; its argument is the number of the calling thread, counted from 0. It returns True
                when there are no more requests, and False when its thread has called `become_follower`. One thread at a
                time calls it.

        Raises:
            BaseException: *serve* raised it, in any of the threads.
        """
        self._leader = threading.get_ident()
        self._numbers[self._leader] = 0
        self._serve = serve
        self._start_follower()
        try:
            self._take_turns(True)
        finally:
            self.ended = True
            self._wake_up()
        if self._failure is not None:
            raise self._failure

    def _take_turns(self, leading: bool) -> None:
        assert self._serve is not None
        while True:
            if not leading:
                with self._checker:
                    self._follow()
            if self.ended:
                return
            leading = False
            if self._serve(self._numbers[threading.get_ident()]):
                self.ended = True
                self._wake_up()
                if self.stalled:
                    self._lock.release()
                return

    # Called by the serving thread

    def call(self, function: Callable[..., _Result], /, *arguments: Any, **options: Any) -> _Result:
        """Call *function*, which makes a system call that may block, and return its result.

        Raises:
            Postponed: it was not called, because no follower could take over.
        """
        if self.stalled:
            if threading.get_ident() != self._leader:
                return self._call_in_stalled_thread(function, *arguments, **options)
            if self.in_last_thread:
                raise Postponed
        self._calls += 1
        mine = self._in_call
        mine.append((arguments, options))
        if self.idle:
            self._wake_up()
        try:
            return function(*arguments, **options)
        finally:
            try:
                mine.pop()
            except IndexError:
                self._finish_stalled_call()

    def call_even_in_last_thread(self, function: Callable[..., _Result], /, *arguments: Any, **options: Any) -> _Result:
        """Call *function* as `call` does, but also in the last thread.

        For calls that change nothing: a frozen file system does not block them.
        """
        if self.in_last_thread and self.is_leader:
            return function(*arguments, **options)
        return self.call(function, *arguments, **options)

    def _finish_stalled_call(self) -> None:
        """Continue with the request after a call during which another thread became the leader."""
        self._lock.acquire()
        del self._stalled_calls[threading.get_ident()]

    def _call_in_stalled_thread(self, function: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
        thread = threading.get_ident()
        self._stalled_calls[thread] = arguments, options
        self._lock.release()
        try:
            return function(*arguments, **options)
        finally:
            self._lock.acquire()
            del self._stalled_calls[thread]

    def is_in_use(self, fd: int) -> bool:
        """Return whether a call of a stalled thread has *fd* among its arguments, also as /proc/self/fd/N.

        Such a descriptor must stay open. A thread that gets no processor is replaced before its system call has begun,
        and some calls look up a descriptor only after they have slept (renameat(2) in a directory of a file server).
        If the number were another file's by then, the call would use that file.
        """
        path = f"/proc/self/fd/{fd}"
        return any(
            argument in (fd, path)
            for arguments, options in self._stalled_calls.values()
            for argument in (*arguments, *options.values())
        )

    def become_follower(self) -> None:
        """Make this stalled thread, which has finished its request, a follower; it must return from *serve* then."""
        self.stalled -= 1
        self.in_last_thread = False
        self._lock.release()

    @property
    def is_leader(self) -> bool:
        """Whether the calling thread is the leader, as opposed to a stalled thread that finishes its request."""
        return not self.stalled or threading.get_ident() == self._leader

    def wait(self, function: Callable[..., _Result], /, *arguments: Any) -> _Result:
        """Call *function*, which waits for the next request; let stalled threads finish their requests meanwhile."""
        if not self.stalled:
            return function(*arguments)
        self._lock.release()
        try:
            return function(*arguments)
        finally:
            self._lock.acquire()

    # Followers

    def _start_follower(self) -> None:
        if self._threads < self._max_threads:
            number = self._threads
            self._threads += 1
            before = threading.stack_size(_STACK_SIZE)
            try:
                threading.Thread(
                    target=self._run_follower, args=(number,), name=f"follower-{number}", daemon=True
                ).start()
            except RuntimeError:  # no more threads are allowed (ulimit -u)
                self._threads -= 1
                self._max_threads = self._threads
            finally:
                threading.stack_size(before)

    def _run_follower(self, number: int) -> None:
        self._numbers[threading.get_ident()] = number
        syscalls.unshare(_CLONE_FS)  # give each thread its own umask
        try:
            self._take_turns(False)
        except BaseException as error:  # wake the other threads, so that `run` ends and raises it
            self._failure = error
            self.ended = True
            self._wake_up()
            self._lock.release()

    def _follow(self) -> None:
        """Wait until the leader's call takes too long, and become the leader; or until `run` ends."""
        last, idle = -1, 0
        while not self.ended:
            time.sleep(_STALLED_CHECK_INTERVAL if self.stalled else CHECK_INTERVAL)
            calls, current = self._calls, self._in_call
            if calls != last:
                last, idle = calls, 0
            elif current:
                if self._replace(current):
                    return
            else:
                idle += 1
                if idle >= _CHECKS_BEFORE_SLEEP:
                    self._sleep(calls)
                    idle = 0

    def _sleep(self, calls: int) -> None:
        self.idle = True
        if self._calls == calls and not self.ended:
            self._wake_follower.acquire()
        self.idle = False

    def _wake_up(self) -> None:
        self.idle = False
        with suppress(RuntimeError):  # no thread waits, or another thread has released it
            self._wake_follower.release()

    def _replace(self, current: list[_CallArguments]) -> bool:
        """Become the leader. Return False if the leader's call has just ended."""
        try:
            arguments = current.pop()
        except IndexError:
            return False
        # From here on this thread owns the lock: the old leader finds its item gone and waits for the lock.
        old, self._leader = self._leader, threading.get_ident()
        self._in_call = []
        self.stalled += 1
        self._stalled_calls[old] = arguments
        self.on_new_leader()
        if self._threads - 1 - self.stalled < 1:
            self._start_follower()
        self.in_last_thread = self._threads - 1 - self.stalled < 1
        return True
