"""`python -m llloop` is the `llloop` command."""

from .cli import main

main(prog_name="llloop")
