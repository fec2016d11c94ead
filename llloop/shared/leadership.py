"""One thread at a time serves; while a system call holds it up, another takes its place (leader and followers).

The *leader* takes requests and serves them. System calls that may take long (they wait for a disk, for a server, for
a file system that is frozen, for the blocks of a large file to be freed) are made by `Leadership.call`. A *follower*
looks at short intervals whether the leader is still in the same call. If so, the follower becomes the leader. The
thread that was held up is *stalled*: when its call returns, it finishes its request while the leader waits for the
next one, and becomes a follower.

All that threads share is used by the thread that has the lock, and by no other: the leader always has it, but in a
call and while it waits for a request. So no other code needs to know of threads, with one exception: what was read
before a call may be out of date after it.

While nothing takes long this costs two operations on a list for each call, and no system call. Followers look only
while calls are made, and sleep otherwise.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from llloop.linux import syscalls

# How long a call may take until another thread takes over, in seconds: at least once, at most twice this.
TICK = 0.004
# The same while threads are stalled: what comes next may be about to wait for the same, one after the other.
_SHORT_TICK = 0.001
# After so many looks without a call, followers sleep until there is one.
_IDLE_TICKS = 5
# How many threads there are at most. Of these, one always serves what needs no call.
MOST_THREADS = 32

_CLONE_FS = 0x200  # <linux/sched.h>
# futex(2) on x86-64, on arm64 and riscv64, on powerpc64 and on s390x: a thread that waits for another.
_FUTEX = frozenset({b"202", b"98", b"221", b"238"})
_STACK = 512 * 1024  # bytes

_Result = TypeVar("_Result")


class Postponed(Exception):
    """A call was not made: it could hold up the last thread that still serves. Its request is to be served later."""


class InHand(Protocol):
    """What belongs to the request at hand and lies where all threads share it."""

    def set_aside(self, thread: int) -> Any:
        """Return what belongs to the request at hand, and make room for another, which thread number *thread* takes."""

    def exchange(self, other: Any) -> Any:
        """Put *other*, which was set aside, in the place of what is in hand, and return that."""

    def finished(self) -> None:
        """Note that the request in hand, which was set aside once, is finished."""


class _Alone:
    """Nothing is shared, since there is one thread only."""

    def set_aside(self, thread: int) -> None: ...

    def exchange(self, other: Any) -> None: ...

    def finished(self) -> None: ...


class Leadership:
    """Decides which thread serves. Until `run`, there is one thread only.

    Attributes:
        stalled: how many threads are in a call for long, or have been and finish their requests.
        alone: whether no thread is left to take the leader's place.

    Args:
        in_hand: what belongs to one request.
        most: how many threads there are at most.
    """

    def __init__(self, in_hand: InHand | None = None, most: int = MOST_THREADS) -> None:
        self.in_hand: InHand = in_hand or _Alone()
        self._most = most
        self.stalled = 0
        self.alone = False
        self._leader = threading.get_ident()
        self._serve: Callable[[], bool] | None = None
        self._ended = False
        self._failure: BaseException | None = None
        # Whose item it is that a thread takes out decides whether the leader goes on or is replaced. One list for each
        # time that a thread leads.
        self._in_call: list[None] = []
        self._calls = 0
        self._lock = threading.Lock()
        self._lock.acquire()  # the leader's
        # Of the followers, the one that has this lock looks; the others wait for it.
        self._watch = threading.Lock()
        self._threads = 1
        self._resting = False
        self._bell = threading.Lock()
        self._bell.acquire()
        # The number of each thread, counted from 0.
        self._numbers: dict[int, int] = {}
        # By thread that was replaced and calls again: nothing but that it does.
        self._finishing: set[int] = set()
        # The kernel's number of each thread.
        self._tids: dict[int, int] = {}
        # By thread: what it had in hand when it was replaced.
        self._aside: dict[int, Any] = {}
        # What the leader has in hand while a thread that was replaced finishes.
        self._leaders: Any = None

    def run(self, serve: Callable[[], bool]) -> None:
        """Serve until there is nothing more to be served.

        Args:
            serve: serves requests until either there are no more, and it returns True, or `must_leave` says so, and it
                returns False. Called by one thread at a time.

        Raises:
            BaseException: what *serve* has raised, in whichever thread.
        """
        self._leader = threading.get_ident()
        self._numbers[self._leader] = 0
        self._tids[self._leader] = threading.get_native_id()
        self._serve = serve
        self._start_follower()
        try:
            self._take_turns(True)
        finally:
            self._ended = True
            self._wake()
        if self._failure is not None:
            raise self._failure

    def _take_turns(self, leading: bool) -> None:
        assert self._serve is not None
        while True:
            if not leading:
                with self._watch:
                    self._follow()
            if self._ended:
                return
            leading = False
            if self._serve():
                self._ended = True
                self._wake()
                if self.stalled:
                    self._lock.release()
                return

    # For who serves

    def call(self, function: Callable[..., _Result], /, *arguments: Any, **options: Any) -> _Result:
        """Call *function*, which makes a system call that may take long, and return its result.

        Raises:
            Postponed: it was not called.
        """
        if self.stalled:
            if threading.get_ident() != self._leader:
                return self._call_while_finishing(function, *arguments, **options)
            if self.alone:
                raise Postponed
        self._calls += 1
        mine = self._in_call
        mine.append(None)
        if self._resting:
            self._wake()
        try:
            return function(*arguments, **options)
        finally:
            try:
                mine.pop()
            except IndexError:
                self._return()

    def call_anyway(self, function: Callable[..., _Result], /, *arguments: Any, **options: Any) -> _Result:
        """Call *function* as `call` does, also in the last thread: what changes nothing waits for nothing frozen."""
        if self.alone and self.leads:
            return function(*arguments, **options)
        return self.call(function, *arguments, **options)

    def _return(self) -> None:
        """Go on with a request after a call, although another thread leads by now."""
        self._lock.acquire()
        self._leaders = self.in_hand.exchange(self._aside.pop(threading.get_ident()))

    def _call_while_finishing(self, function: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
        mine = self.in_hand.exchange(self._leaders)
        thread = threading.get_ident()
        self._finishing.add(thread)
        self._lock.release()
        try:
            return function(*arguments, **options)
        finally:
            self._lock.acquire()
            self._finishing.discard(thread)
            self._leaders = self.in_hand.exchange(mine)

    def may_close(self) -> bool:
        """Whether no other thread can still be about to use a number of a descriptor that it has read.

        A thread can be replaced before its system call has begun, if it gets no processor for long enough. A descriptor
        that is closed then could be another file when the call begins. A thread that sleeps in its system call has
        looked its descriptors up.
        """
        return not self.stalled or all(map(self._sleeps_in_call, {*self._aside, *self._finishing}))

    def _sleeps_in_call(self, thread: int) -> bool:
        try:
            with open(f"/proc/self/task/{self._tids[thread]}/syscall", "rb") as file:
                call = file.read().split()[0]
        except OSError:
            return False
        return call.isdigit() and call not in _FUTEX  # else "running", or -1 in a page fault

    def must_leave(self) -> bool:
        """After each request while some are `stalled`: whether this thread was replaced while it served it."""
        if threading.get_ident() == self._leader:
            return False
        self.in_hand.finished()
        self.in_hand.exchange(self._leaders)
        self._leaders = None
        self.stalled -= 1
        self.alone = False
        self._lock.release()
        return True

    @property
    def leads(self) -> bool:
        """Whether the calling thread is the leader, and not one that finishes a request."""
        return not self.stalled or threading.get_ident() == self._leader

    def wait(self, function: Callable[..., _Result], /, *arguments: Any) -> _Result:
        """Call *function*, which waits for the next request; meanwhile stalled threads may finish theirs."""
        if not self.stalled:
            return function(*arguments)
        self._lock.release()
        try:
            return function(*arguments)
        finally:
            self._lock.acquire()

    # Followers

    def _start_follower(self) -> None:
        if self._threads < self._most:
            number = self._threads
            self._threads += 1
            before = threading.stack_size(_STACK)
            try:
                threading.Thread(
                    target=self._be_follower, args=(number,), name=f"follower-{number}", daemon=True
                ).start()
            except RuntimeError:  # no more threads are allowed (ulimit -u)
                self._threads -= 1
                self._most = self._threads
            finally:
                threading.stack_size(before)

    def _be_follower(self, number: int) -> None:
        self._numbers[threading.get_ident()] = number
        self._tids[threading.get_ident()] = threading.get_native_id()
        syscalls.unshare(_CLONE_FS)  # the umask is each thread's own
        try:
            self._take_turns(False)
        except BaseException as error:  # whoever else waits, waits for this thread
            self._failure = error
            self._ended = True
            self._wake()
            self._lock.release()

    def _follow(self) -> None:
        """Wait until the leader is in a call for too long, and be the leader then; or until all has ended."""
        last, idle = -1, 0
        while not self._ended:
            time.sleep(_SHORT_TICK if self.stalled else TICK)
            calls, current = self._calls, self._in_call
            if calls != last:
                last, idle = calls, 0
            elif current:
                if self._replace(current):
                    return
            else:
                idle += 1
                if idle >= _IDLE_TICKS:
                    self._rest(calls)
                    idle = 0

    def _rest(self, calls: int) -> None:
        self._resting = True
        if self._calls == calls and not self._ended:
            self._bell.acquire()
        self._resting = False

    def _wake(self) -> None:
        self._resting = False
        with suppress(RuntimeError):  # nobody waits, or it was rung already
            self._bell.release()

    def _replace(self, current: list[None]) -> bool:
        """Be the leader, unless the call has just ended."""
        try:
            current.pop()
        except IndexError:
            return False
        # From here on this thread has the lock: what the old leader does next is to wait for it.
        old, self._leader = self._leader, threading.get_ident()
        self._in_call = []
        self.stalled += 1
        self._aside[old] = self.in_hand.set_aside(self._numbers[self._leader])
        if self._threads - 1 - self.stalled < 1:
            self._start_follower()
        self.alone = self._threads - 1 - self.stalled < 1
        return True
