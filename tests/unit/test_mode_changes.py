"""The values of --mode and --create-mode."""

from __future__ import annotations

import stat

import pytest

from llloop.errors import UsageError
from llloop.mode_changes import ModeChange

FILE, DIRECTORY = stat.S_IFREG, stat.S_IFDIR


@pytest.mark.parametrize(
    ("text", "mode", "expected"),
    [
        ("0640", FILE | 0o777, FILE | 0o640),
        ("640", DIRECTORY | 0o1777, DIRECTORY | 0o1640),
        ("u=rwX,go=rX", FILE | 0o600, FILE | 0o644),
        ("u=rwX,go=rX", FILE | 0o700, FILE | 0o755),
        ("u=rwX,go=rX", DIRECTORY | 0o600, DIRECTORY | 0o755),
        ("u=rwX:go=rX", FILE | 0o600, FILE | 0o644),
        ("0644,a+X", FILE | 0o755, FILE | 0o755),
        ("0644,a+X", FILE | 0o666, FILE | 0o644),
        ("0600,u+D", DIRECTORY | 0o755, DIRECTORY | 0o700),
        ("0600,u+D", FILE | 0o755, FILE | 0o600),
        ("og-x,og+rD,u=rwX,g+rw", FILE | 0o711, FILE | 0o764),
        ("-w", FILE | 0o666, FILE | 0o444),
        ("fa-x,da=rx", FILE | 0o777, FILE | 0o666),
        ("fa-x,da=rx", DIRECTORY | 0o777, DIRECTORY | 0o555),
        ("g=u,o=g", FILE | 0o640, FILE | 0o664),
        ("u+x-w", FILE | 0o600, FILE | 0o500),
        ("go=", FILE | 0o4755, FILE | 0o4700),
        ("0000", stat.S_IFLNK | 0o777, stat.S_IFLNK | 0o777),
    ],
)
def test_changes(text: str, mode: int, expected: int) -> None:
    assert oct(ModeChange(text, "--mode").applied(mode)) == oct(expected)


@pytest.mark.parametrize("text", ["", "u", "rw", "u=rwz", "0644,", "08", "01777", "u+s", "+t", "12345", "u=r,,g=r"])
def test_refusals(text: str) -> None:
    with pytest.raises(UsageError, match="--mode"):
        ModeChange(text, "--mode")
