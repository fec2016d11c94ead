"""How long one user waits while another does what takes long in the source.

The other user stats, reads (open, 4 KiB, close) and makes files, each in a process of its own that goes from file to
file, so that requests come to the server. What is told is how long each took while the load went on.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

from .tools import Installer, Unavailable, run

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878  # <linux/fs.h>
_FILES = 2000  # of the other user
_TIMEOUT = 30.0  # seconds
_PAUSE = 0.002  # seconds between two calls
_SOURCE_SIZE = 4 << 30  # bytes of the ext4 in memory that is the source
_LEAST = 1.0  # for how long is measured, in seconds, where the load ends sooner
# The child processes are forked while no thread runs.
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Sizes:
    """How much each load does.

    Attributes:
        extents: of the file that is removed.
        entries: of the directory that is listed.
        threads: that write, read or make files at a time.
        seconds: for how long they do, and for how long the source is frozen.
        dirty: bytes that are written and then synced.
    """

    extents: int
    entries: int
    threads: int
    seconds: float
    dirty: int


FULL = Sizes(200_000, 1_000_000, 1500, 5.0, 1 << 30)
QUICK = Sizes(50_000, 200_000, 300, 2.0, 256 << 20)


@dataclass(frozen=True)
class Latencies:
    """Sorted latencies of one kind of call, in seconds."""

    values: Sequence[float]

    def at(self, share: float) -> float:
        """Return the latency that this share of calls does not exceed."""
        return self.values[min(len(self.values) - 1, int(len(self.values) * share))]


def _fragmented(path: Path, sizes: Sizes) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    for number in range(sizes.extents):
        os.pwrite(fd, bytes(4096), number * 8192)
    os.fsync(fd)
    os.close(fd)


def _many_entries(path: Path, sizes: Sizes) -> None:
    path.mkdir()
    directory = os.open(path, os.O_RDONLY)
    for start in range(0, sizes.entries, 50_000):  # a file has no more than 65,000 links on ext4
        os.close(os.open(f"file{start:08}", os.O_CREAT, dir_fd=directory))
        for number in range(start + 1, min(start + 50_000, sizes.entries)):
            os.link(f"file{start:08}", f"file{number:08}", src_dir_fd=directory, dst_dir_fd=directory)
    os.close(directory)


def _in_threads(sizes: Sizes, prepare: Callable[[int], int], action: Callable[[int, int], object]) -> None:
    """Have each thread do something with what was prepared for it, again and again."""
    prepared = [prepare(number) for number in range(sizes.threads)]
    end = time.monotonic() + sizes.seconds

    def work(number: int, what: int) -> None:
        while time.monotonic() < end:
            action(number, what)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(prepared)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fd in prepared:
        if fd >= 0:
            os.close(fd)


def _transfer(top: Path, sizes: Sizes, direction: str) -> None:
    """Have many threads read or write, each a file of its own; in Python they would wait for each other instead."""
    amounts = [f"--numjobs={sizes.threads}", "--size=512k", "--bs=512k", "--time_based", f"--runtime={sizes.seconds}"]
    run(
        [
            "fio",
            f"--name={direction}",
            f"--rw={direction}",
            "--thread",
            f"--directory={top}",
            "--invalidate=1",
            *amounts,
        ]
    )


def _make(top: Path, sizes: Sizes) -> None:
    numbers = itertools.count()
    for number in range(sizes.threads):
        (top / f"maker{number}").mkdir()
    _in_threads(sizes, lambda _: -1, lambda number, _: (top / f"maker{number}/{next(numbers)}").touch())


def _sync(top: Path, sizes: Sizes) -> None:
    fd = os.open(top / "dirty", os.O_RDWR | os.O_CREAT)
    for start in range(0, sizes.dirty, 1 << 20):
        os.pwrite(fd, bytes(1 << 20), start)
    os.fsync(fd)
    os.close(fd)


def _frozen(top: Path, source: Path, sizes: Sizes) -> None:
    """Freeze the source for a while, and have somebody make a file meanwhile, who waits."""
    fd = os.open(source, os.O_RDONLY)
    fcntl.ioctl(fd, _FIFREEZE, 0)
    try:
        maker = threading.Thread(target=(top / "made").touch)
        maker.start()
        time.sleep(sizes.seconds)
    finally:
        fcntl.ioctl(fd, _FITHAW, 0)
        os.close(fd)
    maker.join()


@dataclass(frozen=True)
class Load:
    """What somebody does.

    Attributes:
        title: what that is.
        act: does it in a directory of a mount; gets the source, too.
        prepare: makes what is needed in that directory of the source.
        changes: whether the other user can make files meanwhile.
    """

    title: str
    act: Callable[[Path, Path, Sizes], object]
    prepare: Callable[[Path, Sizes], object] = lambda top, sizes: None
    changes: bool = True


def _fragments(top: Path, sizes: Sizes) -> None:
    _fragmented(top / "fragments", sizes)


def _replace_fragments(top: Path) -> None:
    (top / "small").touch()
    (top / "small").rename(top / "fragments")


LOADS = {
    "removal": Load("a fragmented file is removed", lambda top, _, __: (top / "fragments").unlink(), _fragments),
    "replacement": Load(
        "a fragmented file is replaced by rename",
        lambda top, _, __: _replace_fragments(top),
        _fragments,
    ),
    "truncation": Load(
        "a fragmented file is truncated", lambda top, _, __: os.truncate(top / "fragments", 0), _fragments
    ),
    "frozen": Load("the source is frozen, and somebody makes a file", _frozen, changes=False),
    "listing": Load(
        "a large directory is listed",
        lambda top, _, __: os.listdir(top / "many"),
        lambda top, sizes: _many_entries(top / "many", sizes),
    ),
    "writers": Load("many threads write 512 KiB", lambda top, _, sizes: _transfer(top, sizes, "write")),
    "readers": Load("many threads read 512 KiB", lambda top, _, sizes: _transfer(top, sizes, "read")),
    "makers": Load("many threads make files", lambda top, _, sizes: _make(top, sizes)),
    "sync": Load("much is written and synced", lambda top, _, sizes: _sync(top, sizes)),
}


def _stat(top: Path, number: int) -> None:
    os.stat(top / f"stat/{number % _FILES}")


def _read_one(top: Path, number: int) -> None:
    fd = os.open(top / f"read/{number % _FILES}", os.O_RDONLY)
    os.pread(fd, 4096, 0)
    os.close(fd)


def _create(top: Path, number: int) -> None:
    os.close(os.open(top / f"create/{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))


CALLS = {"stat": _stat, "read": _read_one, "create": _create}


def _other_user(call: Callable[[Path, int], None], top: Path, over: Event, results: Sequence[int]) -> None:
    values = []
    for number in itertools.count():
        if over.is_set():
            break
        start = time.perf_counter()
        call(top, number)
        values.append(time.perf_counter() - start)
        time.sleep(_PAUSE)
    with os.fdopen(results[1], "w") as file:
        file.write("\n".join(map(str, values)))


def measure(load: Load, mounted: Path, source: Path, sizes: Sizes) -> dict[str, Latencies]:
    """Return the other user's latencies, by call, while somebody does *load* in a mount of *source*."""
    for name in ("load", *CALLS):
        (source / name).mkdir()
    for number in range(_FILES):
        (source / f"stat/{number}").touch()
        (source / f"read/{number}").write_bytes(bytes(4096))
    load.prepare(source / "load", sizes)
    run(["sync", "-f", source])
    calls = {name: call for name, call in CALLS.items() if load.changes or name != "create"}
    over = _fork.Event()
    pipes = {name: os.pipe() for name in calls}
    users = [_fork.Process(target=_other_user, args=(call, mounted, over, pipes[name])) for name, call in calls.items()]
    actor = _fork.Process(target=load.act, args=(mounted / "load", source, sizes))
    for user in users:
        user.start()
    start = time.monotonic()
    actor.start()
    actor.join()
    time.sleep(max(0.0, _LEAST - (time.monotonic() - start)))
    over.set()
    found = {}
    for name, (reader, writer) in pipes.items():
        os.close(writer)
        with os.fdopen(reader) as file:
            found[name] = Latencies(sorted(float(line) for line in file))
    for user in users:
        user.join()
    return found


