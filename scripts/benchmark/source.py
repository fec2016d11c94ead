"""The source tree of all contenders; it is the same in each run."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tarfile
import time
from pathlib import Path

from .sizes import MIB, Sizes


def make(source: Path, beside: Path, sizes: Sizes) -> None:
    """Fill the source.

    Args:
        source: an empty directory.
        beside: the directory for the archive, which is not read through a mount.
        sizes: the amounts.
    """
    (source / "scratch").mkdir()
    _data(source / "data", sizes.data)
    for number in range(4):
        _data(source / f"data{number}", sizes.share)
    _tree(source / "tree", sizes)
    listed = source / "listed"
    listed.mkdir()
    for number in range(sizes.listed):
        (listed / f"an-entry-of-ordinary-length-{number:06}").touch()
    work_tree = source / "work-tree"
    for name, text in _texts(sizes.archive):
        _write(work_tree / name, text)
    with tarfile.open(beside / "archive.tar", "w") as archive:
        for name, text in _texts(sizes.archive):
            member = tarfile.TarInfo(f"archive/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    _program(source / "program", sizes.compiled)
    _repository(work_tree)


def _data(path: Path, size: int) -> None:
    chunk = random.Random(str(path.name)).randbytes(MIB)
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(chunk)


def _write(path: Path, text: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)


def _tree(top: Path, sizes: Sizes) -> None:
    for directory in range(sizes.directories):
        for file in range(sizes.files):
            _write(top / f"d{directory:03}" / f"f{file:03}", b"x" * 4096)


def _texts(count: int) -> list[tuple[str, bytes]]:
    """Create files like those of a source tree: 30 files in each directory, 1 to 16 KiB, most of them small."""
    dice = random.Random("texts")
    return [
        (f"part{number // 300:02}/module{number // 30:03}/file{number:04}.c", b"text line\n" * dice.choice(_LINES))
        for number in range(count)
    ]


_LINES = (100, 100, 200, 200, 400, 400, 800, 1600)


def _repository(work_tree: Path) -> None:
    """Commit the work tree.

    Contenders may show other inode numbers and change times. So git compares only sizes and modification times.
    Otherwise it would read all files again for each contender.
    """
    # git must read a file that is as new as the index, because it may have changed since.
    time.sleep(1.1)
    for words in (
        ["init", "--quiet"],
        ["config", "core.checkStat", "minimal"],
        ["config", "core.trustctime", "false"],
        ["add", "."],
        ["-c", "user.name=bench", "-c", "user.email=bench@localhost", "commit", "--quiet", "--message", "all"],
    ):
        subprocess.run(
            ["git", *words],
            cwd=work_tree,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # Ignore the user's settings, for example hooks or a file system monitor.
            env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"},
        )


def _program(top: Path, count: int) -> None:
    """Create a C program whose files include many headers, because a compiler mostly looks up headers."""
    headers = [f"include/part{number % 8}/header{number:03}.h" for number in range(60)]
    for number, name in enumerate(headers):
        _write(
            top / name, f"#pragma once\nstatic inline int header{number}(int x) {{ return x + {number}; }}\n".encode()
        )
    includes = "".join(f'#include "{name.removeprefix("include/")}"\n' for name in headers)
    calls = " + ".join(f"header{number}(x)" for number in range(60))
    for number in range(count):
        text = f"#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n{includes}"
        text += f"int unit{number}(int x) {{ return {calls}; }}\n"
        if number == 0:
            text += 'int main(void) { printf("%d\\n", unit0(1)); return 0; }\n'
        _write(top / f"unit{number:02}.c", text.encode())
