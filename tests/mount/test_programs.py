"""Programs that store important data, run in the mount; they verify their data on both sides."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import random
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import Postgres, quiet_environment, run
from tests.server import Tree

pytestmark = [pytest.mark.user, pytest.mark.timeout(150)]


# git


COMMITS = 300
FILES = 120


def history() -> bytes:
    """A repository's history for git fast-import: the same bytes at every run."""
    chance = random.Random(2)
    stream = [b"feature done\n"]
    for number in range(1, COMMITS + 1):
        message = f"Commit {number}".encode()
        stream.append(b"commit refs/heads/main\nmark :%d\n" % number)
        stream.append(b"committer A U Thor <author@example.com> %d +0000\n" % (1_600_000_000 + number))
        stream.append(b"data %d\n%s\n" % (len(message), message))
        for _ in range(4):
            content = chance.randbytes(chance.randrange(4000)).hex().encode()
            name = f"directory-{chance.randrange(10)}/file-{chance.randrange(FILES)}".encode()
            stream.append(b"M 100644 inline %s\ndata %d\n%s\n" % (name, len(content), content))
    stream.append(b"done\n")
    return b"".join(stream)


@pytest.fixture(scope="module")
def git_origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    origin = tmp_path_factory.mktemp("git") / "origin.git"
    run("git", "init", "-q", "--bare", "--initial-branch=main", origin)
    subprocess.run(["git", "-C", origin, "fast-import", "--quiet"], input=history(), check=True, timeout=60)
    return origin


@pytest.fixture
def git_env(tmp_path: Path) -> dict[str, str]:
    identity = {"NAME": "A U Thor", "EMAIL": "author@example.com"}
    people = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in identity.items()}
    return {**quiet_environment(tmp_path), **people, "GIT_CONFIG_NOSYSTEM": "1"}


def test_git_clone_fsck_and_gc(tree: Tree, git_origin: Path, git_env: dict[str, str]) -> None:
    clone = tree.mnt / "clone"
    run("git", "clone", "-q", f"file://{git_origin}", clone, env=git_env)
    expected = run("git", "-C", git_origin, "rev-parse", "main^{tree}", env=git_env)
    assert run("git", "-C", clone, "rev-list", "--count", "HEAD", env=git_env).strip() == str(COMMITS)
    assert run("git", "-C", clone, "rev-parse", "HEAD^{tree}", env=git_env) == expected
    run("git", "-C", clone, "fsck", "--full", "--strict", env=git_env)
    run("git", "-C", clone, "repack", "-q", "-a", "-d", "-f", env=git_env)
    run("git", "-C", clone, "gc", "-q", "--prune=now", env=git_env)
    assert run("git", "-C", clone, "status", "--porcelain", env=git_env) == ""
    # Compare with the files in the source, not with a cache of the mount.
    run("git", "-C", tree.src / "clone", "fsck", "--full", "--strict", env=git_env)
    assert run("git", "-C", tree.src / "clone", "status", "--porcelain", env=git_env) == ""


def test_git_local_clone_branches_and_merges(tree: Tree, git_origin: Path, git_env: dict[str, str]) -> None:
    first, second = tree.mnt / "first", tree.mnt / "second"
    run("git", "clone", "-q", f"file://{git_origin}", first, env=git_env)
    # A local clone hard-links the objects.
    run("git", "clone", "-q", first, second, env=git_env)
    packs = list((second / ".git" / "objects" / "pack").glob("*.pack"))
    assert packs and all(pack.stat().st_nlink == 2 for pack in packs)
    for number in range(5):
        run("git", "-C", second, "checkout", "-q", "-b", f"topic-{number}", f"main~{20 * number + 1}", env=git_env)
        (second / f"topic-{number}").write_text(f"{number}\n")
        run("git", "-C", second, "add", ".", env=git_env)
        run("git", "-C", second, "commit", "-q", "-m", f"Topic {number}", env=git_env)
    run("git", "-C", second, "checkout", "-q", "main", env=git_env)
    for number in range(5):
        run("git", "-C", second, "merge", "-q", "--no-edit", f"topic-{number}", env=git_env)
    run("git", "-C", second, "push", "-q", "origin", "main:merged", env=git_env)
    assert run("git", "-C", second, "status", "--porcelain", env=git_env) == ""
    for clone in (first, second, tree.src / "first", tree.src / "second"):
        run("git", "-C", clone, "fsck", "--full", "--strict", env=git_env)
    merged = run("git", "-C", first, "ls-tree", "--name-only", "merged", env=git_env).split()
    assert {f"topic-{number}" for number in range(5)} <= set(merged)


