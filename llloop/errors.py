"""What can go wrong before a mount serves, each with the exit code the command ends with."""

from __future__ import annotations


class LlloopError(Exception):
    """An error that is explained to the user in one line. Exit code 1: the mount failed or ended unexpectedly."""

    exit_code = 1


class UsageError(LlloopError):
    """An option's value makes no sense. Exit code 2, as click's own usage errors."""

    exit_code = 2


class SourceError(LlloopError):
    """The source cannot be mirrored. Exit code 3."""

    exit_code = 3


class MountpointError(LlloopError):
    """The mount point cannot be mounted on, or is not an llloop mount. Exit code 4."""

    exit_code = 4


class HostError(LlloopError):
    """This machine or user cannot mount with FUSE. Exit code 5."""

    exit_code = 5


class DeadMountError(LlloopError):
    """A dead mount is in the way. Exit code 6."""

    exit_code = 6


def of_code(code: int, text: str) -> LlloopError:
    """Return the error of the class that has this exit code, with *text*."""
    kinds = (UsageError, SourceError, MountpointError, HostError, DeadMountError)
    return next((kind(text) for kind in kinds if kind.exit_code == code), LlloopError(text))
