"""`mount.llloop`, the helper program of mount(8) for /etc/fstab and `mount -t llloop`.

Its mount options are derived from the options of `llloop serve`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Iterable

import click

from llloop import mount_options
from llloop.cli.main import serve
from llloop.errors import HostError, UsageError
from llloop.linux.stdio import open_missing_standard_descriptors
from llloop.logging.escape import printable
from llloop.supervisor.process_state import keep_ended_children
from llloop.version import __version__

# Exit codes of mount(8).
_USAGE, _SYSTEM, _BUG, _INTERRUPTED, _FAILED = 1, 2, 4, 8, 32
_EXIT_CODES = """\b
Exit codes, the same as those of mount(8):
  0   mounted
  1   an option is invalid
  2   this machine or user cannot mount with FUSE
  4   an error inside llloop
  8   interrupted
  32  the mount failed: the source or the mount point cannot be used
"""

# Mount options that mount(8) handles itself, or that have no meaning for a FUSE mount.
_IGNORED = frozenset(
    {
        *("auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup", "nofail"),
        *("_netdev", "defaults", "default_permissions", "loud", "silent"),
    }
)
# With these options, mount(8) prepends noexec, nosuid and nodev to the options of fstab.
_USER_MOUNT = re.compile("(users?|owner|group)(=.*)?")
_PREPENDED = ("noexec", "nosuid", "nodev")
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=", "helper=", "uhelper=")
# Options of `llloop serve` that are not mount options.
_NOT_MOUNT_OPTIONS = frozenset({"daemon", "check", "check_restart", "help"})


def _mount_option_parameters() -> list[click.Option]:
    """Return the options of `llloop serve` that are mount options too."""
    return [one for one in serve.params if isinstance(one, click.Option) and one.name not in _NOT_MOUNT_OPTIONS]


def _spellings() -> dict[str, tuple[str, str, bool, bool]]:
    """Return for each spelling of a mount option what it stands for.

    Returns:
        The name of the parameter, the option of `llloop serve`, and whether it has a value, and may be repeated.
    """
    table = {}
    for option in _mount_option_parameters():
        for spelling in (*option.opts, *option.secondary_opts):
            if spelling.startswith("--"):
                name = spelling[2:].replace("-", "_")
                for variant in (spelling[2:], name, re.sub("^no_", "no", name)):
                    table[variant] = (str(option.name), spelling, not option.is_flag, option.multiple)
    return table


def serve_arguments(options: Iterable[str], *, sloppy: bool = False) -> list[str]:
    """Return mount options as arguments of `llloop serve`.

    Args:
        options: single mount options, such as "ro" or "workers=8".
        sloppy: ignore unknown options.

    Raises:
        UsageError: an option lacks its value, has a value although it takes none, contradicts another option, or is
            not supported.
    """
    table = _spellings()
    arguments = []
    seen: dict[str, str] = {}
    given = _without_prepended(options)
    mount_options.refuse_contradictions(given)
    for option in given:
        name, assigned, value = option.partition("=")
        if option in _IGNORED or option in mount_options.WITHOUT_EFFECT or option.startswith(_IGNORED_PREFIXES):
            continue
        if name == "remount":
            raise UsageError(
                "mount option remount: llloop cannot change the options of a mount; unmount it, then mount it again"
            )
        if name in table:
            parameter, spelling, wants_value, repeatable = table[name]
            if not repeatable and seen.setdefault(parameter, option) != option:
                raise UsageError(f"mount options {seen[parameter]} and {option} exclude each other; give one of them")
            if wants_value != bool(assigned):
                raise UsageError(
                    f"mount option {option}: this option {'needs a value' if wants_value else 'takes no value'}"
                )
            arguments += [f"{spelling}={value}" if wants_value else spelling]
        elif option in mount_options.KERNEL or not sloppy:
            arguments += ["-o", option]
    return arguments


def _without_prepended(options: Iterable[str]) -> list[str]:
    """Return *options* without those that mount(8) has prepended for a mount by an ordinary user.

    An option that mount(8) has prepended, such as noexec, is only removed if the table has its opposite after it.
    """
    given = list(options)
    if not any(_USER_MOUNT.fullmatch(option) for option in given):
        return given
    return [
        option
        for place, option in enumerate(given)
        if option not in _PREPENDED or option.removeprefix("no") not in given[place:]
    ]


def _placeholder(option: click.Option) -> str:
    """Return the placeholder for an option's value in the help text."""
    if isinstance(option.type, click.Choice):
        return "|".join(map(str, option.type.choices))
    return option.metavar or option.type.name.upper()


