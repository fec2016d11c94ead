"""The place of a run: a source in memory, and the mounts of all contenders. At the end, all of it is removed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import placement, source
from .contenders import Contender
from .servers import Server
from .sizes import Sizes, fitted, room_at
from .tools import Unavailable


@dataclass(slots=True)
class Bench:
    """The source and the mounts of a run.

    Attributes:
        source: the source of all mounts.
        sizes: the amounts of work.
        servers: the servers by class of workloads and name of the contender.
        skipped: for each contender without a server, the reason.
    """

    source: Path
    sizes: Sizes
    servers: dict[str, dict[str, Server]]
    skipped: dict[str, str] = field(default_factory=dict)

    def serve(self, kind: str, contender: Contender) -> None:
        """Mount a contender; if this fails, note the reason.

        Args:
            kind: the class of workloads.
            contender: the contender.
        """
        beside = self.source.parent
        mountpoint = beside / "mounts" / kind / contender.name
        mountpoint.mkdir(parents=True, exist_ok=True)
        log = beside / f"{contender.name}-{kind}.log"
        try:
            server = Server(contender, self.source, mountpoint, log, placement.cpus(kind))
        except Unavailable as reason:
            self.skipped[contender.name] = str(reason)
        else:
            self.servers[kind][contender.name] = server

    def restart(self, kind: str, name: str) -> None:
        """Start the server of a contender again after its end."""
        old = self.servers[kind].pop(name)
        old.stop()
        self.serve(kind, old.contender)


@contextlib.contextmanager
def bench(
    contenders: Sequence[Contender], kinds: Collection[str], wished: Sizes, base: Path, say: Callable[[str], None]
) -> Iterator[Bench]:
    """Make the source and mount the contenders; unmount and remove all of it at the end.

    Args:
        contenders: the contenders.
        kinds: the classes of workloads.
        wished: the amounts of work if there is enough space.
        base: a directory on a file system in memory, for the source.
        say: prints a progress message.
    """
    sizes = fitted(wished, room_at(str(base)))
    top = Path(tempfile.mkdtemp(prefix="llloop-bench-", dir=base))
    made = Bench(top / "source", sizes, {kind: {} for kind in kinds})
    try:
        made.source.mkdir()
        say(f"making the source, {top}/source")
        source.make(made.source, top, sizes)
        for kind in kinds:
            for contender in contenders:
                made.serve(kind, contender)
        yield made
    finally:
        for servers in made.servers.values():
            for server in servers.values():
                server.stop()
        _remove(top)


def _remove(top: Path) -> None:
    # If unmounting failed, the mount still shows the source. rmtree must not delete the source through it.
    with open("/proc/self/mountinfo") as mounts:
        if any(str(top) in line for line in mounts):
            raise RuntimeError(f"something is still mounted below {top}; unmount it and remove the directory")
    shutil.rmtree(top)
