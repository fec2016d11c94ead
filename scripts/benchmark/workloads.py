"""The workloads, class by class (see `placement`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .placement import BANDWIDTH, REQUESTS
from .site import Site


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload, which is one line of the report.

    Attributes:
        name: a short name for tables and --only.
        kind: its class.
        title: a short description.
        unit: the unit of `rate` divided by `scale`.
        scale: see `unit`.
        run: runs it once.
    """

    name: str
    kind: str
    title: str
    unit: str
    scale: float
    run: Callable[[Site], None]


ALL: list[Workload] = []


def _workload(name: str, kind: str, title: str, unit: str = "op/s") -> Callable[[Callable[[Site], None]], None]:
    def register(run: Callable[[Site], None]) -> None:
        ALL.append(Workload(name, kind, title, unit, 1e6 if unit == "MB/s" else 1, run))

    return register


def _read(site: Site, *options: str, timed: bool = True) -> None:
    site.fio(f"filename={site.root / 'data'}", f"size={site.sizes.data}", *options, timed=timed)


def _four(site: Site, pattern: str, directory: object, prefix: str) -> None:
    names = [f"filename_format={prefix}$jobnum", f"directory={directory}", f"size={site.sizes.share}"]
    site.fio(*names, "numjobs=4", f"rw={pattern}", "bs=128k" if pattern == "read" else "bs=1m", *_synced(pattern))


def _synced(pattern: str) -> list[str]:
    # With a writeback cache, data may only be in the kernel. So the time of fsync counts too.
    return [] if "read" in pattern else ["end_fsync=1"]


@_workload("read-seq-cold", BANDWIDTH, "sequential read, 128 KiB, nothing cached", "MB/s")
def _(site: Site) -> None:
    for _ in range(site.sizes.repeats):
        site.drop()
        _read(site, "rw=read", "bs=128k")


@_workload("read-seq-hot", BANDWIDTH, "sequential read, 128 KiB, just read before", "MB/s")
def _(site: Site) -> None:
    _read(site, "rw=read", "bs=128k", timed=False)
    for _ in range(site.sizes.repeats):
        _read(site, "rw=read", "bs=128k")


@_workload("read-4k-rand-hot", BANDWIDTH, "random read, 4 KiB, just read before", "MB/s")
def _(site: Site) -> None:
    _read(site, "rw=read", "bs=128k", timed=False)
    _read(site, "rw=randread", "bs=4k", f"io_size={site.sizes.data // 2}")


@_workload("read-4-files", BANDWIDTH, "four files read at once, 128 KiB, nothing cached", "MB/s")
def _(site: Site) -> None:
    for _ in range(site.sizes.repeats):
        site.drop()
        _four(site, "read", site.root, "data")


def _write(pattern: str, block: str) -> Callable[[Site], None]:
    def run(site: Site) -> None:
        path = site.scratch / "data"
        site.fio(f"filename={path}", f"size={site.sizes.data // 2}", f"rw={pattern}", f"bs={block}", *_synced(pattern))

    return run


_workload("write-128k-seq", BANDWIDTH, "a new file written, 128 KiB", "MB/s")(_write("write", "128k"))
_workload("write-1m-seq", BANDWIDTH, "a new file written, 1 MiB", "MB/s")(_write("write", "1m"))
_workload("write-128k-rand", BANDWIDTH, "a new file written in random order, 128 KiB", "MB/s")(
    _write("randwrite", "128k")
)
_workload("write-1m-rand", BANDWIDTH, "a new file written in random order, 1 MiB", "MB/s")(_write("randwrite", "1m"))


@_workload("write-4-files", BANDWIDTH, "four new files written at once, 1 MiB", "MB/s")
def _(site: Site) -> None:
    _four(site, "write", site.scratch, "data")


def _direct(jobs: int) -> Callable[[Site], None]:
    def run(site: Site) -> None:
        path, size = site.root / "data", site.sizes.data
        options = ["rw=randread", "bs=4k", "direct=1", "time_based=1", f"runtime={site.sizes.duration * 1000:.0f}ms"]
        site.fio(f"filename={path}", f"size={size}", f"numjobs={jobs}", *options, work="operations")

    return run


