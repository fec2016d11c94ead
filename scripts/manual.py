"""Manual pages (man(7)), shell completions and the page of options, made of what the commands say of themselves.

They are made beforehand and kept with the sources, since a build has no llfuse to import the commands with.
click-man would make a page of each subcommand, and would not know mount.llloop's list of mount options.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from llloop.cli import main, mount_helper
from llloop.config import ServeConfig
from llloop.version import __version__

_SHARE = "scripts/share/"
_COMPLETIONS = {"bash": "bash/llloop", "zsh": "zsh/_llloop", "fish": "fish/llloop.fish"}
_OPTIONS_HEAD = """<!-- Made by scripts/man from llloop/config.py and the command. Do not edit. -->
# Options

`llloop serve [OPTION...] SRC MNT` mirrors the directory SRC at MNT. Both directories must exist. Below, "the source" is
SRC and "the mount" is MNT. For example:

```
llloop serve --workers 8 --cache always /srv/photos /mnt/photos
```

[Choosing a mode](modes.md) says which options to use. For each option this page gives the environment variable, the
argument of `llloop.mount()` in Python, and the mount option in `/etc/fstab`.

"""
_FURTHER = r""".SH ENVIRONMENT
.TP
.B LLLOOP_SERVE_...
Every option of
.BR "llloop serve" ,
in capitals and with underscores. For example, LLLOOP_SERVE_WORKERS=8 means \-\-workers 8. Switches take 1 or 0.
The options of the other commands have variables too, such as LLLOOP_UMOUNT_LAZY.
.TP
.BR LLLOOP_SOURCE ", " LLLOOP_MOUNTPOINT
SOURCE and MOUNTPOINT of
.BR "llloop serve " and " llloop umount" .
"""
_EXAMPLES = {
    "llloop": r"""llloop serve \-\-workers 8 /srv/photos /mnt/photos
llloop serve \-\-read\-only \-\-daemon \-\-log\-file /var/log/photos.log /srv/photos /mnt/photos
llloop umount /mnt/photos
""",
    "mount.llloop": r"""mount \-t llloop \-o workers=8,ro /srv/photos /mnt/photos

# in /etc/fstab
/srv/photos  /mnt/photos  llloop  workers=8,nofail  0 0
""",
}


def escaped(text: str) -> str:
    """Return *text* as roff input: nothing in it is a request, and a hyphen is the one that can be typed."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return "\n".join("\\&" + line if line.startswith(".") else line for line in text.split("\n"))


def paragraphs(text: str) -> Iterator[str]:
    """Yield a docstring's paragraphs as roff: those marked with a backspace, as click has it, line by line."""
    # Before Python 3.13 a docstring keeps its indentation.
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith("\b"):
            yield ".PP\n.nf\n" + escaped(paragraph[1:].strip("\n")) + "\n.fi\n"
        else:
            yield ".PP\n" + escaped(" ".join(paragraph.split())) + "\n"


def options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and isinstance(parameter, click.Option):
            yield f".TP\n.B {escaped(record[0])}\n{escaped(' '.join(record[1].split()))}\n"


def usage(command: click.Command, context: click.Context) -> str:
    pieces = " ".join(command.collect_usage_pieces(context))
    return f".B {escaped(context.command_path)}\n{escaped(pieces)}\n"


def exit_codes(command: click.Command) -> str:
    lines = re.findall(r"^ +(\d+) +(.+)$", command.epilog or "", re.MULTILINE)
    return ".SH EXIT STATUS\n" + "".join(f".TP\n.B {code}\n{escaped(meaning)}\n" for code, meaning in lines)


def page(command: click.Command, name: str, section: int, summary: str, see_also: str) -> str:
    """Return the manual page of a command and its subcommands."""
    context = click.Context(command, info_name=name, **command.context_settings)
    subcommands = [
        (one, click.Context(one, info_name=key, parent=context))
        for key, one in sorted(getattr(command, "commands", {}).items())
        if not one.hidden
    ]
    parts = [
        # No date: the page is the same whenever it is made.
        f'.\\" Made by scripts/man from the commands.\n.TH {name.upper()} {section} "" "llloop {__version__}"\n',
        f".SH NAME\n{escaped(name)} \\- {escaped(summary)}\n.SH SYNOPSIS\n",
        "\n.br\n".join(usage(*one).rstrip("\n") for one in subcommands or [(command, context)]) + "\n",
        ".SH DESCRIPTION\n",
        *paragraphs(command.help or ""),
        ".SH OPTIONS\n",
        *options(command, context),
    ]
    for one, inner in subcommands:
        parts += [f".SH {escaped(inner.command_path.upper())}\n", *paragraphs(one.help or ""), *options(one, inner)]
    if isinstance(command, mount_helper.Command):
        parts.append(".SH MOUNT OPTIONS\n")
        parts += [f".TP\n.B {escaped(names)}\n{escaped(' '.join(text.split()))}\n" for names, text in command.rows()]
    else:
        parts.append(_FURTHER)
    parts += [exit_codes(command), f".SH EXAMPLES\n.nf\n{_EXAMPLES[name]}.fi\n", f".SH SEE ALSO\n{see_also}\n"]
    return "".join(parts)


def options_page() -> str:
    """Return the page docs/options.md: a section for each option of `llloop serve`."""
    serve = main.serve
    context = click.Context(serve, info_name="llloop serve", auto_envvar_prefix="LLLOOP_SERVE")
    command = mount_helper.mount_llloop
    assert isinstance(command, mount_helper.Command)
    in_fstab = {one.partition("=")[0]: names for names, _ in command.rows() for one in names.split(", ")}
    in_python = {one.name for one in fields(ServeConfig)}
    parts = [_OPTIONS_HEAD]
    for option in serve.get_params(context):
        record = option.get_help_record(context)
        if not isinstance(option, click.Option) or record is None or option.name == "help":
            continue
        assert option.name is not None
        spelling, text = record[0], " ".join(str(option.help).split())
        parts.append(f"## `{spelling}`\n\n{_markdown(text)}\n\n")
        parts.append(f"- Environment: `LLLOOP_SERVE_{option.name.upper()}`\n")
        if option.name in in_python:
            parts.append(f"- Python: `{option.name}=`\n")
        if option.name in in_fstab:
            parts.append(f"- `/etc/fstab`: `{in_fstab[option.name]}`\n")
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n"


def _markdown(text: str) -> str:
    """Return help text as Markdown: nothing in it is markup."""
    return re.sub(r"([*_<>|])", r"\\\1", text)


def documents() -> dict[str, str]:
    """Return the files to write, by their names in the checkout."""
    made = {_SHARE + name: text for name, text in shared_documents().items()}
    made["docs/options.md"] = options_page()
    return made


def shared_documents() -> dict[str, str]:
    """Return the manual pages and completions, which are installed, by their names in scripts/share."""
    made = {
        "man/llloop.1": page(
            main.main, "llloop", 1, "mirror a directory at a mount point", ".BR mount.llloop (8),\n.BR fuse (4)"
        ),
        "man/mount.llloop.8": page(
            mount_helper.mount_llloop,
            "mount.llloop",
            8,
            "mirror a directory by mount(8) or /etc/fstab",
            ".BR llloop (1),\n.BR mount (8),\n.BR fstab (5)",
        ),
    }
    for shell, name in _COMPLETIONS.items():
        kind = get_completion_class(shell)
        assert kind is not None
        made[name] = kind(main.main, {}, "llloop", "_LLLOOP_COMPLETE").source().strip() + "\n"
    return made


if __name__ == "__main__":
    for name, text in documents().items():
        path = Path(sys.argv[1], name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
