"""The mount options of -o: parsing, validation, contradictions, and translation for libfuse."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llloop.errors import HostError, UsageError
from llloop.linux import mount_api

if TYPE_CHECKING:
    from llloop.config import ServeConfig

# The kernel's options that libfuse 2.9 passes on (its lib/mount.c), in groups of options that exclude each other.
_KERNEL_GROUPS = (
    *(("ro", "rw"), ("suid", "nosuid"), ("dev", "nodev"), ("exec", "noexec"), ("sync", "async"), ("atime", "noatime")),
    ("dirsync",),
)
KERNEL = frozenset(option for group in _KERNEL_GROUPS for option in group)
# Further options of mount(8) without effect on a FUSE mount. Contradictions among them are refused as well.
_ATIME_GROUPS = (
    ("noatime", "relatime", "strictatime"),
    *(("relatime", "norelatime"), ("strictatime", "nostrictatime"), ("diratime", "nodiratime")),
    ("lazytime", "nolazytime"),
)
WITHOUT_EFFECT = frozenset(option for group in _ATIME_GROUPS for option in group) - KERNEL

_MAX_READ = re.compile(r"max_read=([0-9]+)")
_LARGEST_NUMBER = 2**32 - 1  # the kernel takes it as an unsigned int
_LONGEST_PARAMETER = 255  # bytes, of fsconfig(2)
# Options of libfuse that llloop sets itself or does not support, and what to do instead.
_REFUSED = {
    "allow_other": "use --allow-other or --no-allow-other",
    # libfuse checks this in its own request loop, which llloop does not use: all users would get access.
    "allow_root": "llloop does not support it; use --allow-other or --no-allow-other",
    "auto_unmount": "it is not needed: llloop detaches a mount when its server dies",
    "fsname": "use --fsname NAME",
    "nonempty": "use --nonempty",
    "remount": "llloop cannot change the options of a mount; unmount it, then mount it again",
    "subtype": "llloop sets it itself",
}
# An ordinary user's fusermount silently ignores these options.
_ONLY_ROOT = ("suid", "dev")


def split(text: str) -> list[str]:
    """Split the argument of -o at commas; drop empty options.

    A comma is part of a value within double quotes, as for mount(8), or after a backslash, as for libfuse.
    """
    parts, part, quoted = [], "", False
    characters = iter(text)
    for character in characters:
        if character == "\\":
            following = next(characters, "")
            part += following if following in ("\\", ",", '"') else character + following
        elif character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            parts.append(part)
            part = ""
        else:
            part += character
    return [one for one in (*parts, part) if one]


def refuse_contradictions(options: Iterable[str]) -> None:
    """Check that no two of *options* exclude each other.

    Raises:
        UsageError: two options exclude each other.
    """
    given = list(dict.fromkeys(options))
    sizes = [option for option in given if _MAX_READ.fullmatch(option)]
    for group in (*_KERNEL_GROUPS, *_ATIME_GROUPS, sizes):
        found = [option for option in given if option in group]
        if len(found) > 1:
            raise UsageError(f"mount options {' and '.join(found)} exclude each other; give one of them")


def checked(options: Iterable[str]) -> tuple[str, ...]:
    """Return single options without duplicates, in their order.

    Raises:
        UsageError: an option does not exist, is not supported, or excludes another.
    """
    single = tuple(dict.fromkeys(part for option in options for part in split(option)))
    for option in single:
        name = option.partition("=")[0]
        if name in _REFUSED:
            raise UsageError(f"mount option {option}: {_REFUSED[name]}")
        if not option.isascii():
            raise UsageError(f"mount option {option!r}: it may contain ASCII characters only")
        size = _MAX_READ.fullmatch(option)
        if size is not None and int(size[1]) > _LARGEST_NUMBER:
            raise UsageError(f"mount option {option}: the number must be at most {_LARGEST_NUMBER}")
        if option not in KERNEL and option != "default_permissions" and size is None:
            raise UsageError(
                f"mount option {option}: there is no such option; the options are: "
                + ", ".join(one for group in _KERNEL_GROUPS for one in group)
            )
    refuse_contradictions(single)
    return single


def check_user(config: ServeConfig) -> None:
    """Check that this user may use the options.

    Raises:
        HostError: only root may use an option.
    """
    if os.geteuid() != 0:
        for option in config.options:
            if option in _ONLY_ROOT:
                raise HostError(f"mount option {option}: only root may use it")


def for_kernel(config: ServeConfig) -> tuple[dict[str, str | None], int]:
    """Return the options of root's mount as parameters of fsconfig(2), and as MOUNT_ATTR_ flags of the mount."""
    parameters: dict[str, str | None] = {"subtype": "llloop", "user_id": "0", "group_id": "0"}
    parameters["source"] = os.fsdecode(os.fsencode(config.fsname)[:_LONGEST_PARAMETER])
    for option in config.options:
        if size := _MAX_READ.fullmatch(option):
            parameters["max_read"] = size[1]
    switches = {"default_permissions": True, "ro": config.read_only, "allow_other": config.allow_other}
    switches |= {option: option in config.options for option in ("sync", "dirsync")}
    parameters |= dict.fromkeys(name for name, on in switches.items() if on)
    attributes = 0
    for flag, on in (
        (mount_api.MOUNT_ATTR_RDONLY, config.read_only),
        (mount_api.MOUNT_ATTR_NOSUID, "suid" not in config.options),
        (mount_api.MOUNT_ATTR_NODEV, "dev" not in config.options),
        (mount_api.MOUNT_ATTR_NOEXEC, "noexec" in config.options),
        (mount_api.MOUNT_ATTR_NOATIME, "noatime" in config.options),
    ):
        attributes |= flag if on else 0
    return parameters, attributes


def for_libfuse(config: ServeConfig) -> list[str]:
    """Return all options of a mount for libfuse, in order."""
    # libfuse splits options at commas unless they are escaped, and llfuse passes only ASCII.
    fsname = config.fsname.encode("ascii", "replace").decode().replace("\\", "\\\\").replace(",", "\\,")
    options = ["default_permissions", "subtype=llloop", f"fsname={fsname}"]
    # --read-only overrides rw, because mount(8) passes rw for every mount without ro.
    options += [option for option in config.options if option not in ("ro", "rw", "default_permissions")]
    options.append("ro" if config.read_only else "rw")
    if config.allow_other:
        options.append("allow_other")
    if config.nonempty:
        options.append("nonempty")
    return options
