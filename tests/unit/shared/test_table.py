"""The inode table: what the next front finds of it, wherever the one before was killed."""

from __future__ import annotations

import contextlib
import copy
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llloop.shared import table as table_module
from llloop.shared.metrics import own_cell
from llloop.shared.table import CELLS_SHIFT, MOST_NAMES, ROOT, SETTLED, UNSETTLED, Table, hash_of
from tests.expect import fails
from tests.unit.killable_front import Killed, Life, killable_table, living
from tests.unit.support import heir_of_table

DEVICE = 0x801
NAMES = [b"a", b"x" * 39, b"x" * 40, b"y" * 80, b"y" * 81, b"z" * 255, b"\xff" * 300, b"p" * 1023]
Names = tuple[tuple[int, bytes], ...]


def new_table(capacity: int = 1 << 10) -> Table:
    table = Table(capacity)
    table.recover(own_cell())
    table.add_root(2, DEVICE, 0)
    return table


def add(table: Table, number: int, name: bytes = b"name", parent: int = ROOT, device: int = DEVICE) -> int:
    """Make an inode of which the kernel knows; return its place."""
    place = table.add(hash_of(number, device), number, device, 0, 7, parent, name) & table.mask
    table.settle(place)
    return place


def content(table: Table) -> dict[int, Names]:
    """The names of all inodes, sorted, by number; and a check that nothing is lost, left over or in two places.

    A process that is killed may leave a name twice in one inode's chain, which does no harm: it is dropped everywhere.
    """
    found: dict[int, Names] = {}
    used = bytes(table.states[: table._used])
    places = {place for place, state in enumerate(used) if state in (SETTLED, UNSETTLED)}
    rows = set(places)
    for place in places:
        own = table._name_rows(place)
        assert len(own) == len(set(own)) and not rows & set(own), "two inodes share a name's row"
        rows |= set(own)
        number = table.cells[(place << CELLS_SHIFT) + 1]
        found[number] = tuple(sorted(set(table.names(place))))
        assert table.cells[place << CELLS_SHIFT] & table.mask == place
    assert {place for place, state in enumerate(used) if state} == rows, "a row is lost"
    assert not set(table._in_state(table_module._UNSETTLED_NAME))
    assert len(table) == len(places)
    chained = []
    for bucket in range(table._buckets):
        place = table.heads[bucket]
        while place:
            chain = table.cells[(place << CELLS_SHIFT) + table_module._CHAIN]
            assert table._bucket(chain >> table_module._PLACE_BITS) == bucket
            chained.append(place)
            place = chain & table_module._PLACE
    assert sorted(chained) == sorted(places), "an inode cannot be found, or twice"
    return found


def recovered(table: Table) -> Table:
    own = heir_of_table(table)
    own.recover(own_cell())
    return own


@pytest.fixture
def table() -> Iterator[Table]:
    own = new_table()
    yield own
    own.close()


@pytest.mark.parametrize("name", NAMES, ids=len)
def test_an_inode_is_found_with_its_name(table: Table, name: bytes) -> None:
    place = add(table, 100, name)
    assert table.find(hash_of(100, DEVICE), 100, DEVICE, 0) == place
    assert table.names(place) == [(ROOT, name)] == [table.first_name(place)]
    assert content(recovered(table))[100] == ((ROOT, name),)


@pytest.mark.parametrize("name", NAMES, ids=len)
def test_nothing_is_left_of_what_is_removed(table: Table, name: bytes) -> None:
    before = content(table)
    place = add(table, 100, name)
    table.add_name(place, ROOT, b"other" * 60)
    table.remove(place)
    assert content(table) == before
    assert table.find(hash_of(100, DEVICE), 100, DEVICE, 0) == 0


def test_a_nodeid_is_never_used_again(table: Table) -> None:
    seen = set()
    for number in range(2000):
        nodeid = table.add(hash_of(number, DEVICE), number, DEVICE, 0, 0, ROOT, b"name")
        seen.add(nodeid)
        table.remove(nodeid & table.mask)
        if number % 100 == 0:
            table = recovered(table)
    assert len(seen) == 2000
    assert table._used < 10, "places are used again"


def test_no_place_is_given_out_twice_after_a_take_over(table: Table) -> None:
    """An inode's place is free in the table until its row is written, and a long name takes places before that."""
    places = [add(table, number) for number in range(100, 104)]
    table = recovered(table)
    table.remove(places[1])
    add(table, 200, b"long" * 60)
    assert content(table)[200] == ((ROOT, b"long" * 60),)


def test_memory_of_forgotten_inodes_is_given_back() -> None:
    table = new_table(1 << 17)

    def blocks() -> int:
        # The memory is a file without a name; this is the space that it takes.
        (line,) = (line for line in Path("/proc/self/smaps").read_text().split("VmFlags") if "llloop-inodes" in line)
        return int(line.partition("Rss:")[2].split()[0])

    before = blocks()
    kept = add(table, 1, b"kept" * 20)
    places = [add(table, number) for number in range(100, 66_000)]
    full = blocks()
    for place in places:
        table.remove(place)
    assert blocks() - before < (full - before) // 2
    assert table.names(kept) == [(ROOT, b"kept" * 20)]
    for number in range(100, 66_000):
        add(table, number)
    assert len(content(table)) == 2 + 65_900
    table.close()


