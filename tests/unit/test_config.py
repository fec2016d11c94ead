"""The configuration of a mount: defaults, validation, help texts."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llloop.config import MAX_WORKERS, Cache, IoKind, LoopKind, ServeConfig, help_text, usable_cpus
from llloop.errors import MountpointError, SourceError, UsageError


def make(**options: Any) -> ServeConfig:
    return ServeConfig(**{"source": "/src", "mountpoint": "/mnt", **options})


def test_defaults() -> None:
    made = make()
    assert made.workers == min(usable_cpus(), MAX_WORKERS)
    assert made.allow_other is (os.geteuid() == 0)
    assert made.cache is Cache.AUTO
    assert (made.attr_timeout, made.entry_timeout, made.negative_timeout) == (1.0, 1.0, 1.0)
    assert made.xattr is True
    assert made.loop is LoopKind.OWN
    assert made.io is IoKind.WORKERS
    assert made.options == ()
    assert made.fsname == "/src"
    assert not (made.writeback or made.read_only or made.nonempty or made.replace_dead)


def test_config_has_no_none_values() -> None:
    made = make()
    assert [one.name for one in fields(made) if getattr(made, one.name) is None] == []


def test_default_workers_follow_usable_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    assert make().workers == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(1000)))
    assert make().workers == MAX_WORKERS


@pytest.mark.parametrize(("uid", "expected"), [(0, True), (1000, False)])
def test_allow_other_defaults_to_on_for_root(monkeypatch: pytest.MonkeyPatch, uid: int, expected: bool) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert make().allow_other is expected
    assert make(allow_other=not expected).allow_other is not expected


@pytest.mark.parametrize(("cache", "seconds"), [(Cache.NEVER, 0), (Cache.AUTO, 1), (Cache.ALWAYS, 86400)])
def test_default_timeouts_follow_the_cache_mode(cache: Cache, seconds: float) -> None:
    made = make(cache=cache)
    assert made.attr_timeout == made.entry_timeout == made.negative_timeout == seconds
    made = make(cache=cache, entry_timeout=7, negative_timeout=0)
    assert (made.attr_timeout, made.entry_timeout, made.negative_timeout) == (seconds, 7, 0)


def test_fsname_defaults_to_the_source_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(source="some/where").fsname == os.path.abspath("some/where")
    with pytest.raises(UsageError, match="--fsname"):
        make(fsname="")


@pytest.mark.parametrize("options", [{"source": ""}, {"mountpoint": ""}, {"source": "a\0b"}, {"source": None}])
def test_invalid_directories_are_refused(options: dict[str, Any]) -> None:
    """An empty name, e.g. of an unset variable, must not mean the current directory."""
    with pytest.raises((SourceError, MountpointError), match="must be a non-empty string"):
        make(**options)


@pytest.mark.parametrize("name", ["read_only", "xattr", "writeback", "nonempty", "replace_dead", "allow_other"])
def test_flags_must_be_booleans(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        make(**{name: "no"})


def test_mount_options_may_be_one_string() -> None:
    assert make(options="noexec,noatime").options == ("noexec", "noatime")


@pytest.mark.parametrize("workers", [1, 2, MAX_WORKERS])
def test_valid_workers_are_accepted(workers: int) -> None:
    assert make(workers=workers).workers == workers


@given(st.integers().filter(lambda number: not 1 <= number <= MAX_WORKERS))
def test_invalid_workers_are_refused(workers: int) -> None:
    with pytest.raises(UsageError, match=f"--workers.*{workers}"):
        make(workers=workers)


TIMEOUTS = ["attr_timeout", "entry_timeout", "negative_timeout"]


@pytest.mark.parametrize("name", TIMEOUTS)
@pytest.mark.parametrize("seconds", [-1, -0.001, float("nan"), float("inf"), -float("inf"), 2.0**31 + 1, 1e300])
def test_invalid_timeouts_are_refused(name: str, seconds: float) -> None:
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
        make(**{name: seconds})


@given(st.sampled_from(TIMEOUTS), st.floats(0, 2**31))
def test_valid_timeouts_are_accepted(name: str, seconds: float) -> None:
    assert getattr(make(**{name: seconds}), name) == seconds


@pytest.mark.parametrize("name", ["cache", "wake_latency", "chown"])
def test_unknown_values_are_refused_with_the_name_of_the_option(name: str) -> None:
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} must be one of "):
        make(**{name: "nonsense"})


def test_writeback_excludes_kernel_io() -> None:
    with pytest.raises(UsageError, match=r"--writeback.*--io kernel"):
        make(writeback=True, io=IoKind.KERNEL)
    assert make(writeback=True, io=IoKind.AUTO).writeback


def test_config_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        make().workers = 3  # type: ignore[misc]


def test_each_option_has_a_help_text_with_its_default() -> None:
    for one in fields(ServeConfig):
        if one.name in ("source", "mountpoint"):
            continue
        text = help_text(one.name)
        assert len(text) > 40 and text.endswith("."), one.name
        if one.name not in ("loop", "slots"):  # hidden ones
            assert "Default: " in text, one.name


def test_help_text_of_unknown_option_fails() -> None:
    with pytest.raises(KeyError):
        help_text("nonsense")
