"""Going on where a dead front left off: its inodes, its open files, and the requests it did not answer."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection

from llloop.front.context import Context
from llloop.linux.syscalls import open_descriptors
from llloop.shared.journal import HANDLE, Journal, Record

_log = logging.getLogger(__name__)


def recover(context: Context, journal: Journal, own: Collection[int]) -> None:
    """Take over what fronts before this one have left, if there were any.

    Args:
        mirror: what is to be served, as yet empty.
        journal: what they have noted.
        own: the descriptors that each front starts with. All others that are open are theirs.
    """
    records = journal.recover()
    # Each descriptor that they have left belongs to one record at most. What is opened from now on is this front's: if
    # the keeper has died as well, it gets numbers that records name.
    left = open_descriptors().difference(own)
    context.intents.find_pins(left)
    context.tree.directory_fds.pins.take_over(context.inodes.recover(records), left)
    _reserve({record.fields[2] for record in records if record.kind == HANDLE} - left)
    for record in records:
        if record.kind == HANDLE:
            _take_over_handle(context, journal, record, left)
    context.intents.adopt(left)
    context.router.slots.free_held()
    context.router.take_over()
    context.forgetting.finish()


def _reserve(lost: set[int]) -> None:
    """Take the numbers of open files' descriptors that are lost, so that nothing else is opened under them."""
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
    handle.lent = True  # its worker may hold it
    if backing:
        context.passthrough.take_over(handle, backing)
    if snapshot:
        context.handles.take_over_snapshot(handle, snapshot - 1, left)


def settle(context: Context, delivered: bool) -> None:
    """Decide what was left open, when all requests that the kernel sends again have come.

    Args:
        mirror: what is served.
        delivered: whether the answer to the last request that the dead front had in hand was sent.
    """
    intents = context.intents
    # An earlier request may have noted one and closed it, and an open file have its number now.
    for pin in intents.left_pins.difference(
        context.tree.directory_fds.pins.descriptors(), context.handles.descriptors()
    ):
        os.close(pin)
    intents.settle()
    context.router.settle()
    for nodeid in context.inodes.settle(delivered):
        context.tree.directory_fds.drop(nodeid)
