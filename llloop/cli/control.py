"""The command `llloop control`."""

from __future__ import annotations

import click

from llloop.cli.common import UntouchedPath, report_errors
from llloop.control import client
from llloop.control.releasing import release
from llloop.errors import UsageError
from llloop.logging import setup as log

_EXIT_CODES = """\b
Exit codes:
  0  the server has accepted the command
  1  the server of the mount is gone, does not answer, or belongs to another user
  2  an argument is invalid
  4  MOUNTPOINT is not an llloop mount
  7  release: programs use files below PATH
"""

# What the argument of a command is called, for those that need one.
_ARGUMENTS = {"log-level": "a level, such as debug", "release": "a path, that of a mounted file system for example"}


@click.command("control", epilog=_EXIT_CODES)
@click.argument("mountpoint", type=UntouchedPath())
@click.argument("command", type=click.Choice(["reload", "release", "stop", "log-level"]))
@click.argument("argument", required=False)
@report_errors
def control(mountpoint: str, command: str, argument: str | None) -> None:
    """Send a command to the server of the llloop mount at MOUNTPOINT.

    \b
    reload           open the log file again and replace all processes but the supervisor, as SIGHUP does
    release PATH     close what llloop keeps open below PATH, so that the file system there can be unmounted; PATH is
                     below the source or below MOUNTPOINT
    stop             unmount and end, as SIGTERM does; the command does not wait for the end
    log-level LEVEL  all processes log messages of LEVEL and above from now on
    """
    if (command in _ARGUMENTS) != (argument is not None):
        problem = f"needs {_ARGUMENTS[command]}" if argument is None else "takes no argument"
        raise UsageError(f"{command} {problem}")
    if command == "release":
        release(mountpoint, argument or "")
    elif command == "log-level":
        if argument not in log.LEVELS:
            raise UsageError(f"the log level must be one of {', '.join(log.LEVELS)}, not {argument}")
        client.ask_mount(mountpoint, command, level=argument)
    else:
        client.ask_mount(mountpoint, command)
