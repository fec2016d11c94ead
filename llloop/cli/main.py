"""The `llloop` command: its arguments and messages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llloop.cli import systemd_unit
from llloop.cli.common import ALL_EXIT_CODES, EXIT_CODES, UntouchedPath, report_errors
from llloop.cli.control import control
from llloop.cli.daemon import Daemon
from llloop.cli.stats import stats
from llloop.cli.status import status
from llloop.cli.trace import trace
from llloop.config import (
    MAX_WORKERS,
    Cache,
    IoKind,
    LoopKind,
    MetadataKind,
    Policy,
    ServeConfig,
    WakeLatency,
    help_text,
)
from llloop.errors import HostError, MountpointError, UsageError
from llloop.linux import mount_identity, mounts
from llloop.linux.stdio import open_missing_standard_descriptors
from llloop.logging import setup as log
from llloop.logging.escape import printable
from llloop.shared.slots import DEFAULT_SLOTS
from llloop.supervisor import start_checks, supervisor
from llloop.supervisor.process_state import keep_ended_children
from llloop.supervisor.sd_notify import Notifier
from llloop.supervisor.supervisor import Supervisor
from llloop.version import __version__

_CONTEXT = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "LLLOOP", "max_content_width": 120}


def _option(name: str, *more: str, **attributes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare an option of `ServeConfig`. Its help text is the documentation of that field."""
    return click.option(*more, name, help=help_text(name), **attributes)