@contextlib.contextmanager
def _source(base: Path) -> Iterator[Path]:
    image, where = base / "image", base / "source"
    with open(image, "wb") as file:
        file.truncate(_SOURCE_SIZE)
    where.mkdir()
    run(["mkfs.ext4", "-q", "-F", "-N", "200000", image])
    run(["mount", "-o", "loop,nodiscard", image, where])
    try:
        yield where
    finally:
        _unmount(where)
        image.unlink()


def _unmount(where: Path) -> None:
    """Unmount the source as soon as the server that has it open has ended."""
    end = time.monotonic() + _TIMEOUT
    while True:
        try:
            run(["umount", where])
            return
        except Unavailable:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


@contextlib.contextmanager
def _mounted(command: Sequence[str], source: Path, where: Path) -> Iterator[Path]:
    where.mkdir()
    run([command[0], "serve", "--daemon", *command[1:], source, where])
    try:
        yield where
    finally:
        run([command[0], "umount", "--lazy", where])


def compare(
    names: Sequence[str], command: Sequence[str] | None, sizes: Sizes, base: Path, installer: Installer
) -> dict[str, dict[str, Latencies]]:
    """Return the other user's latencies by load and call.

    Args:
        names: of the loads.
        command: the llloop to serve with and its options, or None for the source itself.
        sizes: how much each load does.
        base: where the source's image is made.
        installer: for what is missing.
    """
    installer.need("e2fsprogs", "fio")
    found = {}
    for name in names:
        with (
            tempfile.TemporaryDirectory(prefix="llloop-waiting-", dir=base) as directory,
            contextlib.ExitStack() as all_,
        ):
            source = all_.enter_context(_source(Path(directory)))
            mounted = all_.enter_context(_mounted(command, source, Path(directory) / "mnt")) if command else source
            found[name] = measure(LOADS[name], mounted, source, sizes)
    return found


def table(found: dict[str, dict[str, Latencies]]) -> str:
    """Return what was found as text, in milliseconds."""
    lines = [f"{'':14}" + "".join(f"{name + ' p50':>13}{'p99':>9}{'max':>9}" for name in CALLS)]
    for name, latencies in found.items():
        cells = ""
        for call in CALLS:
            values = latencies.get(call)
            if values is None:
                cells += f"{'-':>13}{'-':>9}{'-':>9}"
            else:
                cells += "".join(
                    f"{values.at(share) * 1000:>{width}.1f}" for share, width in ((0.5, 13), (0.99, 9), (1.0, 9))
                )
        lines.append(f"{name:14}{cells}")
    return "\n".join(lines)
