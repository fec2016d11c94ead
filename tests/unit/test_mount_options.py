"""Mount options: how they are written, which there are, and what becomes of them together."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llloop.config import ServeConfig
from llloop.errors import HostError, UsageError
from llloop.mount_options import KERNEL, check_user, for_libfuse, split


def config(**options: Any) -> ServeConfig:
    return ServeConfig(**{"source": "/src", "mountpoint": "/mnt", "allow_other": False, **options})


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
    assert split(text) == parts


@given(st.lists(st.text(min_size=1)))
def test_escaped_options_come_back_whole(parts: list[str]) -> None:
    def escaped(part: str) -> str:
        return "".join("\\" + character if character in '\\,"' else character for character in part)

    assert split(",".join(map(escaped, parts))) == parts


def test_what_libfuse_is_told() -> None:
    assert for_libfuse(config(source="/data")) == ["default_permissions", "subtype=llloop", "fsname=/data", "rw"]
    made = for_libfuse(
        config(allow_other=True, read_only=True, nonempty=True, options=("noatime", "max_read=4096"), fsname="name")
    )
    assert made[2:] == ["fsname=name", "noatime", "max_read=4096", "ro", "allow_other", "nonempty"]


def test_a_name_cannot_smuggle_options_in() -> None:
    assert "fsname=a\\,suid\\,b\\\\\\,dev" in for_libfuse(config(fsname="a,suid,b\\,dev"))


def test_only_ascii_is_passed_on() -> None:
    assert "fsname=/d?ta" in for_libfuse(config(source="/dåta"))
    with pytest.raises(UsageError, match="ASCII"):
        config(options=("foo=ü",))


@given(st.lists(st.sampled_from(sorted(KERNEL - {"ro", "rw"})), unique=True))
def test_their_order_is_kept(options: list[str]) -> None:
    try:
        made = config(options=options)
    except UsageError:
        return
    assert [one for one in for_libfuse(made) if one in options] == options


@pytest.mark.parametrize(
    "options", [("rw", "ro"), ("ro,rw",), ("noexec", "dev", "exec"), ("suid,nosuid",), ("atime", "noatime")]
)
def test_options_that_exclude_each_other_are_refused(options: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        config(options=options)


@pytest.mark.parametrize("options", [(), ("rw",), ("noexec", "rw"), "rw,dirsync"])
def test_read_only_wins(options: Any) -> None:
    made = for_libfuse(config(read_only=True, options=options))
    assert "ro" in made and "rw" not in made


def test_ro_is_read_only() -> None:
    assert config(options=("ro",)).read_only
    assert not config(options=("rw",)).read_only


def test_each_is_passed_on_once_and_empty_ones_are_none() -> None:
    assert config(options=("noexec,,noexec", "", "nodev,noexec")).options == ("noexec", "nodev")


@pytest.mark.parametrize(
    "option",
    [
        *("nonsense", "nonsense=1", "ro=1", "max_read=", "max_read=x", "remount", "debug", "blkdev", "big_writes"),
        *("allow_root", "allow_other", "auto_unmount", "fsname=a", "subtype=a", "nonempty", "noexec\\,suid"),
    ],
)
def test_what_cannot_be_had_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match="mount option") as raised:
        config(options=(option,))
    assert option.replace("\\", "") in str(raised.value)


@pytest.mark.parametrize("option", ["suid", "dev"])
def test_what_is_roots_is_refused_to_others(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(options=(option,))
    check_user(config(options=("noexec",)))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_user(made)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match=f"{option}: only root"):
        check_user(made)
