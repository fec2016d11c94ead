"""Options, help texts and exit codes of `llloop`, without a mount: a fake supervisor records the configuration."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from llloop import errors
from llloop.cli import main
from llloop.config import Cache, IoKind, LoopKind, MetadataKind, Policy, ServeConfig, WakeLatency
from llloop.linux import mounts
from llloop.linux.mount_identity import MountIdentity
from llloop.logging import setup as log
from llloop.server_process import _plain
from llloop.supervisor import supervisor
from llloop.version import __version__


class FakeSupervisor:
    """Replaces the supervisor; records its configuration."""

    config: ServeConfig
    options: dict[str, Any]
    code = 0
    error: Exception | None = None

    description = "serving /src at /mnt with 1 worker: own loop"

    @staticmethod
    def serve(config: ServeConfig, on_ready: Callable[[Any], None], **options: Any) -> int:
        if FakeSupervisor.error is not None:
            raise FakeSupervisor.error
        FakeSupervisor.config = config
        FakeSupervisor.options = options
        on_ready(FakeSupervisor)
        return FakeSupervisor.code


@pytest.fixture(autouse=True)
def fake_supervisor(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeSupervisor]]:
    monkeypatch.setattr(supervisor, "serve", FakeSupervisor.serve)
    monkeypatch.setattr(log, "configure", lambda level, file: None)
    FakeSupervisor.code, FakeSupervisor.error = 0, None
    yield FakeSupervisor


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main.main, [*arguments], env=env)


def config_of(*arguments: str, env: dict[str, str] | None = None) -> ServeConfig:
    result = run("serve", "/src", "/mnt", *arguments, env=env)
    assert result.exit_code == 0, result.output
    return FakeSupervisor.config


def shown(command: click.Command) -> list[click.Option]:
    return [one for one in command.params if isinstance(one, click.Option) and not one.hidden and one.name != "help"]


def test_config_without_options_has_defaults() -> None:
    assert config_of() == ServeConfig(source="/src", mountpoint="/mnt")


# Each option: field, arguments, environment variables, and the value that both must give.
OPTIONS: list[tuple[str, list[str], dict[str, str], Any]] = [
    ("workers", ["--workers", "3"], {"WORKERS": "3"}, 3),
    ("workers", ["-w3"], {"WORKERS": "3"}, 3),
    ("read_only", ["--read-only"], {"READ_ONLY": "1"}, True),
    ("read_only", ["--ro"], {"READ_ONLY": "true"}, True),
    ("allow_other", ["--allow-other"], {"ALLOW_OTHER": "1"}, True),
    ("allow_other", ["--no-allow-other"], {"ALLOW_OTHER": "0"}, False),
    ("watch", ["--watch"], {"WATCH": "1"}, True),
    ("events", ["--no-events"], {"EVENTS": "0"}, False),
    ("cache", ["--cache", "always"], {"CACHE": "always"}, Cache.ALWAYS),
    ("io", ["--io", "auto"], {"IO": "auto"}, IoKind.AUTO),
    ("metadata", ["--metadata", "workers"], {"METADATA": "workers"}, MetadataKind.WORKERS),
    ("wake_latency", ["--wake-latency", "hold"], {"WAKE_LATENCY": "hold"}, WakeLatency.HOLD),
    ("writeback", ["--writeback"], {"WRITEBACK": "1"}, True),
    ("attr_timeout", ["--attr-timeout=2.5"], {"ATTR_TIMEOUT": "2.5"}, 2.5),
    ("entry_timeout", ["--entry-timeout=2.5"], {"ENTRY_TIMEOUT": "2.5"}, 2.5),
    ("negative_timeout", ["--negative-timeout=0"], {"NEGATIVE_TIMEOUT": "0"}, 0),
    ("xattr", ["--no-xattr"], {"XATTR": "0"}, False),
    ("options", ["-o", "noatime,suid", "-o", "dev"], {"OPTIONS": "noatime,suid dev"}, ("noatime", "suid", "dev")),
    (
        "map_users",
        ["--map-users", "1:2:3,root:5:1", "--map-users=7:7:1"],
        {"MAP_USERS": "1:2:3,0:5:1 7:7:1"},
        ("1:2:3", "0:5:1", "7:7:1"),
    ),
    ("map_groups", ["--map-groups=1:2:3"], {"MAP_GROUPS": "1:2:3"}, ("1:2:3",)),
    ("force_user", ["--force-user", "root"], {"FORCE_USER": "0"}, "0"),
    ("force_group", ["--force-group=7"], {"FORCE_GROUP": "7"}, "7"),
    ("mode", ["--mode", "u=rwX,go=rX"], {"MODE": "u=rwX,go=rX"}, "u=rwX,go=rX"),
    ("create_user", ["--create-user=7"], {"CREATE_USER": "7"}, "7"),
    ("create_group", ["--create-group=root"], {"CREATE_GROUP": "root"}, "0"),
    ("create_mode", ["--create-mode=0644"], {"CREATE_MODE": "0644"}, "0644"),
    ("chown", ["--chown", "deny"], {"CHOWN": "deny"}, Policy.DENY),
    ("chmod", ["--chmod=ignore"], {"CHMOD": "ignore"}, Policy.IGNORE),
    ("deny", ["--deny", "rename,delete", "--deny=link"], {"DENY": "rename,delete link"}, ("rename", "delete", "link")),
    ("fsname", ["--fsname", "name"], {"FSNAME": "name"}, "name"),
    ("nonempty", ["--nonempty"], {"NONEMPTY": "1"}, True),
    ("replace_dead", ["--replace-dead"], {"REPLACE_DEAD": "1"}, True),
    ("loop", ["--loop", "llfuse"], {"LOOP": "llfuse"}, LoopKind.LLFUSE),
    ("slots", ["--slots", "9"], {"SLOTS": "9"}, 9),
]


def test_option_table_is_complete() -> None:
    assert {name for name, *_ in OPTIONS} == {one.name for one in fields(ServeConfig)} - {"source", "mountpoint"}


@pytest.mark.parametrize(("name", "arguments", "environment", "value"), OPTIONS, ids=lambda value: str(value))
def test_option_as_argument_and_as_environment_variable(
    name: str, arguments: list[str], environment: dict[str, str], value: Any
) -> None:
    by_argument = config_of(*arguments)
    by_variable = config_of(env={f"LLLOOP_SERVE_{key}": text for key, text in environment.items()})
    assert getattr(by_argument, name) == getattr(by_variable, name) == value
    assert by_argument == by_variable
    assert getattr(ServeConfig(source="/src", mountpoint="/mnt"), name) != value or name == "allow_other"


@pytest.mark.parametrize(("name", "arguments", "environment", "value"), OPTIONS, ids=lambda value: str(value))
def test_config_survives_json(name: str, arguments: list[str], environment: dict[str, str], value: Any) -> None:
    config = config_of(*arguments)
    assert ServeConfig(**json.loads(json.dumps(_plain(config)))) == config


def test_argument_overrides_environment_variable() -> None:
    assert config_of("--workers", "2", env={"LLLOOP_SERVE_WORKERS": "5"}).workers == 2


# Help


def options_of_all_commands() -> list[click.Option]:
    return [option for command in (main.serve, main.umount) for option in shown(command)]


@pytest.mark.parametrize("option", options_of_all_commands(), ids=lambda option: option.opts[0])
def test_option_help_states_effect_and_default(option: click.Option) -> None:
    text = option.help or ""
    effect, _, rest = text.partition("Default: ")
    assert len(effect.split()) >= 5, "the effect is missing"
    default = re.split(r"[.;]", rest)[0].strip()
    assert default, "the default is missing"
    value = option.get_default(click.Context(main.serve))
    if option.name in ("cache", "io", "log_level"):
        assert default == value
    elif option.is_flag and value is not None:
        words = {True: ("on",), False: ("off", "stay in the foreground", "fail if the mount is busy")}
        assert default in words[bool(value)], text


@pytest.mark.parametrize("command", [[], ["serve"], ["umount"]])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_option_prints_usage(command: list[str], option: str) -> None:
    result = run(*command, option)
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")


def test_help_shows_all_options_except_hidden_ones() -> None:
    output = " ".join(run("serve", "--help").output.split())
    for option in shown(main.serve):
        assert option.opts[0] in output
        assert " ".join((option.help or "?").split()[:4]) in output
    for hidden in ("--slots",):
        assert hidden not in output


def test_help_lists_the_exit_codes() -> None:
    for arguments, codes in ((["--help"], "01234567"), (["serve", "--help"], "0123456")):
        output = run(*arguments).output
        assert [line.split()[0] for line in output.partition("Exit codes:")[2].splitlines() if line] == list(codes)


def test_version() -> None:
    assert run("--version").output == f"llloop {__version__}\n"


# Exit codes


KINDS = [
    (errors.LlloopError, 1),
    (errors.UsageError, 2),
    (errors.SourceError, 3),
    (errors.MountpointError, 4),
    (errors.HostError, 5),
    (errors.DeadMountError, 6),
    (errors.BusyError, 7),
]


@pytest.mark.parametrize(("kind", "code"), KINDS)
def test_error_prints_one_line_and_sets_code(
    fake_supervisor: type[FakeSupervisor], kind: type[errors.LlloopError], code: int
) -> None:
    fake_supervisor.error = kind("what is wrong")
    result = run("serve", "/src", "/mnt")
    assert result.exit_code == code
    assert result.stderr == "llloop: what is wrong\n"
    assert result.stdout == ""


def test_each_error_class_has_its_own_exit_code() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LlloopError)}
    assert kinds == {kind for kind, _ in KINDS}
    assert all(kind.exit_code == code for kind, code in KINDS)


@pytest.mark.parametrize("code", [0, 1])
def test_serve_exits_with_code_of_supervisor(fake_supervisor: type[FakeSupervisor], code: int) -> None:
    fake_supervisor.code = code
    result = run("serve", "/src", "/mnt")
    assert result.exit_code == code
    assert result.stdout == "llloop: serving /src at /mnt with 1 worker: own loop\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workers=0"],
        ["--workers=129"],
        ["--workers=x"],
        ["--attr-timeout=-1"],
        ["--entry-timeout=nan"],
        ["--cache=sometimes"],
        ["--log-level=loud"],
        ["--nonsense"],
        ["third argument"],
    ],
)
def test_invalid_options_are_refused(arguments: list[str]) -> None:
    result = run("serve", "/src", "/mnt", *arguments)
    assert result.exit_code == 2
    assert arguments[0].partition("=")[0].lstrip("-") in result.stderr


# Files


def test_pid_file_exists_while_serving(
    fake_supervisor: type[FakeSupervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    pid_file = tmp_path / "pid"
    original = FakeSupervisor.serve

    def serve_and_look(*arguments: Any, **options: Any) -> int:
        code = original(*arguments, **options)
        seen.append(pid_file.read_text())
        return code

    monkeypatch.setattr(supervisor, "serve", serve_and_look)
    assert run("serve", "/src", "/mnt", "--pid-file", str(pid_file)).exit_code == 0
    assert int(seen[0]) > 1
    assert not pid_file.exists()


def test_unwritable_log_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(level: str, file: Path) -> None:
        assert file.is_absolute()
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(log, "configure", refuse)
    result = run("serve", "/src", "/mnt", "--log-file", "x.log")
    assert result.exit_code == 5
    assert "x.log" in result.stderr and "Permission denied" in result.stderr


# umount


def test_umount_refuses_a_plain_directory(tmp_path: Path) -> None:
    result = run("umount", str(tmp_path))
    assert result.exit_code == 4
    assert "nothing is mounted there" in result.stderr


def test_umount_refuses_another_file_system() -> None:
    result = run("umount", "/proc")
    assert result.exit_code == 4
    assert "not llloop; use umount" in result.stderr


@pytest.mark.parametrize("lazy", [False, True])
def test_umount(monkeypatch: pytest.MonkeyPatch, lazy: bool) -> None:
    called: list[tuple[str, bool]] = []
    entry = mounts.MountEntry(1, (0, 5), "/mnt", "fuse.llloop", "/src")
    monkeypatch.setattr(mounts, "mounts", lambda: [entry])
    monkeypatch.setattr(MountIdentity, "unmount", lambda mount, lazy: called.append((mount.mountpoint, lazy)))
    result = run("umount", "/mnt", *(["--lazy"] if lazy else []))
    assert (result.exit_code, result.output) == (0, "")
    assert called == [("/mnt", lazy)]


def test_umount_of_a_busy_mount_suggests_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    tries: list[float] = []

    def busy(path: str, lazy: bool) -> None:
        tries.append(time.monotonic() - start)
        raise OSError(16, "Device or resource busy")

    entry = mounts.MountEntry(1, (0, 5), "/mnt", "fuse.llloop", "/src")
    monkeypatch.setattr(mounts, "mounts", lambda: [entry])
    monkeypatch.setattr(mounts, "unmount", busy)
    result = run("umount", "/mnt")
    assert result.exit_code == 4
    assert "busy" in result.stderr and "--lazy" in result.stderr
    assert len(tries) > 10 and tries[-1] >= 0.5, "a statfs(2) of another program makes a mount busy for a moment"
