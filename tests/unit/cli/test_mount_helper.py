"""The translation of mount options into options of `llloop serve`."""

from __future__ import annotations

import click
import pytest

from llloop.cli.main import serve
from llloop.cli.mount_helper import serve_arguments
from llloop.errors import UsageError

# Options of serve that are not mount options.
NOT_MOUNT_OPTIONS = {"daemon", "check", "check_restart"}
SERVE_OPTIONS = [one for one in serve.params if isinstance(one, click.Option) and one.name not in NOT_MOUNT_OPTIONS]


def test_options_of_serve_are_mount_options() -> None:
    options = ["ro", "workers=8", "cache=never", "attr_timeout=2.5", "entry-timeout=3", "writeback", "log_file=/a b"]
    assert serve_arguments(options) == [
        *("--ro", "--workers=8", "--cache=never", "--attr-timeout=2.5", "--entry-timeout=3", "--writeback"),
        "--log-file=/a b",
    ]


@pytest.mark.parametrize(
    ("option", "argument"),
    [
        ("xattr", "--xattr"),
        ("noxattr", "--no-xattr"),
        ("no_xattr", "--no-xattr"),
        ("no-xattr", "--no-xattr"),
        ("allow_other", "--allow-other"),
        ("noallow_other", "--no-allow-other"),
        ("nonempty", "--nonempty"),
        ("read_only", "--read-only"),
    ],
)
def test_flags_and_their_spellings(option: str, argument: str) -> None:
    assert serve_arguments([option]) == [argument]


@pytest.mark.parametrize("option", SERVE_OPTIONS, ids=lambda option: option.opts[0])
def test_each_option_of_serve_is_a_mount_option(option: click.Option) -> None:
    name = str(option.name)
    (argument,) = serve_arguments([name if option.is_flag else f"{name}=1"])
    assert argument.partition("=")[0] in option.opts


@pytest.mark.parametrize(
    "option",
    [
        *("defaults", "auto", "noauto", "user", "users", "owner", "group", "nofail", "_netdev", "user=ann"),
        *("x-systemd.automount", "x-systemd.requires=/srv", "X-mount.mkdir=755", "comment=the photos", "relatime"),
    ],
)
def test_options_of_mount_itself_are_ignored(option: str) -> None:
    assert serve_arguments([option, "ro"]) == ["--ro"]


def test_kernel_options_are_passed_on() -> None:
    assert serve_arguments(["suid", "noexec"]) == ["-o", "suid", "-o", "noexec"]


def test_unknown_options_are_passed_on_or_ignored_if_sloppy() -> None:
    assert serve_arguments(["nonsense=1", "noexec"]) == ["-o", "nonsense=1", "-o", "noexec"]
    assert serve_arguments(["nonsense=1", "noexec"], sloppy=True) == ["-o", "noexec"]


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("workers", "needs a value"),
        ("ro=1", "takes no value"),
        ("remount", "cannot change the options"),
        ("remount=1", "cannot change the options"),
    ],
)
def test_invalid_options_are_refused(option: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        serve_arguments([option])


@pytest.mark.parametrize(
    "options",
    [
        *(["ro", "rw"], ["rw", "ro"], ["suid", "nosuid"], ["noexec", "exec"], ["noatime", "relatime"]),
        *(["strictatime", "nostrictatime"], ["xattr", "noxattr"], ["cache=never", "cache=always"]),
    ],
)
def test_contradicting_options_are_refused(options: list[str]) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        serve_arguments(options)


def test_repeated_option_is_accepted() -> None:
    assert serve_arguments(["ro", "ro", "cache=never", "cache=never"])[-1] == "--cache=never"


def test_rw_does_not_contradict_read_only() -> None:
    """mount(8) passes rw for every mount without ro; read_only overrides it (`llloop.mount_options.for_libfuse`)."""
    assert serve_arguments(["rw", "read_only"]) == ["-o", "rw", "--read-only"]


def test_options_implied_by_user_can_be_overridden() -> None:
    """mount(8), user: "implies noexec, nosuid, nodev unless overridden by subsequent options"."""
    assert serve_arguments(["noexec", "nosuid", "nodev", "user", "exec"]) == [
        *("-o", "nosuid", "-o", "nodev", "-o", "exec"),
    ]
    with pytest.raises(UsageError, match="exclude each other"):
        serve_arguments(["user", "exec", "noexec"])


def test_options_option_passes_kernel_options() -> None:
    """mount(8) of util-linux before 2.39 does not pass on suid, dev and the opposites of other flags."""
    assert serve_arguments(["rw", "options=suid", "options=dev"]) == ["-o", "rw", "--options=suid", "--options=dev"]


def test_repeatable_option() -> None:
    assert serve_arguments(["map_users=1:2:3", "map-users=4:5:6"]) == ["--map-users=1:2:3", "--map-users=4:5:6"]
