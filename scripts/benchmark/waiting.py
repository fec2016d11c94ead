"""How long the calls of one user wait during a heavy load of another user.

One user makes three kinds of call: stat, read (open, 4 KiB, close) and create. A process for each kind goes from file
to file, so that the kernel sends requests. The result is the latency of each call during the load of the other user.
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
_FILES = 2000  # number of files of the other user
_TIMEOUT = 30.0  # seconds
_PAUSE = 0.002  # seconds between two calls
_SOURCE_SIZE = 4 << 30  # size of the source, an ext4 file system in memory, in bytes
_LEAST = 1.0  # minimum time of a measurement in seconds, if the load ends sooner
# Fork the child processes while no thread runs.
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Sizes:
    """The amount of work of each load.

    Attributes:
        extents: the number of extents of the file that is removed.
        entries: the number of entries of the directory that is listed.
        threads: the number of threads that write, read or create files.
        seconds: for how long they do so, and for how long the source is frozen.
        dirty: how many bytes are written and then synced.
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
    """The latencies of one kind of call in seconds, sorted."""

    values: Sequence[float]

    def at(self, share: float) -> float:
        """Return the latency that this share of the calls does not exceed (a quantile)."""
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
    for start in range(0, sizes.entries, 50_000):  # ext4 allows 65,000 links to a file
        os.close(os.open(f"file{start:08}", os.O_CREAT, dir_fd=directory))
        for number in range(start + 1, min(start + 50_000, sizes.entries)):
            os.link(f"file{start:08}", f"file{number:08}", src_dir_fd=directory, dst_dir_fd=directory)
    os.close(directory)


def _in_threads(sizes: Sizes, prepare: Callable[[int], int], action: Callable[[int, int], object]) -> None:
    """Make each thread repeat an operation on its own prepared files."""
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
    """Make many threads of fio read or write their own files. Python threads would wait for each other."""
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
    """Freeze the source for some time. Another process creates a file meanwhile and waits."""
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
    """A load of the other user.

    Attributes:
        title: a description.
        act: makes the load in a directory of a mount; gets the source, too.
        prepare: creates the files for it in that directory of the source.
        changes: whether the other processes can create files meanwhile.
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
    """Unmount the source after the server, which has it open, has ended."""
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
        names: the names of the loads.
        command: the command that serves a mount, or None for the source itself.
        sizes: the amount of work of each load.
        base: the directory for the image of the source.
        installer: installs missing packages.
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
    """Return the results as text, in milliseconds."""
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