# SQLite


WRITER = """
import sqlite3, sys
path, writer, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
connection = sqlite3.connect(path, timeout=60, isolation_level=None)
for row in range(rows):
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (writer, row, f"{writer}:{row} " * 40))
    connection.execute("UPDATE counters SET value = value + 1")
    connection.execute("COMMIT")
connection.close()
"""


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "wal"])
def test_sqlite_with_several_writers(tree: Tree, journal: str) -> None:
    writers, rows = 4, 40
    database = tree.mnt / "base.sqlite"
    connection = sqlite3.connect(database)
    assert connection.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)
    connection.executescript(
        "CREATE TABLE entries (writer, row, content, PRIMARY KEY (writer, row));"
        "CREATE TABLE counters (value); INSERT INTO counters VALUES (0);"
    )
    connection.close()
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, database, str(writer), str(rows)]) for writer in range(writers)
    ]
    try:
        assert [process.wait(timeout=60) for process in processes] == [0] * writers
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # All connections are closed, so SQLite has merged the write-ahead log. The file in the source is complete.
    for side in (tree.mnt, tree.src):
        answers = run(
            "sqlite3",
            side / "base.sqlite",
            "PRAGMA integrity_check; SELECT value FROM counters; SELECT count(*), sum(length(content)) FROM entries;",
        )
        length = sum(len(f"{writer}:{row} " * 40) for writer in range(writers) for row in range(rows))
        assert answers.split() == ["ok", str(writers * rows), f"{writers * rows}|{length}"]


def test_sqlite_rolls_back_after_a_killed_writer(tree: Tree) -> None:
    database = tree.mnt / "base.sqlite"
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE entries (content)")
    connection.executemany("INSERT INTO entries VALUES (?)", [("first" * 500,)] * 500)
    connection.commit()
    connection.close()
    # With a tiny page cache, SQLite writes the unfinished transaction to the database, and its journal beside it.
    killed = (
        "import os, signal, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1])\n"
        "connection.execute('PRAGMA cache_size=5')\n"
        "connection.execute('UPDATE entries SET content = ?', ('second' * 600,))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", killed, database], timeout=60).returncode == -9
    assert (tree.mnt / "base.sqlite-journal").stat().st_size > 0
    assert b"second" in (tree.src / "base.sqlite").read_bytes(), "nothing that would have to be rolled back"
    query = "PRAGMA integrity_check; SELECT count(*), count(DISTINCT content), min(content) FROM entries;"
    for side in (tree.mnt, tree.src):
        assert run("sqlite3", side / "base.sqlite", query).split() == ["ok", f"500|1|{'first' * 500}"]


# tar and rsync


@pytest.fixture(scope="module")
def real_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's standard library, and what it lacks: hard links, an empty directory, odd modes and names."""
    original = tmp_path_factory.mktemp("original") / "lib"
    ignored = shutil.ignore_patterns(
        "__pycache__", "site-packages", "dist-packages", "test", "tests", "*.so", "config-*"
    )
    shutil.copytree(sysconfig.get_path("stdlib"), original, symlinks=True, ignore=ignored)
    (original / "empty").mkdir(mode=0o750)
    os.link(original / "os.py", original / "hard-link")
    os.symlink("json/decoder.py", original / "symbolic-link")
    os.symlink("no such file", original / "dangling")
    (original / "read-only").write_bytes(b"read only")
    (original / "read-only").chmod(0o444)
    (original / "setgid").mkdir()
    (original / "setgid").chmod(0o2775)
    (original / "a name with 'quotes', blanks\nand a line's end").write_bytes(b"\0" * 5000)
    with open(original / "sparse", "wb") as sparse:
        sparse.seek(1 << 20)
        sparse.write(b"end")
    os.utime(original / "sparse", ns=(1_000_000_000_123_456_789, 1_000_000_000_987_654_321))
    return original


def differences(one: Path, other: Path) -> str:
    """What rsync would do to make them equal, by content, modes, owners, times and hard links: nothing if they are."""
    return run("rsync", "-aHn", "--checksum", "--itemize-changes", "--delete", f"{one}/", f"{other}/")


def count_files(root: Path) -> int:
    return sum(len(names) + len(files) for _, names, files in os.walk(root))


