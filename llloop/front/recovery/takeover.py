"""Taking over from a dead front: its open files, and its unanswered requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection

from llloop.front.context import Context
from llloop.linux.syscalls import open_descriptors
from llloop.shared.journal import Journal, Record

_log = logging.getLogger(__name__)


def begin_takeover(context: Context, journal: Journal, own: Collection[int]) -> None:
    """Take over the state of the previous fronts, if there were any.

    Args:
        context: the objects that handlers work on, still empty.
        journal: the records of the previous fronts.
        own: the descriptors that each front starts with. All other open ones belong to the previous fronts.
    """
    records = journal.recover()
    # Each inherited descriptor belongs to one record at most. List them before this front opens any: if the keeper has
    # died as well, new descriptors get numbers that records contain.
    left = open_descriptors().difference(own)
    context.intents.find_pins(left)
    context.tree.directory_fds.pins.take_over(left)
    _reserve({record.fields[2] for record in records} - left)
    for record in records:
        _take_over_handle(context, journal, record, left)
    context.intents.adopt(left)
    context.router.slots.free_held()
    context.router.take_over()
    context.forgetting.finish()


def _reserve(lost: set[int]) -> None:
    """Occupy the numbers of lost descriptors of open files, so that no other file gets them."""
    if lost:
        placeholder = os.open("/", os.O_PATH | os.O_CLOEXEC)
        for number in lost - {placeholder}:
            os.dup2(placeholder, number, inheritable=False)
        if placeholder not in lost:
            os.close(placeholder)


def _take_over_handle(context: Context, journal: Journal, record: Record, left: set[int]) -> None:
    number, nodeid, descriptor, flags, backing, snapshot, opener, _ = record.fields
    try:
        handle = context.files.take_over(number, nodeid, descriptor, flags, opener, record.place, left)
    except OSError as error:
        _log.warning(
            "a file that was open when the front died cannot be opened again; its users get errors: %s", error.strerror
        )
        journal.remove(record.place)
        if descriptor not in left:
            os.close(descriptor)
        return
    handle.in_worker = True  # its worker may have it
    if backing:
        context.passthrough.take_over(handle, backing)
    if snapshot:
        context.handles.take_over_snapshot(handle, snapshot - 1, left)


def finish_takeover(context: Context, delivered: bool) -> None:
    """End the take-over, after all requests that the kernel sends again were received.

    Args:
        context: the objects that handlers work on.
        delivered: whether the kernel got the dead front's reply to its last request that looked up an inode.
    """
    intents = context.intents
    # A pin of an earlier request may be closed by now, and its number be that of an open file.
    for pin in intents.left_pins.difference(
        context.tree.directory_fds.pins.descriptors(), context.handles.descriptors()
    ):
        context.closing.append(pin)
    context.closing.extend(intents.finish_takeover())
    context.router.finish_takeover()
    for nodeid in context.inodes.finish_takeover(delivered):
        context.tree.directory_fds.drop(nodeid)
