"""Shared by the commands: exit codes, error messages and a parameter type."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from llloop.errors import LlloopError
from llloop.logging.escape import printable


class UntouchedPath(click.Path):
    """A path that is not accessed. `click.Path` calls stat(2), which hangs if the mount's server hangs."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return os.fsdecode(value)


EXIT_CODES = """\b
Exit codes:
  0  stopped cleanly
  1  the mount failed or ended unexpectedly
  2  an option is invalid
  3  the source cannot be mirrored
  4  the mount point cannot be used
  5  this machine or user cannot mount with FUSE
  6  a dead mount is at the mount point
"""
# With that of `llloop control MNT release`.
ALL_EXIT_CODES = EXIT_CODES + "  7  programs use what should be released\n"


def report_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command so that an `LlloopError` becomes one line on standard error and an exit code."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except LlloopError as error:
            click.echo(f"llloop: {printable(error)}", err=True)
            sys.exit(error.exit_code)

    return wrapper