def test_tar_into_and_out_of_the_mount(tree: Tree, real_tree: Path, tmp_path: Path) -> None:
    assert count_files(real_tree) > 400
    into, out_of = tmp_path / "into.tar", tmp_path / "out.tar"
    run("tar", "-C", real_tree, "--sparse", "-cf", into, ".")
    (tree.mnt / "lib").mkdir()
    run("tar", "-C", tree.mnt / "lib", "-xpf", into)
    for side in (tree.mnt, tree.src):
        run("tar", "-C", side / "lib", "--compare", "-f", into)
        assert differences(real_tree, side / "lib") == ""
    run("tar", "-C", tree.mnt / "lib", "--sparse", "-cf", out_of, ".")
    back = tmp_path / "back"
    back.mkdir()
    run("tar", "-C", back, "-xpf", out_of)
    assert differences(real_tree, back) == ""
    assert (tree.mnt / "lib" / "sparse").stat().st_blocks == (tree.src / "lib" / "sparse").stat().st_blocks
    run("rm", "-r", tree.mnt / "lib")
    assert not (tree.src / "lib").exists()


def test_rsync_into_and_out_of_the_mount(tree: Tree, real_tree: Path, tmp_path: Path) -> None:
    run("rsync", "-aH", f"{real_tree}/", f"{tree.mnt}/lib/")
    assert differences(real_tree, tree.mnt / "lib") == ""
    assert differences(real_tree, tree.src / "lib") == ""
    run("rsync", "-aH", f"{tree.mnt}/lib/", f"{tmp_path}/back/")
    assert differences(real_tree, tmp_path / "back") == ""


def test_rsync_updates_an_old_copy(tree: Tree, real_tree: Path) -> None:
    copy = tree.mnt / "lib"
    run("rsync", "-aH", f"{real_tree}/", f"{copy}/")
    (copy / "json" / "decoder.py").write_text("changed\n")
    os.truncate(copy / "argparse.py", 1000)
    (copy / "abc.py").unlink()
    (copy / "not in the original").write_text("new\n")
    (copy / "xml").rename(copy / "renamed")
    assert differences(real_tree, copy) != ""
    run("rsync", "-aH", "--delete", "--inplace", "--no-whole-file", f"{real_tree}/", f"{copy}/")
    assert differences(real_tree, copy) == ""
    assert differences(real_tree, tree.src / "lib") == ""


# A compiler


def test_compile_and_run_a_c_program(tree: Tree) -> None:
    sources = {
        "greeting.h": "const char *greeting(void);\n",
        "greeting.c": '#include "greeting.h"\nconst char *greeting(void) { return "made in the mount"; }\n',
        "shared.c": "int answer(void) { return 42; }\n",
        "main.c": (
            '#include <dlfcn.h>\n#include <stdio.h>\n#include "greeting.h"\n'
            "int main(int count, char **arguments) {\n"
            "    void *library = dlopen(arguments[1], RTLD_NOW);\n"
            "    if (count != 2 || !library) return 1;\n"
            '    int (*answer)(void) = (int (*)(void))dlsym(library, "answer");\n'
            '    printf("%s %d\\n", greeting(), answer());\n'
            "    return 0;\n}\n"
        ),
    }
    for name, text in sources.items():
        (tree.mnt / name).write_text(text)
    run("gcc", "-O2", "-c", "greeting.c", cwd=tree.mnt)
    run("ar", "rcs", "libgreeting.a", "greeting.o", cwd=tree.mnt)
    run("gcc", "-O2", "-shared", "-fPIC", "-o", "shared.so", "shared.c", cwd=tree.mnt)
    run("gcc", "-O2", "-g", "-o", "program", "main.c", "-L.", "-lgreeting", "-ldl", cwd=tree.mnt)
    assert run(tree.mnt / "program", tree.mnt / "shared.so", cwd=tree.mnt) == "made in the mount 42\n"
    assert run(tree.src / "program", tree.src / "shared.so") == "made in the mount 42\n"


# pip