def _print_line(line: str) -> None:
    """Print a line. If the reader of standard output is gone, continue without it."""
    try:
        click.echo(line)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Commands(click.Group):
    """The command group. It also works if it is started without standard descriptors, or with SIGCHLD ignored."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        open_missing_standard_descriptors()
        keep_ended_children()
        return super().main(*arguments, **options)


@click.group(cls=_Commands, context_settings=_CONTEXT, epilog=ALL_EXIT_CODES)
@click.version_option(__version__, prog_name="llloop", message="%(prog)s %(version)s")
def main() -> None:
    """Mirror a directory at a mount point through FUSE. Several worker processes read and write the data.

    Every option has an environment variable. For example, LLLOOP_SERVE_WORKERS=8 means serve --workers 8.
    LLLOOP_SOURCE and LLLOOP_MOUNTPOINT mean SOURCE and MOUNTPOINT of serve and umount.
    """


_source = click.argument("source", type=click.Path(readable=False), envvar="LLLOOP_SOURCE")
_mountpoint = click.argument("mountpoint", type=UntouchedPath(), envvar="LLLOOP_MOUNTPOINT")


@main.command(epilog=EXIT_CODES)
@_source
@_mountpoint
@_option("workers", "--workers", "-w", type=click.IntRange(1, MAX_WORKERS), default=None, metavar="N")
@_option("read_only", "--read-only", "--ro", is_flag=True)
@_option("allow_other", "--allow-other/--no-allow-other", default=None)
@_option("watch", "--watch", is_flag=True)
@_option("events", "--events/--no-events", default=True)
@_option("cache", "--cache", type=click.Choice([cache.value for cache in Cache]), default=Cache.AUTO.value)
@_option("io", "--io", type=click.Choice([kind.value for kind in IoKind]), default=IoKind.WORKERS.value)
@_option("writeback", "--writeback", is_flag=True)
@_option(
    "metadata",
    "--metadata",
    type=click.Choice([kind.value for kind in MetadataKind]),
    default=MetadataKind.AUTO.value,
)
@_option(
    "wake_latency",
    "--wake-latency",
    type=click.Choice([kind.value for kind in WakeLatency]),
    default=WakeLatency.NEVER.value,
)
@_option("attr_timeout", "--attr-timeout", type=float, default=None, metavar="SECONDS")
@_option("entry_timeout", "--entry-timeout", type=float, default=None, metavar="SECONDS")
@_option("negative_timeout", "--negative-timeout", type=float, default=None, metavar="SECONDS")
@_option("xattr", "--xattr/--no-xattr", default=True)
@_option("map_users", "--map-users", multiple=True, metavar="SRC:MNT:COUNT")
@_option("map_groups", "--map-groups", multiple=True, metavar="SRC:MNT:COUNT")
@_option("force_user", "--force-user", default="", metavar="USER")
@_option("force_group", "--force-group", default="", metavar="GROUP")
@_option("mode", "--mode", default="", metavar="MODE")
@_option("create_user", "--create-user", default="", metavar="USER")
@_option("create_group", "--create-group", default="", metavar="GROUP")
@_option("create_mode", "--create-mode", default="", metavar="MODE")
@_option("chown", "--chown", type=click.Choice([policy.value for policy in Policy]), default=Policy.REAL.value)
@_option("chmod", "--chmod", type=click.Choice([policy.value for policy in Policy]), default=Policy.REAL.value)
@_option("deny", "--deny", multiple=True, metavar="WHAT[,WHAT...]")
@_option("options", "-o", "--options", multiple=True, metavar="OPTION[,OPTION...]")
@_option("fsname", "--fsname", default=None, metavar="NAME")
@_option("nonempty", "--nonempty", is_flag=True)
@_option("replace_dead", "--replace-dead", is_flag=True)
@_option("loop", "--loop", type=click.Choice([kind.value for kind in LoopKind]), default=LoopKind.OWN.value)
@_option("slots", "--slots", type=click.IntRange(2, 4096), default=DEFAULT_SLOTS, hidden=True)
@click.option(
    "--daemon",
    is_flag=True,
    help="Serve in the background. The command returns when the mount is ready. If mounting fails, it prints the "
    "reason and ends with an exit code other than 0. Without --log-file, later log messages are lost. "
    "Default: stay in the foreground.",
)
@click.option(
    "--pid-file",
    type=click.Path(path_type=Path),
    help="When the mount is ready, write the process id of the supervisor to this file. llloop removes the file at the "
    "end. Default: no file.",
)
@click.option(
    "--log-level",
    type=click.Choice(log.LEVELS),
    default="info",
    help="Log messages of this level and above. llloop does not log single requests, so no level costs speed. "
    "Default: info.",
)
@click.option(
    "--log-file",
    type=click.Path(path_type=Path),
    help="Append the log messages of all processes to this file. Default: standard error.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Check whether llloop can make this mount, and mount nothing. If it cannot, the message and the exit code are "
    "the same as without --check. Default: off.",
)
@click.option(
    "--check-restart",
    is_flag=True,
    help="Like --check, but an llloop mount at MOUNTPOINT is allowed. Use it to check new options before you restart "
    "that mount. Default: off.",
)
@report_errors
def serve(
    source: str,
    mountpoint: str,
    daemon: bool,
    pid_file: Path | None,
    log_level: str,
    log_file: Path | None,
    check: bool,
    check_restart: bool,
    **options: Any,
) -> None:
    """Mirror the directory SOURCE at MOUNTPOINT until it is unmounted.

    Stop it with Ctrl-C, SIGTERM, or `llloop umount MOUNTPOINT`.
    """
    options["cache"] = Cache(options["cache"])
    options["io"] = IoKind(options["io"])
    options["metadata"] = MetadataKind(options["metadata"])
    options["wake_latency"] = WakeLatency(options["wake_latency"])
    options["loop"] = LoopKind(options["loop"])
    options["chown"] = Policy(options["chown"])
    options["chmod"] = Policy(options["chmod"])
    config = ServeConfig(source=source, mountpoint=mountpoint, **options)
    for option, file in (("--log-file", log_file), ("--pid-file", pid_file)):
        if file is not None and mounts.is_below(str(file), mountpoint):
            raise UsageError(f"{option} {file}: this file is inside the mount point; the mount would hide it")
    try:
        if log_file is not None:
            log_file = log_file.absolute()
        if not (check or check_restart):
            log.configure(log_level, log_file)
        elif log_file is not None:
            log.check(log_file)
    except OSError as error:
        raise HostError(f"log file {log_file}: {error.strerror}") from None
    background = Daemon(pid_file)
    if check or check_restart:
        checked = start_checks.check(config, restart=check_restart)
        _print_line(printable(f"llloop: {checked.source} can be served at {checked.mountpoint}"))
        return

    def on_ready(served: Supervisor) -> None:
        background.write_pid_file()
        if not daemon:
            _print_line(f"llloop: {printable(served.description)}")
        else:
            background.detach()

    notifier = Notifier(os.environ)  # WATCHDOG_PID is the process that was started, not the one in the background
    if daemon:
        background.start()
    try:
        sys.exit(supervisor.serve(config, on_ready, detached=daemon, notifier=notifier))
    finally:
        background.remove_pid_file()


@main.command()
@_mountpoint
@click.option(
    "--lazy",
    is_flag=True,
    help="Detach the mount at once, even if programs use it. Programs keep the files that they have open there. The "
    "server ends when the last of these files is closed. This also detaches a dead mount that programs use. "
    "Default: fail if the mount is busy.",
)
@click.option(
    "--if-dead",
    is_flag=True,
    help="Unmount only a dead mount. If nothing is mounted there, or if the mount works, do nothing and end with 0. "
    "Use it to clean up after a service. Default: off.",
)
@report_errors
def umount(mountpoint: str, lazy: bool, if_dead: bool) -> None:
    """Unmount the llloop mount at MOUNTPOINT. Its server ends."""
    path = mounts.resolve_mountpoint(mountpoint)
    try:
        entry = mounts.find_mount(path) if if_dead else mounts.find_llloop(path, mountpoint)
        if not if_dead and entry is not None:
            mount_identity.of(entry).unmount(lazy=lazy)
        elif entry is not None and entry.type == mounts.TYPE:
            mount_identity.detach_if_dead(path, lazy=lazy)
    except OSError as error:
        hint = "; end the programs that use it (fuser -vm), or detach it with --lazy" if not lazy else ""
        raise MountpointError(f"{mountpoint}: {error.strerror}{hint}") from None


@main.command("systemd-unit")
@click.argument("paths", nargs=-1, metavar="[SOURCE MOUNTPOINT]", type=click.Path(readable=False))
@report_errors
def print_systemd_unit(paths: tuple[str, ...]) -> None:
    """Print the systemd unit llloop@.service with the path of this command.

    With SOURCE and MOUNTPOINT, print a drop-in instead. It makes one instance wait for the file systems of both
    directories. Write it to /etc/systemd/system/llloop@INSTANCE.service.d/mounts.conf.
    """
    if len(paths) not in (0, 2):
        raise UsageError("systemd-unit takes either no arguments or SOURCE and MOUNTPOINT")
    click.echo(systemd_unit.drop_in(*paths) if paths else systemd_unit.unit(), nl=False)


main.add_command(status)
main.add_command(stats)
main.add_command(control)
main.add_command(trace)


if __name__ == "__main__":
    main()
