"""The command `llloop control`."""

from __future__ import annotations

import click

from llloop.cli.common import UntouchedPath, report_errors
from llloop.control import client
from llloop.errors import UsageError
from llloop.logging import setup as log

_EXIT_CODES = """\b
Exit codes:
  0  the server has accepted the command
  1  the server of the mount is gone, does not answer, or belongs to another user
  2  an argument is invalid
  4  MOUNTPOINT is not an llloop mount
"""


@click.command("control", epilog=_EXIT_CODES)
@click.argument("mountpoint", type=UntouchedPath())
@click.argument("command", type=click.Choice(["reload", "stop", "log-level"]))
@click.argument("level", type=click.Choice(log.LEVELS), required=False)
@report_errors
def control(mountpoint: str, command: str, level: str | None) -> None:
    """Send a command to the server of the llloop mount at MOUNTPOINT.

    \b
    reload           open the log file again and replace all processes but the supervisor, as SIGHUP does
    stop             unmount and end, as SIGTERM does; the command does not wait for the end
    log-level LEVEL  all processes log messages of LEVEL and above from now on
    """
    if (command == "log-level") != (level is not None):
        raise UsageError("log-level needs a level, such as debug" if level is None else f"{command} takes no argument")
    client.ask_mount(mountpoint, command, **({"level": level} if level else {}))
