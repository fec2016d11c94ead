"""Errors, each with the exit code of the command."""

from __future__ import annotations


class LlloopError(Exception):
    """An error whose text explains it in one line. Exit code 1: the mount failed or ended unexpectedly."""

    exit_code = 1


class UsageError(LlloopError):
    """An option is invalid. Exit code 2, like the usage errors of click."""

    exit_code = 2


class SourceError(LlloopError):
    """The source cannot be mirrored. Exit code 3."""

    exit_code = 3


class MountpointError(LlloopError):
    """The mount point cannot be used, or is not an llloop mount. Exit code 4."""

    exit_code = 4


class HostError(LlloopError):
    """This machine or user cannot mount with FUSE. Exit code 5."""

    exit_code = 5


class DeadMountError(LlloopError):
    """A dead mount is at the mount point. Exit code 6."""

    exit_code = 6


class BusyError(LlloopError):
    """Programs use what should be released. Exit code 7."""

    exit_code = 7


def of_code(code: int, text: str) -> LlloopError:
    """Return the error of the class that has this exit code, with *text*."""
    kinds = (UsageError, SourceError, MountpointError, HostError, DeadMountError)
    return next((kind(text) for kind in kinds if kind.exit_code == code), LlloopError(text))