def test_another_device_or_mount_is_another_inode(table: Table) -> None:
    one, two = add(table, 100), add(table, 100, device=0x2A)
    assert one != two
    assert table.find(hash_of(100, DEVICE), 100, DEVICE, 5) == 0
    assert table.knows(100, 0x2A) and not table.knows(101, 0x2A)


def test_an_index_that_has_grown_leads_to_everything() -> None:
    table = new_table(1 << 13)
    places = {number: add(table, number) for number in range(1000, 6000)}
    assert table._buckets > 4000
    for number, place in places.items():
        assert table.find(hash_of(number, DEVICE), number, DEVICE, 0) == place
    assert len(content(recovered(table))) == 5001
    table.close()


def test_of_many_names_the_latest_are_kept(table: Table) -> None:
    place = add(table, 100, b"0")
    for number in range(1, 100):
        table.add_name(place, ROOT, b"%d" % number)
    assert table.names(place) == [(ROOT, b"%d" % number) for number in range(99, 99 - MOST_NAMES, -1)]
    content(table)


def test_a_full_table_says_so_and_stays_right() -> None:
    table = new_table(64)
    places: list[int] = []
    with fails(errno.ENOMEM):
        for number in range(100, 200):
            places.append(add(table, number))
    before = content(table)
    with fails(errno.ENOMEM):
        table.set_name(places[0], ROOT, b"n" * 300)
    assert content(table) == before, "no row is lost"
    table.set_name(places[0], ROOT, b"renamed")
    assert table.names(places[0]) == [(ROOT, b"renamed")]
    for place in places:
        table.remove(place)
    assert content(table) == {2: ()}
    assert add(table, 6000)
    table.close()


def test_other_processes_find_nodeids_and_names(table: Table) -> None:
    for number in range(100, 300):
        add(table, number, b"%d" % number + b"x" * (number - 100))
    place = add(table, 400, b"first")
    table.add_name(place, 7, b"second" * 30)
    reader = copy.copy(table)
    assert reader.nodeids_of(150, DEVICE) == [
        table.cells[table.find(hash_of(150, DEVICE), 150, DEVICE, 0) << CELLS_SHIFT]
    ]
    assert reader.nodeids_of(2, DEVICE) == [ROOT] and reader.nodeids_of(5, DEVICE) == []
    names = {(ROOT, b"%d" % number + b"x" * (number - 100)) for number in range(100, 300)}
    assert names | {(ROOT, b"first"), (7, b"second" * 30)} <= set(reader.all_names())


