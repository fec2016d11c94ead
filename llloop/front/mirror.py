"""Everything the front serves from, put together once per front process."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

from ..arena import Arena
from ..config import ServeConfig
from ..leadership import Leadership
from ..ledger import Ledger
from ..metrics import Gauge
from ..negotiation import Capabilities, Feature
from ..privilege import Caller, SetidGuard
from ..syscalls import CLOSE_CAN_FAIL, STACKED, file_system_type, fstatx
from .anchors import Anchors
from .attempts import Attempts
from .caching import CachePolicy
from .files import Files
from .forgetting import Forgetting
from .handles import Handles
from .inodes import Inodes
from .passthrough import Passthrough
from .pins import Pins
from .privileges import Privileges
from .rights import Rights
from .router import Router
from .shares import Shares
from .tree import Tree

# Descriptors kept for directories: a share of what the process may open, most of which belongs to open files.
_DIRECTORIES_SHARE = 8
_DIRECTORIES_MOST = 1024
# Descriptors that open files must leave for everything else, so that names can still be found when many are open.
_RESERVE = 64


@dataclass(frozen=True, slots=True)
class Mirror:
    """What handlers work on.

    Attributes:
        config: the mount's options.
        features: what was agreed with the kernel; nothing where llfuse runs the loop.
        inodes, handles, attempts, tree, forgetting, files, router, policy, passthrough, setid: see their modules.
        close_can_fail: whether close(2) on the source can report an error of an earlier write.
        leadership: which thread serves.
        closing: descriptors that are to be closed when the request at hand is answered, since that may take long.
    """

    config: ServeConfig
    features: Feature
    inodes: Inodes
    handles: Handles
    attempts: Attempts
    tree: Tree
    forgetting: Forgetting
    files: Files
    router: Router
    policy: CachePolicy
    passthrough: Passthrough
    setid: SetidGuard
    close_can_fail: bool
    leadership: Leadership
    closing: list[int]


def build_mirror(
    config: ServeConfig,
    capabilities: Capabilities | None,
    arena: Arena,
    ledger: Ledger,
    pipes: list[int],
    root: int,
    device: int,
) -> Mirror:
    """Put together what a front serves from.

    Args:
        config: the mount's options.
        capabilities: what was agreed with the kernel, or None.
        arena: the shared memory.
        ledger: what is to outlive the front.
        pipes: the write ends of the workers' request pipes.
        root: an O_PATH descriptor of the source.
        device: the descriptor of /dev/fuse.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        kind = file_system_type(readable)
    finally:
        os.close(readable)
    metrics = arena.metrics
    inodes = Inodes(fstatx(root), ledger, births=kind not in STACKED, count=metrics.gauge(Gauge.INODES))
    directories = min(_DIRECTORIES_MOST, limit // _DIRECTORIES_SHARE)
    leadership = Leadership()
    closing: list[int] = []
    payload_pipes = arena.pipes.descriptors if arena.pipes is not None else []
    shares = Shares(limit - directories - _RESERVE - len(pipes) - len(payload_pipes), (0, os.geteuid()))
    pins = Pins(inodes, shares, leadership, closing)
    anchors = Anchors(inodes, root, directories, pins, leadership, closing)
    features = capabilities.features if capabilities is not None else Feature(0)
    collecting = Feature.WRITEBACK_CACHE in features
    handles = Handles(ledger, arena.generation + 1, shares, metrics.gauge(Gauge.HANDLES), writeback=collecting)
    router = Router(arena, pipes, leadership)
    setid = SetidGuard()
    caller = Caller(setid)
    rights = Rights(caller, root, acl=Feature.POSIX_ACL in features, suid="suid" in config.options)
    attempts = Attempts(ledger)
    privileges = Privileges(setid, caller, handles, rights, leadership, writeback=collecting)
    clears_setid = Feature.HANDLE_KILLPRIV_V2 not in features
    tree = Tree(
        root, inodes, anchors, handles, attempts, rights, setid, privileges, leadership, clears_setid=clears_setid
    )
    passthrough = Passthrough(device, handles, attempts, caller, setid, Feature.PASSTHROUGH in features)
    return Mirror(
        config=config,
        features=features,
        inodes=inodes,
        handles=handles,
        attempts=attempts,
        tree=tree,
        forgetting=Forgetting(arena, ledger, tree),
        files=Files(tree, handles, router, passthrough, privileges, attempts, collecting, device, leadership, closing),
        router=router,
        policy=CachePolicy(config, Feature.DIRECT_IO_ALLOW_MMAP in features),
        passthrough=passthrough,
        setid=setid,
        close_can_fail=kind in CLOSE_CAN_FAIL,
        leadership=leadership,
        closing=closing,
    )
