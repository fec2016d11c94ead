"""The control socket: answers, invalid messages, access control."""

from __future__ import annotations

import gc
import io
import itertools
import math
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llloop.cli import prometheus, rates, tables
from llloop.control import client, discovery, protocol, validation
from llloop.control.protocol import MAX_REQUEST
from llloop.errors import LlloopError, UsageError
from llloop.linux import mounts
from llloop.supervisor import control_server
from llloop.supervisor.control_server import MAX_CLIENTS, ControlServer
from llloop.supervisor.event_loop import EventLoop
from tests.as_user import MYSELF, Caller, Child
from tests.server import reachable_directory, remove_tree
from tests.server_processes import wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")


def refuse(request: dict[str, Any]) -> Any:
    raise UsageError("this makes no sense")


def fail(request: dict[str, Any]) -> Any:
    raise ZeroDivisionError("a fault")


COMMANDS: dict[str, control_server.Command] = {
    "echo": lambda request: request.get("text"),
    "large": lambda request: "x" * 4_000_000,
    "refuse": refuse,
    "fail": fail,
}


class Bench:
    """A control socket and those who connect to it; the socket is served only while somebody here waits for it."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / f"0{protocol.SUFFIX}")
        self.loop = EventLoop()
        self.control = ControlServer(self.loop, self.path, COMMANDS)
        self.connections: list[socket.socket] = []

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        connection.settimeout(0)
        self.connections.append(connection)
        return connection

    def serve(self, seconds: float = 0.0) -> None:
        """What the supervisor does: look, and never wait. Often enough for all that has come on any machine."""
        end = time.monotonic() + seconds
        for rounds in itertools.count(1):
            begun = time.monotonic()
            self.loop.run_once(0)
            assert time.monotonic() - begun < 10, "it has waited for somebody"
            if rounds >= 3 * MAX_CLIENTS and time.monotonic() >= end:
                return

    def read(self, connection: socket.socket) -> bytes:
        """Everything that comes, until the server has no more to say."""
        data = b""
        idle = 0
        while idle < 8:
            self.serve()
            try:
                part = connection.recv(1 << 20)
            except BlockingIOError:
                idle += 1
                continue
            except ConnectionResetError:  # closed before all of it was read
                return data
            if not part:
                return data
            idle = 0
            data += part
        return data

    def reply(self, connection: socket.socket) -> dict[str, Any]:
        data = self.read(connection)
        (length,) = struct.unpack_from("!I", data)
        assert len(data) == 4 + length
        return dict(msgpack.unpackb(data[4:]))

    def ask(self, **message: Any) -> dict[str, Any]:
        connection = self.connect()
        connection.send(protocol.encode(message))
        try:
            return self.reply(connection)
        finally:
            connection.close()

    def is_cut_off(self, connection: socket.socket) -> bool:
        self.read(connection)
        try:
            return connection.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self.control.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    own = Bench(tmp_path)
    yield own
    own.close()


def test_request_is_answered(bench: Bench) -> None:
    assert bench.ask(command="echo", text="hello") == {"result": "hello"}


def test_undecodable_names_are_transferred(bench: Bench) -> None:
    name = os.fsdecode(b"caf\xe9")
    connection = bench.connect()
    connection.send(protocol.encode({"command": "echo", "text": name}))
    assert protocol.decode(bench.read(connection)[4:]) == {"result": name}


def test_other_users_cannot_connect(bench: Bench) -> None:
    kind = os.lstat(bench.path)
    assert stat.S_ISSOCK(kind.st_mode)
    assert stat.S_IMODE(kind.st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_connection_of_another_user_is_refused(bench: Bench) -> None:
    os.chmod(bench.path, 0o666)
    for directory in Path(bench.path).parents:
        if directory.stat().st_uid == 0 and str(directory).startswith("/tmp/"):
            directory.chmod(0o755)

    def stranger() -> bool:
        os.setresuid(4001, 4001, 4001)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(bench.path)
            return connection.recv(1) == b""

    child = Child(stranger)
    bench.serve(0.5)
    assert child.result()


def test_errors_are_sent_as_text(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    assert bench.ask(command="refuse") == {"error": "this makes no sense"}
    assert "unknown command 'nonsense'; there are: echo, fail" in bench.ask(command="nonsense")["error"]
    assert "unknown command None" in bench.ask(text="no command")["error"]
    assert "unknown command ['echo']" in bench.ask(command=["echo"])["error"]
    assert caplog.text == ""
    assert "the log of the mount" in bench.ask(command="fail")["error"]
    assert "a fault" in caplog.text


def test_client_that_closes_early_is_not_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    connection = bench.connect()
    connection.send(protocol.encode({"command": "echo", "text": "hello"}))
    connection.close()
    bench.serve()
    assert caplog.text == ""


def test_several_requests_on_one_connection(bench: Bench) -> None:
    connection = bench.connect()
    for number in range(3):
        connection.send(protocol.encode({"command": "echo", "text": number}))
        assert bench.reply(connection) == {"result": number}
    connection.send(protocol.encode({"command": "nonsense"}))
    assert "error" in bench.reply(connection)
    connection.send(protocol.encode({"command": "echo", "text": 9}))
    assert bench.reply(connection) == {"result": 9}


def test_pipelined_requests_are_answered_in_order(bench: Bench) -> None:
    connection = bench.connect()
    connection.send(b"".join(protocol.encode({"command": "echo", "text": number}) for number in range(3)))
    data = bench.read(connection)
    found = []
    while data:
        (length,) = struct.unpack_from("!I", data)
        found.append(msgpack.unpackb(data[4 : 4 + length])["result"])
        data = data[4 + length :]
    assert found == [0, 1, 2]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"\xc1",
        b"\x93\x01\x02\x03",
        b"\x81\x01\x02",
        b"\x81\x80\x01",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 4000,
    ],
)
def test_invalid_message_closes_the_connection(bench: Bench, body: bytes) -> None:
    connection = bench.connect()
    connection.send(struct.pack("!I", len(body)) + body)
    data = bench.read(connection)
    assert "not a" in msgpack.unpackb(data[4:])["error"]
    assert bench.is_cut_off(connection)
    assert bench.ask(command="echo", text="still here") == {"result": "still here"}


def test_oversized_request_is_refused_by_its_length(bench: Bench) -> None:
    for length in (MAX_REQUEST + 1, 2**32 - 1):
        connection = bench.connect()
        connection.send(struct.pack("!I", length))
        assert f"{length} bytes is too long" in bench.reply(connection)["error"]
        assert bench.is_cut_off(connection)


def test_largest_request_is_accepted(bench: Bench) -> None:
    text = "x" * (MAX_REQUEST - len(protocol.encode({"command": "echo", "text": ""})) + 4 - 2)
    assert bench.ask(command="echo", text=text) == {"result": text}


def test_request_is_accepted_byte_by_byte(bench: Bench) -> None:
    connection = bench.connect()
    for byte in protocol.encode({"command": "echo", "text": "slow"}):
        connection.send(bytes([byte]))
        bench.serve()
    assert bench.reply(connection) == {"result": "slow"}


def test_incomplete_request_times_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "TIMEOUT", 0.2)
    connections = [bench.connect() for _ in range(3)]
    for connection, part in zip(connections, (b"", b"\0\0", b"\0\0\0\x09abc"), strict=True):
        connection.send(part)
    bench.serve()
    due = bench.loop.due()
    assert due is not None
    assert due <= time.monotonic() + 0.2
    assert bench.ask(command="echo", text="meanwhile") == {"result": "meanwhile"}
    bench.serve(0.3)
    assert all(bench.is_cut_off(connection) for connection in connections)


def test_client_that_does_not_read_is_disconnected(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "TIMEOUT", 0.2)
    connection = bench.connect()
    connection.send(protocol.encode({"command": "large"}))
    bench.serve()
    assert bench.ask(command="echo", text="meanwhile") == {"result": "meanwhile"}
    bench.serve(0.3)
    assert 0 < len(bench.read(connection)) < 4_000_000
    assert bench.is_cut_off(connection)


def test_large_reply_is_sent_in_pieces(bench: Bench) -> None:
    connection = bench.connect()
    connection.send(protocol.encode({"command": "large"}))
    assert len(bench.reply(connection)["result"]) == 4_000_000


@pytest.mark.parametrize("sent", [b"", b"\0\0", protocol.encode({"command": "echo"})[:-1]])
def test_unfinished_requests_keep_nobody_waiting(bench: Bench, sent: bytes) -> None:
    """However many connections there are, the oldest goes first."""
    descriptors = len(os.listdir("/proc/self/fd"))
    hostile = []
    for _ in range(20 * MAX_CLIENTS):
        hostile.append(bench.connect())
        hostile[-1].send(sent)
        bench.serve()
    late = bench.connect()
    late.send(protocol.encode({"command": "echo", "text": "late"}))
    assert bench.reply(late) == {"result": "late"}
    assert len(os.listdir("/proc/self/fd")) - descriptors <= len(hostile) + 1 + MAX_CLIENTS
    assert not bench.loop.run_once(0), "the supervisor would spin"
    for one in hostile:
        one.close()


def test_disconnected_clients_leave_no_state(bench: Bench) -> None:
    gc.collect()  # objects of other tests must not be collected meanwhile
    descriptors = len(os.listdir("/proc/self/fd"))
    for message in (b"", b"\0", protocol.encode({"command": "large"})):
        for _ in range(30):
            connection = bench.connect()
            connection.send(message)
            connection.close()
            bench.serve()
    bench.serve(0.1)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert bench.loop.due() is None


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.builds(lambda body: struct.pack("!I", len(body)) + body, st.binary())))
def test_arbitrary_bytes_are_harmless(bench: Bench, data: bytes) -> None:
    connection = bench.connect()
    connection.send(data)
    bench.read(connection)
    connection.close()
    assert bench.ask(command="echo", text=1) == {"result": 1}


def test_old_socket_is_replaced(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    successor = ControlServer(bench.loop, bench.path, {"echo": lambda request: "successor"})
    try:
        bench.close()
        assert os.path.exists(bench.path), "a server took its successor's socket away"
        assert os.listdir(tmp_path) == [os.path.basename(bench.path)]
        bench.control = successor
        assert bench.ask(command="echo") == {"result": "successor"}
    finally:
        successor.close()
    assert os.listdir(tmp_path) == []


def test_only_stale_sockets_are_removed(bench: Bench, tmp_path: Path) -> None:
    stale = tmp_path / f"stale{protocol.SUFFIX}"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    (tmp_path / "something else").touch()
    # A socket that another server is creating, and one whose server was killed while it created it.
    making, killed = tmp_path / f".{os.getpid()}-name{protocol.SUFFIX}", tmp_path / f".4194305-name{protocol.SUFFIX}"
    for path in (making, killed):
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    assert control_server.is_stale(str(stale))
    assert not control_server.is_stale(bench.path)
    control_server.remove_stale(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted([making.name, os.path.basename(bench.path), "something else"])


def sockets_below(directory: Path) -> set[str]:
    """What proc(5) calls the sockets with names in a directory, and the connections that they have accepted."""
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return {f"socket:[{fields[6]}]" for fields in lines if fields[-1].startswith(str(directory))}


def socket_links(pid: int) -> set[str]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            found.add(os.readlink(path))
    return {link for link in found if link.startswith("socket:")}


def test_forked_child_does_not_listen(tmp_path: Path) -> None:
    """Otherwise a client would wait for a dead supervisor while one of its children lives."""
    bench = Bench(tmp_path)
    connection = bench.connect()
    bench.serve()
    reader, writer = os.pipe()
    child = Child(os.read, reader, 1)
    try:
        served = sockets_below(tmp_path) & socket_links(os.getpid())
        assert len(served) == 2, "that which listens, and the connection"
        assert wait_until(lambda: served.isdisjoint(socket_links(child.pid)))
        assert not bench.is_cut_off(connection), "the child has closed what the parent goes on with"
    finally:
        os.write(writer, b"!")
        child.result()
        os.close(reader)
        os.close(writer)
        bench.close()


def test_socket_that_cannot_be_created(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        ControlServer(EventLoop(), str(tmp_path / "missing" / "0.sock"), COMMANDS)
    with pytest.raises(OSError):
        ControlServer(EventLoop(), str(tmp_path / ("long" * 40)), COMMANDS)
    assert os.listdir(tmp_path) == []


# The client


def test_client_returns_the_result(bench: Bench) -> None:
    child = Child(client.ask, bench.path, "echo")
    bench.serve(0.3)
    assert child.result() is None


def test_client_reports_why_there_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "0.sock")
    with pytest.raises(client.NotReachable, match="gone"):
        client.ask(path, "status")
    monkeypatch.setattr(client, "TIMEOUT", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        with pytest.raises(client.NotReachable, match="gone"):
            client.ask(path, "status")
        silent.listen()
        with pytest.raises(client.NotReachable, match=r"within 0\.1 seconds"):
            client.ask(path, "status")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"", "cut short"),
        (b"\0\0\0\x09abc", "cut short"),
        (b"\xff\xff\xff\xff", "4294967295 bytes"),
        (b"\0\0\0\x01\xc1", "msgpack"),
        (b"\0\0\0\x01\x01", "map"),
        (b"\0\0\0\x0c\x81\xa5error\xa4oops", "^oops$"),
    ],
)
def test_client_refuses_invalid_replies(tmp_path: Path, reply: bytes, reason: str) -> None:
    path = str(tmp_path / "0.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(reply)
            connection.close()

        child = Child(answer)
        with pytest.raises(LlloopError, match=reason):
            client.ask(path, "status")
        child.result()


STATUS = {
    **{"source": "/src", "mountpoint": "/mnt", "version": "1", "state": "serving", "pid": 1, "began": 1.5, "uptime": 2},
    **{"loop": "own", "protocol": "7.45", "capabilities": ["async_read"], "options": {"workers": 2, "options": ["ro"]}},
    "in_force": {"cache": "none", "io": "workers", "metadata": "front", "watch": "off"},
    "processes": [{"role": "front", "pid": 7, "state": "S", "restarts": 0, "busy": None}],
}
COUNTS = {"requests": 1, "errors": 0, "bytes": 0}
PROCESS = {**COUNTS, "pid": None, "state": "S", "restarts": 0, "descriptors": 9, "cpu_seconds": 0.5}
STATS = {
    **{"source": "/src", "mountpoint": "/mnt", "state": "serving", "time": 5.0, "uptime": 2, "inodes": 1, "handles": 0},
    "operations": {"READ": {**COUNTS, "nanoseconds": 5, "histogram": [0, 1], "errnos": {"EIO": 1}}},
    "front": PROCESS,
    "workers": [{**PROCESS, "name": "worker-0", "queue": 0}],
    "awake_seconds": 0.5,
    "slots": {"used": 0, "total": 2},
    "cache": {"kept": 0, "dropped": 0, "bypassed": 0, "passed_through": 0},
    "watch": {
        **{"heard": 1, "own": 0, "ignored": 0, "notified": 1, "told": 0, "dropped": 0},
        **{"nanoseconds": 5, "histogram": [0, 1]},
    },
}
ANSWERS = {"status": STATUS, "stats": STATS}
PROBLEM = "the source has been deleted"
# What a value may be replaced by.
STRANGE: tuple[object, ...] = (
    None,
    -1,
    1 << 70,
    math.nan,
    math.inf,
    True,
    "x" * 100_000,
    [],
    [[]],
    {},
    {"": {}},
    b"\xff",
    "serving",
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in *value*."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places(one, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = replaced(copied[path[0]], path[1:], by)
    return copied


def show(command: str, answer: Any) -> str:
    """Everything that is made of an answer."""
    console = tables.console()
    console.file = io.StringIO()
    if command == "status":
        problems = discovery.process_problems(answer.get("processes", ()))
        console.print(tables.status_view([{**answer, "visible": True, "problems": problems}]))
    else:
        console.print(
            tables.stats_view([rates.rates_since(answer, before) for before in (None, {**STATS, "time": 4.0})])
        )
        prometheus.text([{**answer, "source_problem": PROBLEM}])
    return console.file.getvalue()


@pytest.mark.parametrize("command", ANSWERS)
def test_answer_of_wrong_shape_is_refused(command: str) -> None:
    """A server of another version or of another user may answer anything."""
    answer, shape = ANSWERS[command], validation.SHAPES[command]
    show(command, validation.validated(answer, shape))
    refused = 0
    for path in places(answer):
        for strange in STRANGE:
            received = msgpack.unpackb(msgpack.packb(replaced(answer, path, "")))
            received = replaced(received, path, strange)
            try:
                believed = validation.validated(received, shape)
            except validation.ShapeMismatch:
                refused += 1
                continue
            show(command, believed)
    assert refused > 200
    for key in answer:
        with pytest.raises(validation.ShapeMismatch):
            validation.validated({name: value for name, value in answer.items() if name != key}, shape)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.floats() | st.integers() | st.text(), lambda one: st.lists(one) | st.dictionaries(st.text(), one)
    )
)
def test_arbitrary_answers_are_handled(answer: Any) -> None:
    for shape in validation.SHAPES.values():
        with pytest.raises(validation.ShapeMismatch):
            validation.validated(answer, shape)


def test_untrusted_text_is_escaped_on_the_terminal() -> None:
    evil = "[/red][bold]:warning:\x1b[2J\x1b]0;x\x07\n\u202e\x9b"
    answer = replaced(STATUS, ("options",), {evil: evil, "options": [evil]})
    for path in (("source",), ("mountpoint",), ("loop",), ("protocol",), ("capabilities", 0), ("version",)):
        answer = replaced(answer, path, evil)
    for key in ("role", "state"):
        answer = replaced(answer, ("processes", 0, key), evil)
    text = show("status", validation.validated(answer, validation.STATUS))
    silent = {"mountpoint": evil, "source": evil, "state": "unknown", "visible": True, "reason": evil}
    text += show("status", silent)
    stats = replaced(replaced(replaced(STATS, ("mountpoint",), evil), ("source",), evil), ("workers", 0, "name"), evil)
    text += show("stats", validation.validated(stats, validation.STATS))
    text += prometheus.text([{**stats, "source_problem": evil}, silent])
    assert all(one.isprintable() or one == "\n" for one in text)


@needs_root
def test_server_of_another_user_is_not_trusted(bench: Bench) -> None:
    """Another user may have created a socket where the client searches for one."""
    child = Child(client.ask, bench.path, "echo", caller=MYSELF)
    bench.serve(0.3)
    assert child.result() is None
    os.chmod(bench.path, 0o666)
    reader, writer = os.pipe()
    place = reachable_directory("llloop-impostor-")

    def impostor() -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place / "0.sock"))
            server.listen()
            os.write(writer, b"!")
            connection, _ = server.accept()
            connection.settimeout(30)
            assert connection.recv(1000) == b"", "it has been told something"

    place.chmod(0o777)
    try:
        child = Child(impostor, caller=Caller(4001, 4001))
        os.read(reader, 1)
        with pytest.raises(client.NotReachable, match="runs as user 4001"):
            client.ask(str(place / "0.sock"), "status")
        child.result()
    finally:
        os.close(reader)
        os.close(writer)
        remove_tree(place)


def test_all_servers_together_have_one_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.3)
    silent = []
    for number in range(100):
        one = socket.socket(socket.AF_UNIX)
        one.bind(str(tmp_path / f"{number}.sock"))
        one.listen()
        silent.append(one)
    monkeypatch.setattr(protocol, "all_directories", lambda: [str(tmp_path)])
    monkeypatch.setattr(mounts, "mounts", lambda: [])
    begun = time.monotonic()
    paths = list(protocol.sockets())
    assert len(paths) == 100
    assert discovery.all_statuses() == []
    assert time.monotonic() - begun < 15, "one after the other they take 30 s"
    for one in silent:
        one.close()


def test_all_sockets_of_a_mount_together_have_one_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.3)
    entry = mounts.mounts()[0]
    silent = []
    for number in range(20):
        one = socket.socket(socket.AF_UNIX)
        major, minor = entry.device
        one.bind(str(tmp_path / f"{number}-{major}-{minor}.sock"))
        one.listen()
        silent.append(one)
    monkeypatch.setattr(protocol, "all_directories", lambda: [str(tmp_path)])
    begun = time.monotonic()
    with pytest.raises(client.NotReachable, match="has not answered"):
        client.ask_entry(entry, "stats")
    assert time.monotonic() - begun < 1.5
    for one in silent:
        one.close()


# Where sockets are


def test_socket_names_distinguish_mounts() -> None:
    names = {
        protocol.socket_name(mountpoint, device)
        for mountpoint in ("/mnt", "/mnt2", "/" + "x" * 4000, os.fsdecode(b"/\xff"))
        for device in ((0, 57), (0, 58), (5, 7))
    }
    assert len(names) == 12
    assert all(len(f"/run/user/4294967295/llloop/.4194304-{name}") < 108 for name in names), "unix(7), sun_path"


def test_directory_writable_for_others_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, link, own = tmp_path / "theirs", tmp_path / "link", tmp_path / "own"
    theirs.mkdir()
    theirs.chmod(0o777)
    link.symlink_to(theirs)
    monkeypatch.setattr(protocol, "own_directories", lambda: [str(theirs), str(link), str(own)])
    assert protocol.make_directory() == str(own)
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert protocol.all_directories()[:1] == [str(own)]


@needs_root
def test_directory_below_another_users_is_not_used(monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    """Its owner could replace it at any time. After su(1), XDG_RUNTIME_DIR may name another user's directory."""
    theirs = shared / "theirs"
    theirs.mkdir()
    os.chown(theirs, 4001, 4001)
    monkeypatch.setattr(protocol, "ROOT_DIRECTORY", str(shared / "missing" / "llloop"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(theirs))
    found = Path(protocol.make_directory())
    assert found.parent != theirs
    assert os.listdir(theirs) == []


def test_users_with_the_same_id_use_different_directories(monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    """Root of a user namespace has the same id as root, and any user can create the directory first."""
    monkeypatch.setattr(protocol, "own_directories", lambda: protocol.shared_directories(os.geteuid()))
    first = shared / f"llloop-{os.geteuid()}"
    first.mkdir()
    first.chmod(0o777)  # like a directory of another user, as far as an ordinary user can create one
    made = protocol.make_directory()
    assert made.startswith(f"{first}-")
    assert stat.S_IMODE(os.stat(made).st_mode) == 0o700
    assert protocol.make_directory() == made, "it is used again"
    assert made in protocol.all_directories()
    assert str(first) not in protocol.all_directories()


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = reachable_directory("llloop-control-")
    path.chmod(0o1777)
    monkeypatch.setattr(protocol, "TMP", str(path))
    yield path
    remove_tree(path)


def test_socket_directories_of_a_user(monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/somewhere")
    assert protocol.own_directories() == ["/run/somewhere/llloop", "/run/user/1000/llloop", f"{shared}/llloop-1000"]
    monkeypatch.setenv("XDG_RUNTIME_DIR", "not absolute")
    assert protocol.own_directories()[0] == "/run/user/1000/llloop"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert protocol.own_directories()[0] == "/run/llloop"