_workload("direct-4k-1", REQUESTS, "random read, 4 KiB, O_DIRECT, 1 process")(_direct(1))
_workload("direct-4k-4", REQUESTS, "random read, 4 KiB, O_DIRECT, 4 processes")(_direct(4))


def _write_small(pattern: str) -> Callable[[Site], None]:
    def run(site: Site) -> None:
        file = [f"filename={site.scratch / 'data'}", f"size={site.sizes.share // 4}"]
        site.fio(*file, "rw=write", "bs=1m", timed=False)
        options = ["bs=4k", "time_based=1", f"runtime={site.sizes.duration * 1000:.0f}ms", *_synced(pattern)]
        site.fio(*file, f"rw={pattern}", *options, work="operations")

    return run


_workload("write-4k-seq", REQUESTS, "sequential write, 4 KiB, over an existing file")(_write_small("write"))
_workload("write-4k-rand", REQUESTS, "random write, 4 KiB, over an existing file")(_write_small("randwrite"))


@_workload("create", REQUESTS, "empty files created")
def _(site: Site) -> None:
    for _ in range(site.sizes.repeats):
        site.load("create", site.fresh_directory(), site.sizes.created)


@_workload("unlink", REQUESTS, "files unlinked that were created just before")
def _(site: Site) -> None:
    for _ in range(site.sizes.repeats):
        directory = site.fresh_directory()
        site.load("create", directory, site.sizes.created, timed=False)
        site.load("unlink", directory, site.sizes.created)


def _walk(site: Site, jobs: int = 1, seconds: float = 0, timed: bool = True) -> None:
    site.load("walk", seconds, jobs, site.root / "tree", site.sizes.directories, timed=timed)


@_workload("stat-cold", REQUESTS, "a tree's directories read and its files' attributes, nothing cached")
def _(site: Site) -> None:
    for _ in range(site.sizes.repeats):
        site.drop()
        _walk(site)


@_workload("stat-hot", REQUESTS, "the same over and over: what was cached is renewed as it expires")
def _(site: Site) -> None:
    _walk(site, timed=False)
    # Longer than the cache timeout of one second that most contenders have.
    _walk(site, seconds=2 * site.sizes.duration)


@_workload("stat-cold-4", REQUESTS, "the same tree by four processes, nothing cached")
def _(site: Site) -> None:
    for _ in range(site.sizes.repeats):
        site.drop()
        _walk(site, jobs=4)


@_workload("readdir", REQUESTS, "the names in a large directory, nothing cached")
def _(site: Site) -> None:
    for _ in range(2 * site.sizes.repeats):
        site.drop()
        site.load("list", 0, site.root / "listed")


def _read_small(site: Site, seconds: float = 0, timed: bool = True) -> None:
    sizes = site.sizes
    site.load("read", seconds, 1, site.root / "tree", sizes.directories, sizes.files, timed=timed)


@_workload("small-cold", REQUESTS, "small files opened, read and closed, nothing cached")
def _(site: Site) -> None:
    for _ in range(site.sizes.repeats):
        site.drop()
        _read_small(site)


@_workload("small-hot", REQUESTS, "the same over and over")
def _(site: Site) -> None:
    _read_small(site, timed=False)
    _read_small(site, seconds=2 * site.sizes.duration)


@_workload("untar", REQUESTS, "an archive of a source tree unpacked", "files/s")
def _(site: Site) -> None:
    archive = site.source.parent / "archive.tar"
    command = ["tar", "--extract", f"--file={archive}"]
    site.program(*command, directory=site.scratch, work=site.sizes.archive)


@_workload("git-status", REQUESTS, "git status of a work tree, nothing cached", "files/s")
def _(site: Site) -> None:
    for _ in range(site.sizes.repeats):
        site.drop()
        # Without locks git does not rewrite the index. So the index is the same for the next contender.
        command = ["git", "-c", "safe.directory=*", "--no-optional-locks", "status", "--short"]
        site.program(*command, directory=site.root / "work-tree", work=site.sizes.archive)


@_workload("compile", REQUESTS, "a C program with many headers compiled", "units/s")
def _(site: Site) -> None:
    sources = [f"unit{number:02}.c" for number in range(site.sizes.compiled)]
    command = ["gcc", "-O0", "-I", "include", "-o", str(site.scratch / "program"), *sources]
    site.program(*command, directory=site.root / "program", work=site.sizes.compiled)
