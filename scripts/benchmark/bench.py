"""The place a run happens in: a source in memory, all contenders mounted at once, and everything gone at the end."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import sizes as sizes_module
from . import source as source_module
from .contenders import Contender
from .servers import Server
from .sizes import Sizes
from .tools import Unavailable


@dataclass(slots=True)
class Bench:
    """What is mounted, on what.

    Attributes:
        source: the directory that all mirror.
        servers: by contender's name.
        sizes: how much work there is.
        skipped: why a contender is not among the servers.
    """

    source: Path
    servers: dict[str, Server]
    sizes: Sizes
    skipped: dict[str, str] = field(default_factory=dict)

    def restart(self, name: str) -> None:
        """Serve a contender anew whose server has ended.

        Raises:
            Unavailable: if it does not come up again.
        """
        old = self.servers.pop(name)
        old.stop()
        self.servers[name] = _serve(old.contender, self.source)


@contextlib.contextmanager
def bench(contenders: Sequence[Contender], wished: Sizes, base: Path, say: Callable[[str], None]) -> Iterator[Bench]:
    """Make the source and mount the contenders; unmount and remove all of it at the end.

    Args:
        contenders: who takes part.
        wished: how much work there is, if there is room for it.
        base: where the source is made, a file system in memory.
        say: told what is going on.
    """
    sizes = sizes_module.fitted(wished, sizes_module.room_at(str(base)))
    top = Path(tempfile.mkdtemp(prefix="llloop-bench-", dir=base))
    made = Bench(top / "source", {}, sizes)
    try:
        made.source.mkdir()
        say(f"making the source in {top}")
        source_module.make(made.source, top, sizes)
        for contender in contenders:
            try:
                made.servers[contender.name] = _serve(contender, made.source)
            except Unavailable as reason:
                made.skipped[contender.name] = str(reason)
        yield made
    finally:
        for server in made.servers.values():
            server.stop()
        _remove(top)


def _serve(contender: Contender, source: Path) -> Server:
    mountpoint = source.parent / "mounts" / contender.name
    mountpoint.mkdir(parents=True, exist_ok=True)
    return Server(contender, source, mountpoint, source.parent / f"{contender.name}.log")


def _remove(top: Path) -> None:
    # A mount that could not be undone shows the source: rmtree must not go through it.
    with open("/proc/self/mountinfo") as mounts:
        if any(str(top) in line for line in mounts):
            raise RuntimeError(f"something is still mounted below {top}; unmount it and remove the directory")
    shutil.rmtree(top)
