"""Mount options: parsing, translation for libfuse, contradictions."""

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
def test_escaped_options_are_unescaped(parts: list[str]) -> None:
    def escaped(part: str) -> str:
        return "".join("\\" + character if character in '\\,"' else character for character in part)

    assert split(",".join(map(escaped, parts))) == parts


def test_options_for_libfuse() -> None:
    assert for_libfuse(config(source="/data")) == ["default_permissions", "subtype=llloop", "fsname=/data", "rw"]
    made = for_libfuse(
        config(allow_other=True, read_only=True, nonempty=True, options=("noatime", "max_read=4096"), fsname="name")
    )
    assert made[2:] == ["fsname=name", "noatime", "max_read=4096", "ro", "allow_other", "nonempty"]


def test_fsname_cannot_inject_options() -> None:
    assert "fsname=a\\,suid\\,b\\\\\\,dev" in for_libfuse(config(fsname="a,suid,b\\,dev"))


def test_non_ascii_fsname_is_replaced_and_options_are_refused() -> None:
    assert "fsname=/d?ta" in for_libfuse(config(source="/dåta"))
    with pytest.raises(UsageError, match="ASCII"):
        config(options=("foo=ü",))


@given(st.lists(st.sampled_from(sorted(KERNEL - {"ro", "rw"})), unique=True))
def test_order_of_options_is_kept(options: list[str]) -> None:
    try:
        made = config(options=options)
    except UsageError:
        return
    assert [one for one in for_libfuse(made) if one in options] == options


@pytest.mark.parametrize(
    "options", [("rw", "ro"), ("ro,rw",), ("noexec", "dev", "exec"), ("suid,nosuid",), ("atime", "noatime")]
)
def test_contradicting_options_are_refused(options: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        config(options=options)


@pytest.mark.parametrize("options", [(), ("rw",), ("noexec", "rw"), "rw,dirsync"])
def test_read_only_overrides_rw(options: Any) -> None:
    made = for_libfuse(config(read_only=True, options=options))
    assert "ro" in made and "rw" not in made


def test_ro_is_read_only() -> None:
    assert config(options=("ro",)).read_only
    assert not config(options=("rw",)).read_only


def test_duplicate_and_empty_options_are_dropped() -> None:
    assert config(options=("noexec,,noexec", "", "nodev,noexec")).options == ("noexec", "nodev")


@pytest.mark.parametrize(
    "option",
    [
        *("nonsense", "nonsense=1", "ro=1", "max_read=", "max_read=x", "remount", "debug", "blkdev", "big_writes"),
        *("allow_root", "allow_other", "auto_unmount", "fsname=a", "subtype=a", "nonempty", "noexec\\,suid"),
    ],
)
def test_unsupported_options_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match="mount option") as raised:
        config(options=(option,))
    assert option.replace("\\", "") in str(raised.value)


@pytest.mark.parametrize("option", ["suid", "dev"])
def test_options_for_root_are_refused_to_other_users(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(options=(option,))
    check_user(config(options=("noexec",)))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_user(made)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match=f"{option}: only root"):
        check_user(made)
