"""Runs functions in child processes, also as another user, and returns their results or raises their errors."""

import os
import pickle
import select
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Caller:
    """The credentials of a process; -1 keeps the test's own id."""

    uid: int = -1
    gid: int = -1
    groups: tuple[int, ...] = ()
    umask: int = 0o022

    def with_umask(self, umask: int) -> "Caller":
        return replace(self, umask=umask)

    def become(self) -> None:
        os.umask(self.umask)
        # Set the groups first: after setuid this is not allowed.
        if self.gid != -1:
            os.setgroups(self.groups)
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)


MYSELF = Caller()


class Child(Generic[T]):
    """A forked process that runs one function; `result` waits for it."""

    def __init__(self, function: Callable[..., T], *args: Any, caller: Caller = MYSELF) -> None:
        self._receiving, sending = os.pipe()
        with warnings.catch_warnings():
            # Python >= 3.12 warns of fork beside threads (pytest's watchdogs); the child takes none of their locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self._receiving)
                message = pickle.dumps(_outcome(function, args, caller))
                with open(sending, "wb") as pipe:
                    pipe.write(message)
                status = 0
            finally:
                os._exit(status)
        os.close(sending)

    def is_done(self) -> bool:
        """Whether `result` returns without waiting."""
        return bool(select.select([self._receiving], [], [], 0)[0])

    def result(self) -> T:
        with open(self._receiving, "rb") as pipe:
            message = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        if not message:
            raise AssertionError(f"the child ended without a result, wait status {status:#x}")
        value: T
        value, error, trace = pickle.loads(message)
        if isinstance(error, OSError):
            raise error
        if trace:
            raise AssertionError(f"the child failed:\n{trace}")
        return value


def _outcome(function: Callable[..., Any], args: tuple[Any, ...], caller: Caller) -> tuple[Any, Any, str]:
    try:
        caller.become()
        return function(*args), None, ""
    except OSError as error:
        return None, error, traceback.format_exc()
    except BaseException:
        return None, None, traceback.format_exc()


def run_as(caller: Caller, function: Callable[..., T], *args: Any) -> T:
    return Child(function, *args, caller=caller).result()


def run_together(calls: Iterable[tuple[Callable[..., T], tuple[Any, ...]]]) -> list[T]:
    """Runs all calls at the same time, each in its own process; returns the results in the order of the calls."""
    children = [Child(function, *args) for function, args in calls]
    results: list[T] = []
    errors: list[Exception] = []
    # Wait for each child, even if another failed, so that a failing test leaves no process behind.
    for child in children:
        try:
            results.append(child.result())
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return results