class Command(click.Command):
    """A command whose help also lists the mount options."""

    def rows(self) -> list[tuple[str, str]]:
        """Return the spelling and the help text of each mount option."""
        rows = []
        for option in _mount_option_parameters():
            if not option.hidden:
                names = [spelling[2:] for spelling in (*option.opts, *option.secondary_opts) if spelling[2:]]
                value = "" if option.is_flag else f"={_placeholder(option)}"
                rows.append((", ".join(f"{name.replace('-', '_')}{value}" for name in names), option.help or ""))
        return rows

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Mount options"):
            formatter.write_dl(self.rows())


@click.command(
    cls=Command,
    epilog=_EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.argument("source", type=click.Path(readable=False))
@click.argument("mountpoint", type=click.Path(readable=False))
@click.option("options", "-o", multiple=True, metavar="OPTION[,OPTION...]", help="Mount options; see Mount Options.")
@click.option("fake", "-f", is_flag=True, help="Check the options and mount nothing.")
@click.option("sloppy", "-s", is_flag=True, help="Ignore unknown mount options.")
@click.option("verbose", "-v", is_flag=True, help="Print the `llloop serve` command that does the same.")
@click.option("no_mtab", "-n", is_flag=True, help="No effect: llloop never writes /etc/mtab.")
@click.option("read_only", "-r", is_flag=True, help="The same as -o ro.")
@click.option("writable", "-w", is_flag=True, help="The same as -o rw.")
@click.option("kind", "-t", metavar="TYPE", help="No effect: the type is always fuse.llloop.")
@click.option("namespace", "-N", metavar="NAMESPACE", help="Not supported; use nsenter(1).")
@click.version_option(__version__, "-V", "--version", prog_name="mount.llloop", message="%(prog)s %(version)s")
def mount_llloop(
    source: str,
    mountpoint: str,
    options: tuple[str, ...],
    fake: bool,
    sloppy: bool,
    verbose: bool,
    no_mtab: bool,
    read_only: bool,
    writable: bool,
    kind: str | None,
    namespace: str | None,
) -> None:
    """Mirror the directory SOURCE at MOUNTPOINT in the background until it is unmounted.

    mount(8) runs this program for the types llloop and fuse.llloop: `mount -t llloop SOURCE MOUNTPOINT`, or a line in
    /etc/fstab.
    """
    if namespace is not None:
        raise UsageError("-N is not supported; use nsenter --mount=NAMESPACE mount -t llloop ...")
    single = [one for text in options for one in mount_options.split(text)]
    single += [*(["ro"] if read_only else []), *(["rw"] if writable else [])]
    arguments = ["--daemon", *serve_arguments(single, sloppy=sloppy), "--", source, mountpoint]
    if verbose:
        click.echo(shlex.join(["llloop", "serve", *arguments]))
    # Without a prefix for environment variables: the caller's LLLOOP_ variables do not apply to this mount.
    context = serve.make_context("llloop serve", arguments)
    if fake:
        return
    # Fork, because `llloop serve --daemon` exits, and its exit code must be translated into one of mount(8).
    child = os.fork()
    if child == 0:
        with context:
            serve.invoke(context)
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    sys.exit(_mount_exit_code(os.waitstatus_to_exitcode(status)))


def _mount_exit_code(code: int) -> int:
    """Return the exit code of mount(8) for an exit code of `llloop serve`, negative if a signal killed it."""
    if code < 0:
        return _INTERRUPTED if code == -signal.SIGINT else _BUG
    return {0: 0, UsageError.exit_code: _USAGE, HostError.exit_code: _SYSTEM}.get(code, _FAILED)


def main() -> None:
    """Run `mount.llloop` with the arguments of this process."""
    open_missing_standard_descriptors()
    keep_ended_children()
    try:
        mount_llloop(standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
        if isinstance(error, click.BadParameter) and error.param in _mount_option_parameters():
            message = f"mount option {error.param.name}: {error.message}"
        click.echo(f"mount.llloop: {printable(message)}", err=True)
        sys.exit(_USAGE)
    except UsageError as error:
        click.echo(f"mount.llloop: {printable(error)}", err=True)
        sys.exit(_USAGE)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)
