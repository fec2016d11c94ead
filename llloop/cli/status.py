"""The command `llloop status`."""

from __future__ import annotations

import json
import sys

import click

from llloop.cli.common import UntouchedPath, report_errors
from llloop.control import discovery

_EXIT_CODES = """\b
Exit codes:
  0  all shown mounts are served
  1  a shown mount is dead, does not answer, belongs to another user, or has a problem
  4  MOUNTPOINT is not an llloop mount
"""


@click.command(epilog=_EXIT_CODES)
@click.argument("mountpoint", type=UntouchedPath(), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list, even for one mount.")
@report_errors
def status(mountpoint: str | None, as_json: bool) -> None:
    """Show the llloop mounts on this machine, or the one at MOUNTPOINT.

    For each mount, show the source, options, features, processes, and how long it has been mounted. Also show
    problems: a stopped process, a source that is gone, hangs or is frozen, a server that is gone. Ordinary users see
    this for their own mounts. For other mounts, they see only that the mount exists.
    """
    mounts = [discovery.status_of(mountpoint)] if mountpoint else discovery.all_statuses()
    if as_json:
        click.echo(json.dumps(mounts, indent=2))
    else:
        # Imported only here: it takes longer to import than everything else, and serve does not need it.
        from llloop.cli import tables

        tables.console().print(tables.status_view(mounts))
    if any(one["state"] in ("dead", "not answering", "unknown") or one.get("problems") for one in mounts):
        sys.exit(1)
