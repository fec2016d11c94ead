"""The objects that a front process works with, and their construction."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from llloop.config import ServeConfig
from llloop.front.cache_policy import CachePolicy
from llloop.front.descriptor_shares import Shares
from llloop.front.directory_fds import DirectoryFds
from llloop.front.heard import Heard
from llloop.front.heard_by_directory import HeardByDirectory
from llloop.front.inodes import Inodes
from llloop.front.killpriv import KillPriv
from llloop.front.open_files import Handles
from llloop.front.opening import Files
from llloop.front.passthrough import Passthrough
from llloop.front.pins import Pins
from llloop.front.recovery.forget import Forgetting
from llloop.front.recovery.intents import Intents
from llloop.front.router import Router
from llloop.front.tree import Tree
from llloop.front.views.selection import view_of
from llloop.front.views.shown import Shown
from llloop.linux import fuse
from llloop.linux.credentials import Caller, SetidGuard
from llloop.linux.process_credentials import Callers
from llloop.linux.syscalls import CLOSE_CAN_FAIL, STACKED, Attributes, file_system_type, fstatx
from llloop.shared.journal import Journal
from llloop.shared.leadership import Leadership
from llloop.shared.metrics import Gauge
from llloop.shared.negotiation import Capabilities, Feature
from llloop.shared.slots import Slots
from llloop.shared.table import Table
from llloop.shared.watch_state import WatchState
from llloop.shared.watches import Watches

# Descriptors for directories: this fraction (1/8) of the limit, with a maximum. Most descriptors are for open files.
_DIRECTORIES_FRACTION = 8
_MAX_DIRECTORIES = 1024
# Descriptors that open files cannot use, so that lookups still work when many files are open.
_RESERVE = 64


@dataclass(frozen=True, slots=True)
class Context:
    """The objects that handlers work on.

    Attributes:
        config: the mount's options.
        features: the features negotiated with the kernel; none with `--loop llfuse`.
        inodes, handles, intents, tree, forgetting, files, router, policy, passthrough, setid,
            callers: see their modules.
        close_can_fail: whether close(2) in the source can return an error of an earlier write.
        leadership: decides which thread serves.
        heard: decides what the kernel may cache for long; None without `--watch`.
        shown: converts attributes; None if the mount shows those of the source.
        attribute_fields: returns the fields of struct fuse_attr for an inode number and attributes of the source.
        closing: descriptors to close after the current request is answered, because close(2) may take long.
    """

    config: ServeConfig
    features: Feature
    inodes: Inodes
    handles: Handles
    intents: Intents
    tree: Tree
    forgetting: Forgetting
    files: Files
    router: Router
    policy: CachePolicy
    passthrough: Passthrough
    setid: SetidGuard
    callers: Callers
    close_can_fail: bool
    leadership: Leadership
    heard: Heard | None
    shown: Shown | None
    attribute_fields: Callable[[int, Attributes], tuple[int, ...]]
    closing: list[int]


def build_context(
    config: ServeConfig,
    capabilities: Capabilities | None,
    slots: Slots,
    journal: Journal,
    table: Table,
    pipes: list[int],
    root: int,
    device: int,
    closing: list[int] | None = None,
    watch: WatchState | None = None,
    watches: Watches | None = None,
) -> Context:
    """Create the objects that a front works with.

    Args:
        config: the mount's options.
        capabilities: the result of the negotiation with the kernel, or None.
        slots: the request slots in shared memory.
        journal, table: the records and the inodes that survive the front.
        pipes: the write ends of the workers' request pipes.
        root: an O_PATH descriptor of the source.
        device: a descriptor of /dev/fuse.
        closing: the list for descriptors to close after a request is answered; None for a new one.
        watch: what the front and the watcher tell each other, or None.
        watches: the inotify watches, or None.
    """
    features = capabilities.features if capabilities is not None else Feature(0)
    writeback = Feature.WRITEBACK_CACHE in features
    kind = _file_system_type(root)
    gauge = slots.metrics.gauge
    closing = [] if closing is None else closing
    leadership = Leadership()
    limits = _descriptor_limits(slots, pipes)

    inodes = Inodes(fstatx(root), table, births=kind not in STACKED, count=gauge(Gauge.INODES))
    shares = Shares(limits.open_files, (0, os.geteuid()))
    handles = Handles(journal, slots.generation + 1, shares, gauge(Gauge.HANDLES), writeback=writeback)
    pins = Pins(inodes, shares, leadership, closing)
    directory_fds = DirectoryFds(inodes, root, limits.directories, pins, leadership, closing)
    router = Router(slots, pipes, leadership)

    setid = SetidGuard()
    caller = Caller(setid)
    callers = Callers(config.id_maps)
    view = view_of(config)
    shown = view.shown
    permissions = view.permissions(
        caller, root, callers, acl=Feature.POSIX_ACL in features, suid="suid" in config.options
    )
    killpriv = KillPriv(setid, caller, handles, permissions, leadership, writeback=writeback)
    clears_setid = Feature.HANDLE_KILLPRIV_V2 not in features
    tree = view.tree(
        root, inodes, directory_fds, handles, permissions, setid, killpriv, leadership, clears_setid=clears_setid
    )
    passthrough = Passthrough(
        device, handles, caller, setid, Feature.PASSTHROUGH in features, None if shown is None else shown.of
    )
    files = view.files(tree, handles, router, passthrough, killpriv, writeback, device, leadership, closing)

    epochs = capabilities is not None and capabilities.minor >= fuse.EPOCH_SINCE
    policy = CachePolicy(config, Feature.DIRECT_IO_ALLOW_MMAP in features, slots.generation, epochs=epochs)
    heard = None
    if watch is not None:
        make_heard = Heard if watches is None else partial(HeardByDirectory, watches, root, directory_fds.open_name)
        heard = make_heard(watch, fstatx(root), inodes, leadership, policy.validity, policy.unheard)
        policy.changes_of = heard.changes_of
        tree.on_forgotten = heard.forgotten
    return Context(
        config=config,
        features=features,
        inodes=inodes,
        handles=handles,
        intents=Intents(journal),
        tree=tree,
        forgetting=Forgetting(router, journal, tree),
        files=files,
        router=router,
        policy=policy,
        passthrough=passthrough,
        setid=setid,
        callers=callers,
        close_can_fail=kind in CLOSE_CAN_FAIL,
        leadership=leadership,
        heard=heard,
        shown=shown,
        attribute_fields=fuse.attribute_fields if shown is None else shown.fields,
        closing=closing,
    )


class _DescriptorLimits(NamedTuple):
    """How many descriptors the front keeps open at most, for directories and for open files."""

    directories: int
    open_files: int


def _descriptor_limits(slots: Slots, pipes: list[int]) -> _DescriptorLimits:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    directories = min(_MAX_DIRECTORIES, limit // _DIRECTORIES_FRACTION)
    payload_pipes = slots.pipes.descriptors if slots.pipes is not None else []
    return _DescriptorLimits(directories, limit - directories - _RESERVE - len(pipes) - len(payload_pipes))


def _file_system_type(root: int) -> int:
    """Return the magic number of the source's file system (statfs(2))."""
    readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        return file_system_type(readable)
    finally:
        os.close(readable)
