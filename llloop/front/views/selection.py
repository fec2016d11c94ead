"""Chooses at the start which classes serve a mount, so that a mount without views does not even test for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from llloop.config import Policy, ServeConfig
from llloop.front.opening import Files
from llloop.front.permissions import Permissions
from llloop.front.tree import Tree
from llloop.front.views.new_files import FilesWithNewModes, NewModes
from llloop.front.views.permissions import CreatorPermissions, ShownPermissions
from llloop.front.views.shown import Shown
from llloop.front.views.tree import ShownTree, ViewTree
from llloop.mode_changes import ModeChange


class View(NamedTuple):
    """What serves a mount.

    Attributes:
        shown: converts attributes; None if the mount shows those of the source.
        permissions, tree, files: create the objects of these names.
    """

    shown: Shown | None
    permissions: Callable[..., Permissions]
    tree: Callable[..., Tree]
    files: Callable[..., Files]


def view_of(config: ServeConfig) -> View:
    """Return what serves a mount with these options."""
    creates_for: dict[str, int | None] = {"user": _id(config.create_user), "group": _id(config.create_group)}
    is_for_others = creates_for != {"user": None, "group": None}
    new_mode = ModeChange(config.create_mode, "--create-mode") if config.create_mode else None
    modes = NewModes(new_mode, keeps_setid=not is_for_others and not config.shows_other_attributes)
    policies: dict[str, Any] = {"chown": config.chown, "chmod": config.chmod, "modes": modes}
    files = partial(FilesWithNewModes, modes=modes)
    if config.shows_other_attributes:
        mode = ModeChange(config.mode, "--mode") if config.mode else None
        shown = Shown(_id(config.force_user), _id(config.force_group), mode)
        permissions = partial(ShownPermissions, shown=shown, **creates_for)
        return View(shown, permissions, partial(ShownTree, shown=shown, **policies), files)
    tree: Callable[..., Tree] = Tree
    if new_mode is not None or is_for_others or not config.chown is config.chmod is Policy.REAL:
        tree = partial(ViewTree, **policies)
    return View(
        None,
        partial(CreatorPermissions, **creates_for) if is_for_others else Permissions,
        tree,
        files if new_mode is not None or is_for_others else Files,
    )


def _id(text: str) -> int | None:
    return int(text) if text else None
