"""The values of options that name users and groups: parsing and validation."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable, Iterable
from itertools import combinations

from llloop.errors import UsageError
from llloop.linux.id_maps import IDS, MAX_RANGES, IdRange


def user(name: str) -> int:
    """Return the id of the user called *name*; KeyError if there is none."""
    return pwd.getpwnam(name).pw_uid


def group(name: str) -> int:
    """Return the id of the group called *name*; KeyError if there is none."""
    return grp.getgrnam(name).gr_gid


def checked(ranges: Iterable[str], option: str, number: Callable[[str], int]) -> tuple[str, ...]:
    """Return the ranges with numbers in place of names.

    Args:
        ranges: texts with one or more SRC:MNT:COUNT, separated by commas; or a single text.
        option: the option, for messages.
        number: returns the id for a name.

    Raises:
        UsageError: a range has another form, names nobody, or overlaps with another one.
    """
    given = [ranges] if isinstance(ranges, str) else ranges
    found = [_range(one, option, number) for text in given for one in str(text).split(",")]
    for one, other in combinations(found, 2):
        if one.overlaps(other):
            raise UsageError(f"{option} {one} and {option} {other} overlap: an id can stand for one other id only")
    if len(found) > MAX_RANGES:
        raise UsageError(f"{option} can be given at most {MAX_RANGES} times, not {len(found)} times")
    return tuple(map(str, found))


def checked_id(value: str | int, option: str, number: Callable[[str], int]) -> str:
    """Return a single id as digits.

    Args:
        value: an id or a name.
        option: the option, for messages.
        number: returns the id for a name.

    Raises:
        UsageError: it is too large, or names nobody.
    """
    found = _id(str(value), option, str(value), number)
    if found >= IDS:
        raise UsageError(f"{option} {value}: the largest id is {IDS - 1}")
    return str(found)


def parsed(text: str) -> IdRange:
    """Return a range from a text that `checked` has returned."""
    return IdRange(*map(int, text.split(":")))


def _range(text: str, option: str, number: Callable[[str], int]) -> IdRange:
    parts = text.split(":")
    if len(parts) != 3 or not _is_number(parts[2]):
        raise UsageError(f"{option} must be SRC:MNT:COUNT, such as 1000:5000:1 or alice:bob:1, not {text!r}")
    source, mount = (_id(part, option, text, number) for part in parts[:2])
    count = int(parts[2])
    if not count or max(source, mount) + count > IDS:
        raise UsageError(f"{option} {text}: COUNT must be at least 1, and the largest id is {IDS - 1}")
    return IdRange(source, mount, count)


def _id(part: str, option: str, text: str, number: Callable[[str], int]) -> int:
    if _is_number(part):
        return int(part)
    try:
        return number(part)
    except (KeyError, ValueError):
        kind = "group" if number is group else "user"
        raise UsageError(f"{option} {text}: there is no {kind} called {part!r}") from None


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) <= len(str(IDS))
