"""Escaping of untrusted text (file names, messages of other servers) before it is printed, logged or sent."""

from __future__ import annotations

from typing import Any


def printable(text: object) -> str:
    """Return *text* with each unprintable character replaced by its Python escape sequence.

    Unprintable are line breaks, which would forge a log line, control sequences of terminals, marks that change the
    text direction, and bytes of names that are not UTF-8.
    """
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode("ascii") for one in str(text)
    )


def printable_lines(text: str) -> str:
    """Return *text* as `printable` does, but keep line breaks."""
    return "\n".join(printable(line) for line in text.split("\n"))


def printable_texts(value: Any) -> Any:
    """Return *value* with `printable` applied to every string in it, including keys and nested lists and dicts."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_texts(key): printable_texts(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_texts(one) for one in value]
    return value
