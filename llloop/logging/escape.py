"""Text that others chose (names of files, messages of other servers) made safe to print, log or send."""

from __future__ import annotations

from typing import Any


def printable(text: object) -> str:
    """Return *text* with every character that is not printable as its escape sequence of Python.

    That covers line breaks, which would begin a line of the log, a terminal's control sequences, marks that change
    the direction of writing, and the bytes of names that are not UTF-8.
    """
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode("ascii") for one in str(text)
    )


def printable_lines(text: str) -> str:
    """Return *text* as `printable` does, but with its line breaks."""
    return "\n".join(printable(line) for line in text.split("\n"))


def printable_texts(value: Any) -> Any:
    """Return *value* with every text in it as `printable` makes it, in lists and maps however deep, names included."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_texts(key): printable_texts(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_texts(one) for one in value]
    return value