def test_other_processes_find_what_the_front_is_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front is stopped at each store while its index grows."""
    waits = 0
    current = new_table()

    def go_on(seconds: float) -> None:
        nonlocal waits
        waits += 1
        recovered(current)

    monkeypatch.setattr("llloop.shared.table.time.sleep", go_on)
    for steps in range(40):
        current, _ = prepared()
        life = Life(steps)
        with living(life), contextlib.suppress(Killed):
            add(killable_table(current, life), 900, b"new")
        for number in (100, 101, 102, *range(1006, 1030)):
            assert len(copy.copy(current).nodeids_of(number, DEVICE)) == 1, f"stopped at step {steps}"
        current.close()
    assert waits


CHANGES: dict[str, Callable[[Table, list[int]], object]] = {
    "add": lambda table, places: add(table, 900, b"new"),
    "add long": lambda table, places: add(table, 900, b"new" * 90),
    "add unnamed": lambda table, places: add(table, 900, b"", 0),
    "remove": lambda table, places: table.remove(places[0]),
    "remove long": lambda table, places: table.remove(places[1]),
    "remove linked": lambda table, places: table.remove(places[2]),
    "rename": lambda table, places: table.set_name(places[0], 5, b"renamed"),
    "rename to long": lambda table, places: table.set_name(places[0], 5, b"renamed" * 30),
    "rename from long": lambda table, places: table.set_name(places[1], 5, b"renamed"),
    "one name of several": lambda table, places: table.set_name(places[2], 5, b"renamed"),
    "link": lambda table, places: table.add_name(places[0], 5, b"link"),
    "link by a long name": lambda table, places: table.add_name(places[0], 5, b"link" * 60),
    "found by a name it had": lambda table, places: table.add_name(places[2], ROOT, b"third"),
    "drop the only name": lambda table, places: table.drop_name(places[0], ROOT, b"first"),
    "drop one of several": lambda table, places: table.drop_name(places[2], ROOT, b"third"),
    "drop a long one": lambda table, places: table.drop_name(places[2], ROOT, b"fourth" * 30),
}


def prepared() -> tuple[Table, list[int]]:
    table = new_table(1 << 8)
    gone = [add(table, 500 + number, b"gone" * 40) for number in range(3)]
    places = [add(table, 100, b"first"), add(table, 101, b"second" * 30), add(table, 102, b"third")]
    table.add_name(places[2], ROOT, b"fourth" * 30)
    table.add_name(places[2], ROOT, b"fifth")
    for place in gone:  # what comes lies where something has been before
        table.remove(place)
    # One more inode makes the index grow.
    while len(table) < table._buckets:
        add(table, 1000 + len(table))
    return table, places


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_done_or_not_wherever_it_is_cut(change: Callable[[Table, list[int]], object]) -> None:
    table, places = prepared()
    before = content(table)
    change(table, places)
    after = content(table)
    table.close()
    for steps in range(2000):
        table, places = prepared()
        life = Life(steps)
        killed = False
        try:
            with living(life):
                own = killable_table(table, life)
                change(own, places)
        except Killed:
            killed = True
        assert content(recovered(table)) in (before, after), f"killed at step {steps}"
        assert content(recovered(table)) in (before, after), f"killed at step {steps}"
        table.close()
        if not killed:
            assert steps > 0
            return
    raise AssertionError("it has no end")


def test_a_recovery_can_be_killed_as_well() -> None:
    for name in ("add long", "remove linked", "add"):
        table, places = prepared()
        before = content(table)
        CHANGES[name](table, places)
        after = content(table)
        table.close()
        for steps in range(0, 60, 3):
            for further in range(30):
                table, places = prepared()
                for life, action in (
                    (Life(steps), lambda own, name=name, places=places: CHANGES[name](own, places)),
                    (Life(further), lambda own: own.recover(own_cell())),
                ):
                    try:
                        with living(life):
                            action(killable_table(table, life))
                    except Killed:
                        pass
                assert content(recovered(table)) in (before, after), f"{name}, killed at {steps} and then {further}"
                table.close()


class TableMachine(RuleBasedStateMachine):
    """Processes that follow each other, each killed at a random step of what it does, or not."""

    lives = st.none() | st.integers(0, 25)

    @initialize()
    def start(self) -> None:
        self.table = new_table(1 << 9)
        self.model: dict[int, set[tuple[int, bytes]]] = {2: set()}
        self.places: dict[int, int] = {}
        self.last = 100

    def do(
        self, steps: int | None, action: Callable[[Table], object], number: int, names: set[tuple[int, bytes]] | None
    ) -> None:
        """Do something after which an inode has those names, or is gone."""
        after = dict(self.model)
        if names is None:
            after.pop(number)
        else:
            after[number] = names
        life = Life(steps)
        killed = False
        try:
            with living(life):
                action(killable_table(self.table, life))
        except Killed:
            killed = True
        self.table = recovered(self.table)
        found = {number: set(names) for number, names in content(self.table).items()}
        assert found in ((self.model, after) if killed else (after,))
        self.model = found
        for place in (nodeid & self.table.mask for nodeid in list(self.table)):
            self.places[self.table.cells[(place << CELLS_SHIFT) + 1]] = place

    @rule(name=st.sampled_from(NAMES), steps=lives)
    def add(self, name: bytes, steps: int | None) -> None:
        if len(self.model) < 60:
            self.last += 1
            number = self.last
            self.do(steps, lambda table: add(table, number, name), number, {(ROOT, name)})

    def draw(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model.keys() - {2})))

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data(), steps=lives)
    def remove(self, data: st.DataObject, steps: int | None) -> None:
        number = self.draw(data)
        self.do(steps, lambda table: table.remove(self.places[number]), number, None)

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data(), parent=st.integers(1, 3), name=st.sampled_from(NAMES), steps=lives)
    def set_name(self, data: st.DataObject, parent: int, name: bytes, steps: int | None) -> None:
        number = self.draw(data)
        place = self.places[number]
        self.do(steps, lambda table: table.set_name(place, parent, name), number, {(parent, name)})

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data(), parent=st.integers(1, 3), name=st.sampled_from(NAMES), steps=lives)
    def add_name(self, data: st.DataObject, parent: int, name: bytes, steps: int | None) -> None:
        number = self.draw(data)
        place = self.places[number]
        names = self.model[number] | {(parent, name)}
        self.do(steps, lambda table: table.add_name(place, parent, name), number, names)

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data(), parent=st.integers(1, 3), name=st.sampled_from(NAMES), steps=lives)
    def drop_name(self, data: st.DataObject, parent: int, name: bytes, steps: int | None) -> None:
        number = self.draw(data)
        place = self.places[number]
        names = self.model[number] - {(parent, name)}
        self.do(steps, lambda table: table.drop_name(place, parent, name), number, names)

    @invariant()
    def all_are_found(self) -> None:
        if hasattr(self, "table"):
            for number in self.model:
                assert self.table.find(hash_of(number, DEVICE), number, DEVICE, 0)

    def teardown(self) -> None:
        if hasattr(self, "table"):
            self.table.close()


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