def make_wheel(directory: Path) -> None:
    info = "llloop_example_wheel-1.0.dist-info"
    members = {
        "llloop_example_wheel.py": "NAME = 'from a wheel'\ndef main():\n    print(NAME)\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: llloop-example-wheel\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nllloop-example = llloop_example_wheel:main\n",
    }
    with zipfile.ZipFile(directory / "llloop_example_wheel-1.0-py3-none-any.whl", "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*members, f"{info}/RECORD"]))


# With a build backend inside the sdist, pip downloads nothing.
BACKEND = """
import zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    name = "llloop_example_sdist-1.0-py3-none-any.whl"
    info = "llloop_example_sdist-1.0.dist-info"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as archive:
        archive.write("llloop_example_sdist.py")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: llloop-example-sdist\\nVersion: 1.0\\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr(f"{info}/RECORD", "")
    return name
"""


def make_sdist(directory: Path, scratch: Path) -> None:
    root = scratch / "llloop_example_sdist-1.0"
    root.mkdir()
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (root / "backend.py").write_text(BACKEND)
    (root / "llloop_example_sdist.py").write_text("NAME = 'from an sdist'\n")
    (root / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: llloop-example-sdist\nVersion: 1.0\n")
    with tarfile.open(directory / f"{root.name}.tar.gz", "w:gz") as archive:
        archive.add(root, arcname=root.name)


@pytest.mark.slow
def test_pip_installs_into_a_venv(tree: Tree, tmp_path: Path) -> None:
    packages = tree.mnt / "packages"
    packages.mkdir()
    make_wheel(packages)
    make_sdist(packages, tmp_path)
    # pip's temporary files are in the mount, too.
    (tree.mnt / "tmp").mkdir()
    env = {**quiet_environment(tmp_path), "PIP_CONFIG_FILE": "/dev/null", "TMPDIR": str(tree.mnt / "tmp")}
    venv = tree.mnt / "venv"
    run(sys.executable, "-m", "venv", venv, env=env)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    run(
        *pip, "install", "--no-index", "--find-links", packages, "llloop-example-wheel", "llloop-example-sdist", env=env
    )
    assert run(venv / "bin" / "llloop-example", env=env) == "from a wheel\n"
    printed = run(venv / "bin" / "python", "-c", "import llloop_example_sdist as m; print(m.NAME, m.__file__)", env=env)
    assert printed.startswith(f"from an sdist {venv}/")
    run(*pip, "check", env=env)
    run(*pip, "uninstall", "-y", "llloop-example-wheel", env=env)
    assert not (tree.src / "venv" / "bin" / "llloop-example").exists()


# PostgreSQL


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A socket's path has at most 107 bytes; pytest's own temporary directories use them up."""
    path = Path("/tmp") / f"llloop-pg-{os.getpid()}"
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
def test_postgresql_initdb_pgbench_and_recovery(tree: Tree, short_directory: Path) -> None:
    clients, transactions = 4, 150
    server = Postgres(tree.mnt, short_directory)
    server.program("initdb", "-D", server.data, "-U", "tester", "--auth=trust", "--data-checksums", "--no-locale")
    try:
        server.start()
        server.bench("-i", "-q", "-s", "2")
        server.bench("-c", str(clients), "-j", "2", "-t", str(transactions))
        # PostgreSQL recovers after the crash only if fsync worked and no page is torn.
        server.stop("immediate")
        server.start()
        assert server.query("SELECT count(*) FROM pgbench_history") == str(clients * transactions)
        balances = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)"
        assert server.query(balances) == "t"
        server.stop("fast")
    finally:
        if server.running():
            server.stop("immediate")
    for side in (tree.mnt, tree.src):
        assert "Bad checksums:  0" in server.program("pg_checksums", "--check", "-D", side / "data")
    owners = {path.stat().st_uid for path in (tree.src / "data").rglob("*")}
    assert owners == {pwd.getpwnam(server.user).pw_uid if server.user else os.getuid()}


# fio


FIO_JOBS = {
    "buffered": ["--ioengine=psync", "--rw=randrw", "--bsrange=512-128k", "--bs_unaligned"],
    "direct": ["--ioengine=libaio", "--iodepth=8", "--direct=1", "--rw=randwrite", "--bsrange=4k-256k"],
    "mmap": ["--ioengine=mmap", "--rw=randwrite", "--bs=4k"],
    "vectors": ["--ioengine=pvsync2", "--rw=write", "--bs=1m", "--fsync=8"],
}


@pytest.mark.parametrize("job", FIO_JOBS)
def test_fio_verifies_its_data(tree: Tree, tmp_path: Path, job: str) -> None:
    report = tmp_path / "report.json"
    arguments = ["--size=8m", "--numjobs=3", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randrepeat=1"]
    output = ["--output-format=json", f"--output={report}"]
    # Run in tmp_path, because fio leaves files in its working directory.
    run("fio", f"--name={job}", f"--directory={tree.mnt}", *arguments, *FIO_JOBS[job], *output, cwd=tmp_path)
    results = json.loads(report.read_text())["jobs"]
    assert len(results) == 3
    assert all(result["error"] == 0 and result["write"]["total_ios"] > 0 for result in results)
    digests = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in side.iterdir()}
        for side in (tree.mnt, tree.src)
    ]
    assert digests[0] == digests[1] and len(digests[0]) == 3
