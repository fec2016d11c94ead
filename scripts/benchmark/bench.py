"""The place a run happens in: a source in memory, all contenders mounted at once, and everything gone at the end."""

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
    """What is mounted, on what.

    Attributes:
        source: the directory that all mirror.
        sizes: how much work there is.
        servers: by class of workloads and contender's name.
        skipped: why a contender is not, or no longer, among the servers.
    """

    source: Path
    sizes: Sizes
    servers: dict[str, dict[str, Server]]
    skipped: dict[str, str] = field(default_factory=dict)

    def serve(self, kind: str, contender: Contender) -> None:
        """Mount a contender; where that fails, note why.

        Args:
            kind: for which class of workloads.
            contender: who it is.
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
        """Serve a contender anew whose server has ended."""
        old = self.servers[kind].pop(name)
        old.stop()
        self.serve(kind, old.contender)


@contextlib.contextmanager
def bench(
    contenders: Sequence[Contender], kinds: Collection[str], wished: Sizes, base: Path, say: Callable[[str], None]
) -> Iterator[Bench]:
    """Make the source and mount the contenders; unmount and remove all of it at the end.

    Args:
        contenders: who takes part.
        kinds: the classes of workloads that there will be.
        wished: how much work there is, if there is room for it.
        base: where the source is made, a file system in memory.
        say: told what is going on.
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
    # A mount that could not be undone shows the source: rmtree must not go through it.
    with open("/proc/self/mountinfo") as mounts:
        if any(str(top) in line for line in mounts):
            raise RuntimeError(f"something is still mounted below {top}; unmount it and remove the directory")
    shutil.rmtree(top)
