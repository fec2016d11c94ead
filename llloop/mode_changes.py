"""The values of --mode and --create-mode: changes of the permissions of files, in the syntax of bindfs and chmod(1)."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable

from llloop.errors import UsageError

_ALL = 0o777
_OCTAL = re.compile("[0-7]{1,4}")
_CLAUSE = re.compile("([ugoafd]*)((?:[-+=][rwxXDugo]*)+)")
_OPERATION = re.compile("([-+=])([rwxXDugo]*)")
_WHO = {"u": 0o700, "g": 0o070, "o": 0o007, "a": 0o777}
_PERMISSIONS = {"r": 0o444, "w": 0o222, "x": 0o111}
_SHIFTS = {"u": 6, "g": 3, "o": 0}

_Change = Callable[[int, int, bool], int]


class ModeChange:
    """A change of permissions, such as ``u=rwX,go=rX`` or ``0644,a+X``.

    Clauses are separated by commas or colons and applied in order. Unlike with chmod(1), ``X`` and the letters ``u``,
    ``g`` and ``o`` after the sign mean the permissions before the first clause, as with bindfs. ``D`` is ``x`` for
    directories. ``f`` and ``d`` before the sign restrict a clause to files and to directories.

    Args:
        text: the change.
        option: the option, for messages.

    Raises:
        UsageError: *text* is none.
    """

    def __init__(self, text: str, option: str) -> None:
        changes = [_clause(clause, text, option) for clause in re.split("[,:]", text)]
        self._files, self._directories = (
            [_applied(changes, permissions, is_directory) for permissions in range(_ALL + 1)]
            for is_directory in (False, True)
        )

    def applied(self, mode: int) -> int:
        """Return a mode with changed permissions. Symlinks have none, so theirs stay."""
        if stat.S_ISLNK(mode):
            return mode
        table = self._directories if stat.S_ISDIR(mode) else self._files
        return mode & ~_ALL | table[mode & _ALL]


def _applied(changes: list[_Change], permissions: int, is_directory: bool) -> int:
    result = permissions
    for change in changes:
        result = change(result, permissions, is_directory)
    return result


def _clause(clause: str, text: str, option: str) -> _Change:
    if _OCTAL.fullmatch(clause):
        number = int(clause, 8)
        if number > _ALL:
            raise UsageError(
                f"{option} {text}: {clause} is more than 777; set-ID bits and the sticky bit stay as they are"
            )
        return lambda result, original, is_directory: number
    parts = _CLAUSE.fullmatch(clause)
    if parts is None:
        raise UsageError(
            f"{option} must be permissions such as 0644, u=rwX,go=rX or a+rD,fgo-x, not {text!r}"
            + (f" ({clause!r})" if clause != text else "")
        )
    who, operations = parts[1], _OPERATION.findall(parts[2])
    mask = 0
    for letter in who:
        mask |= _WHO.get(letter, 0)
    if not who.strip("fd"):
        mask = _ALL
    kinds = {letter == "d" for letter in who if letter in "fd"} or {False, True}

    def change(result: int, original: int, is_directory: bool) -> int:
        if is_directory not in kinds:
            return result
        for sign, letters in operations:
            bits = mask & _bits(letters, original, is_directory)
            if sign == "+":
                result |= bits
            elif sign == "-":
                result &= ~bits
            else:
                result = result & ~mask | bits
        return result

    return change


def _bits(letters: str, original: int, is_directory: bool) -> int:
    """Return the permissions, for user, group and others alike, that the letters after a sign mean."""
    bits = 0
    for letter in letters:
        if letter in _SHIFTS:
            bits |= 0o111 * (original >> _SHIFTS[letter] & 7)
        elif letter == "X":
            bits |= 0o111 if is_directory or original & 0o111 else 0
        elif letter == "D":
            bits |= 0o111 if is_directory else 0
        else:
            bits |= _PERMISSIONS[letter]
    return bits
