"""What mount.llloop makes of mount options."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llloop.cli import serve
from llloop.errors import UsageError
from llloop.mount_helper import serve_arguments, split_options

# A mount by mount(8) is always a daemon, and each mount option stands for itself.
OTHERS = {"options", "daemon", "lifeline"}
SERVE_OPTIONS = [one for one in serve.params if isinstance(one, click.Option) and one.name not in OTHERS]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("ro", ["ro"]),
        ("rw,workers=8,,noexec", ["rw", "workers=8", "noexec"]),
        ('fsname="a,b",ro', ["fsname=a,b", "ro"]),
        (r"fsname=a\,b,ro", ["fsname=a,b", "ro"]),
        (r"fsname=a\\,ro", ["fsname=a\\", "ro"]),
        (r"fsname=a\b", [r"fsname=a\b"]),
        (r'fsname="a\"b"', ['fsname=a"b']),
        ("fsname=a b", ["fsname=a b"]),
        ("trailing\\", ["trailing\\"]),
    ],
)
def test_options_are_split_at_commas(text: str, parts: list[str]) -> None:
    assert split_options(text) == parts


@given(st.lists(st.text(min_size=1)))
def test_escaped_options_come_back_whole(parts: list[str]) -> None:
    def escaped(part: str) -> str:
        return "".join("\\" + character if character in '\\,"' else character for character in part)

    assert split_options(",".join(map(escaped, parts))) == parts


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
        *("defaults", "auto", "noauto", "user", "users", "owner", "group", "nofail", "_netdev", "user=ann", "rw"),
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
    ],
)
def test_what_makes_no_sense_is_refused(option: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        serve_arguments([option])
