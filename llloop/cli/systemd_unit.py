"""The systemd template unit and drop-in that `llloop systemd-unit` prints (systemd.service(5), systemd.unit(5))."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

from llloop.errors import HostError, UsageError

_UNIT = "llloop@.service"
# The command in the installed unit file.
_COMMAND = "/usr/local/bin/llloop"


def unit() -> str:
    """Return the template unit llloop@.service with the path of the running command.

    Raises:
        HostError: the unit file is not installed.
    """
    path = _installed(_UNIT)
    if path is None:
        raise HostError(f"{_UNIT} is not part of this installation; it is in the source code, in scripts/systemd")
    return path.read_text(encoding="utf-8").replace(_COMMAND, " ".join(_word(part) for part in _this_command()))


def drop_in(source: str, mountpoint: str) -> str:
    """Return a drop-in that makes an instance wait for the file systems of its source and mount point.

    Args:
        source: the instance's source directory.
        mountpoint: its mount point.

    Raises:
        UsageError: a unit file cannot contain a path.
    """
    # Require the parent of the mount point only. Once the instance has mounted, systemd has a mount unit for the mount
    # point itself. An instance that required its own mount could not be restarted.
    places = (os.path.abspath(source), os.path.dirname(os.path.abspath(mountpoint)))
    return "[Unit]\n" + "".join(f"RequiresMountsFor={_path(place)}\n" for place in places)


def _installed(name: str) -> Path | None:
    # In an editable installation, data files stay in the checkout.
    beside = Path(__file__).parents[2] / "scripts" / "systemd" / name
    if beside.is_file():
        return beside
    try:
        files = importlib.metadata.files("llloop") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == name), None)


def _this_command() -> list[str]:
    program = os.path.abspath(sys.argv[0])
    if os.path.basename(program) == "llloop" and os.access(program, os.X_OK):
        return [program]
    return [sys.executable, "-m", "llloop"]


def _word(text: str) -> str:
    """Quote a word of a command line in a unit file, in which a backslash escapes."""
    escaped = text.replace("\\", "\\\\").replace("%", "%%")
    return escaped if " " not in text and '"' not in text else '"' + escaped.replace('"', '\\"') + '"'


def _path(path: str) -> str:
    """Quote a path in a list of paths in a unit file, in which a backslash does not escape."""
    if "\n" in path:
        raise UsageError(f"{path!r}: a unit file cannot hold a path with a line break")
    quoted = '"\'"'.join(f"'{part}'" for part in path.split("'")) if "'" in path else f'"{path}"'
    return quoted.replace("%", "%%")
