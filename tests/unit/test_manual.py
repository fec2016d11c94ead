"""The generated manual pages and completions are up to date."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from llloop.cli import main
from scripts.manual import documents, escaped, shared_documents

CHECKOUT = Path(__file__).parents[2]
SHARE = CHECKOUT / "scripts" / "share"
PAGES = [name for name in shared_documents() if name.startswith("man/")]


@pytest.mark.parametrize("name", documents())
def test_generated_files_are_up_to_date(name: str) -> None:
    kept = (CHECKOUT / name).read_text(encoding="utf-8")
    assert kept == documents()[name], "an option or its help has changed: run scripts/man"


def test_there_are_no_other_files() -> None:
    kept = {str(path.relative_to(SHARE)) for path in SHARE.rglob("*") if path.is_file()}
    assert kept == set(shared_documents())


@pytest.mark.parametrize("name", PAGES)
def test_groff_accepts_each_page(name: str) -> None:
    groff = shutil.which("groff")
    assert groff, "groff is missing; scripts/setup --test installs groff-base"
    done = subprocess.run([groff, "-man", "-ww", "-z", "-Tutf8", SHARE / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_page_contains_each_option() -> None:
    page = SHARE / "man" / "llloop.1"
    groff = ["groff", "-man", "-Tascii", "-P-cbou", str(page)]
    text = subprocess.run(groff, capture_output=True, text=True, check=True).stdout
    for command in main.main.commands.values():
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert all(spelling in text for spelling in option.opts), option.opts


def test_text_is_escaped_for_roff() -> None:
    assert escaped(".so /etc/passwd\n'a\\b") == "\\&.so /etc/passwd\n\\(aqa\\eb"


def test_bash_completion_works() -> None:
    command = Path(sys.executable).parent / "llloop"
    script = (
        f'source "{SHARE}/bash/llloop"; complete -p llloop\n'
        f'COMP_WORDS=(llloop serve --work); COMP_CWORD=2; _llloop_completion "{command}"; echo "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True)
    registered, _, completed = done.stdout.partition("\n")
    assert registered.endswith(" -F _llloop_completion llloop"), done.stderr
    assert completed == "--workers\n", done.stderr
