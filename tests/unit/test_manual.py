"""The manual pages and completions that are kept are those of the commands as they are."""

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
def test_what_is_kept_is_what_the_commands_say(name: str) -> None:
    kept = (CHECKOUT / name).read_text(encoding="utf-8")
    assert kept == documents()[name], "an option or its help has changed: run scripts/man"


def test_nothing_else_is_kept() -> None:
    kept = {str(path.relative_to(SHARE)) for path in SHARE.rglob("*") if path.is_file()}
    assert kept == set(shared_documents())


@pytest.mark.parametrize("name", PAGES)
def test_roff_has_nothing_to_say_against_a_page(name: str) -> None:
    groff = shutil.which("groff")
    assert groff, "groff is missing; scripts/setup --test installs groff-base"
    done = subprocess.run([groff, "-man", "-ww", "-z", "-Tutf8", SHARE / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_option_is_in_the_page_as_it_is_typed() -> None:
    page = SHARE / "man" / "llloop.1"
    groff = ["groff", "-man", "-Tascii", "-P-cbou", str(page)]
    text = subprocess.run(groff, capture_output=True, text=True, check=True).stdout
    for command in main.main.commands.values():
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert all(spelling in text for spelling in option.opts), option.opts


def test_text_is_never_taken_for_a_request() -> None:
    assert escaped(".so /etc/passwd\n'a\\b") == "\\&.so /etc/passwd\n\\(aqa\\eb"


def test_bash_completes_with_what_is_kept() -> None:
    command = Path(sys.executable).parent / "llloop"
    script = (
        f'source "{SHARE}/bash/llloop"; complete -p llloop\n'
        f'COMP_WORDS=(llloop serve --work); COMP_CWORD=2; _llloop_completion "{command}"; echo "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=30)
    registered, completed = done.stdout.splitlines()
    assert registered.endswith(" -F _llloop_completion llloop"), done.stderr
    assert completed == "--workers"
