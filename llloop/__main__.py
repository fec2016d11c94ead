"""`python -m llloop` is the `llloop` command."""

from llloop.cli.main import main

main(prog_name="llloop")
