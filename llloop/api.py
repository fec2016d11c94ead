"""llloop inside a Python program: `mount` for a block of code, `serve` for a program that does nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import IO, Any

from . import errors, log, mounting
from .config import ServeConfig
from .errors import LlloopError
from .supervisor import Supervisor

# How long the processes of a mount may take to end, in seconds: a busy mount is given five, each process five more.
_PATIENCE = 30.0
_NOT_INHERITED = ("LLLOOP_", "NOTIFY_SOCKET", "WATCHDOG_")


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount that is served.

    Attributes:
        source: the mirrored directory, absolute.
        mountpoint: where it is mirrored, absolute.
        pid: the process id of the supervisor.
        description: the line `llloop serve` would print: workers, loop, kernel features.
    """

    source: str
    mountpoint: str
    pid: int
    description: str


def serve(source: str | os.PathLike[str], mountpoint: str | os.PathLike[str], **options: Any) -> int:
    """Mirror *source* at *mountpoint* until it is unmounted or this process gets SIGTERM or SIGINT.

    It must be called in the main thread of a program that may fork, and takes over the handling of these
    signals; to go on with other work while the mount is served, use `mount`.

    Args:
        source: the directory to mirror.
        mountpoint: the directory to mirror it at.
        **options: the fields of `llloop.config.ServeConfig`, e.g. ``workers=8``.

    Returns:
        0 after a clean stop, 1 if the mount ended otherwise.

    Raises:
        LlloopError: the mount could not be made; the subclasses say why.
    """
    config = _config(source, mountpoint, options)
    return Supervisor(config, on_ready=_ignore).run()


def _ignore(line: str) -> None:
    """Take no notice of readiness."""


@contextmanager
def mount(
    source: str | os.PathLike[str], mountpoint: str | os.PathLike[str], *, log_level: str = "warning", **options: Any
) -> Iterator[Mounted]:
    """Mirror *source* at *mountpoint* for the duration of a ``with`` block.

    The mount is served by processes of its own, so threads and forks of the calling program do not matter.
    It ends with the block, and also when the calling program dies.

    Args:
        source: the directory to mirror.
        mountpoint: the directory to mirror it at.
        log_level: the least severe messages that go to this program's standard error.
        **options: the fields of `llloop.config.ServeConfig`, e.g. ``workers=8`` or ``read_only=True``.

    Raises:
        LlloopError: the mount could not be made; the subclasses say why. Also if it did not end cleanly.
    """
    config = _config(source, mountpoint, options)
    if log_level not in log.LEVELS:
        raise errors.UsageError(f"log_level must be one of {', '.join(log.LEVELS)}, not {log_level!r}")
    reader, lifeline = os.pipe2(os.O_CLOEXEC)
    command = [sys.executable, "-m", "llloop", "serve", "--lifeline", str(reader), "--log-level", log_level]
    command += [*_arguments(config), "--", config.source, config.mountpoint]
    with tempfile.TemporaryFile("w+") as messages:
        # Own session: Ctrl-C at the program's terminal is the program's to handle.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            pass_fds=(reader,),
            start_new_session=True,
            # What is asked for here is said in full; the environment is for who types commands, and a service manager
            # waits for the program's own word.
            env={name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)},
        )
        os.close(reader)
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if not line:
                raise _failure(process.wait(_PATIENCE), messages)
            yield Mounted(
                os.path.realpath(config.source),
                mounting.resolve_mountpoint(config.mountpoint),
                process.pid,
                line.removeprefix("llloop: "),
            )
        finally:
            os.close(lifeline)
            code = _wait(process)
            sys.stderr.write(_text(messages))
        if code != 0:
            raise LlloopError(f"the mount at {config.mountpoint} ended with exit code {code}")


def _config(source: str | os.PathLike[str], mountpoint: str | os.PathLike[str], options: dict[str, Any]) -> ServeConfig:
    known = {one.name for one in fields(ServeConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise errors.UsageError(f"unknown option {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    return ServeConfig(source=os.fspath(source), mountpoint=os.fspath(mountpoint), **options)


def _arguments(config: ServeConfig) -> list[str]:
    """Return the command line options that stand for *config*."""
    arguments = []
    for one in fields(config):
        value = getattr(config, one.name)
        option = "--" + one.name.replace("_", "-")
        if one.name in ("source", "mountpoint") or value is None:
            continue
        if one.name == "options":
            arguments += ["-o", ",".join(value)] if value else []
        elif one.name in ("allow_other", "xattr"):
            arguments.append(option if value else option.replace("--", "--no-"))
        elif isinstance(value, bool):
            arguments += [option] if value else []
        else:
            arguments += [option, str(getattr(value, "value", value))]
    return arguments


def _wait(process: subprocess.Popen[str]) -> int:
    try:
        return process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _text(messages: IO[str]) -> str:
    messages.seek(0)
    return messages.read()


def _failure(code: int, messages: IO[str]) -> LlloopError:
    """Return the error that the command has put into words, with the class of its exit code."""
    text = _text(messages).strip().removeprefix("llloop: ") or f"llloop ended with exit code {code}"
    messages.truncate(0)
    kinds = [errors.UsageError, errors.SourceError, errors.MountpointError, errors.HostError, errors.DeadMountError]
    return next((kind(text) for kind in kinds if kind.exit_code == code), LlloopError(text))
