"""What mount.llloop makes of mount options."""

from __future__ import annotations

import click
import pytest

from llloop.cli.main import serve
from llloop.cli.mount_helper import serve_arguments
from llloop.errors import UsageError

# A mount by mount(8) is always a daemon, and each mount option stands for itself.
OTHERS = {"daemon", "check", "check_restart"}
SERVE_OPTIONS = [one for one in serve.params if isinstance(one, click.Option) and one.name not in OTHERS]


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
def test_switches(option: str, argument: str) -> None:
    assert serve_arguments([option]) == [argument]


@pytest.mark.parametrize("option", SERVE_OPTIONS, ids=lambda option: option.opts[0])
def test_every_option_of_serve_can_be_given_in_fstab(option: click.Option) -> None:
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
def test_what_mount_itself_acts_on_is_ignored(option: str) -> None:
    assert serve_arguments([option, "ro"]) == ["--ro"]


def test_what_the_kernel_acts_on_is_passed_on() -> None:
    assert serve_arguments(["suid", "noexec"]) == ["-o", "suid", "-o", "noexec"]


def test_what_nobody_knows_is_left_to_libfuse_to_refuse_or_ignored_if_asked() -> None:
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
def test_what_makes_no_sense_is_refused(option: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        serve_arguments([option])


@pytest.mark.parametrize(
    "options",
    [
        *(["ro", "rw"], ["rw", "ro"], ["suid", "nosuid"], ["noexec", "exec"], ["noatime", "relatime"]),
        *(["strictatime", "nostrictatime"], ["xattr", "noxattr"], ["cache=never", "cache=always"]),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: list[str]) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        serve_arguments(options)


def test_the_same_twice_is_no_contradiction() -> None:
    assert serve_arguments(["ro", "ro", "cache=never", "cache=never"])[-1] == "--cache=never"


def test_mount_says_rw_of_whatever_is_not_ro() -> None:
    """So that is no contradiction to llloop's own option, which wins (see `llloop.mount_options.for_libfuse`)."""
    assert serve_arguments(["rw", "read_only"]) == ["-o", "rw", "--read-only"]


def test_what_a_users_mount_implies_can_be_taken_back() -> None:
    """mount(8), user: "implies noexec, nosuid, nodev unless overridden by subsequent options"."""
    assert serve_arguments(["noexec", "nosuid", "nodev", "user", "exec"]) == [
        *("-o", "nosuid", "-o", "nodev", "-o", "exec"),
    ]
    with pytest.raises(UsageError, match="exclude each other"):
        serve_arguments(["user", "exec", "noexec"])


def test_what_mount_keeps_for_itself_can_be_given_all_the_same() -> None:
    """util-linux before 2.39 does not tell its helpers of suid, dev and the other opposites of a flag."""
    assert serve_arguments(["rw", "options=suid", "options=dev"]) == ["-o", "rw", "--options=suid", "--options=dev"]
