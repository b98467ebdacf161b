"""The outbox on real files: order, numbers, caps, damage."""

import contextlib
import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kizu_agent.errors import OutboxError
from kizu_agent.outbox import Backlog, Outbox
from kizu_agent.outbox_file import MAX_MOVED_ASIDE
from kizu_agent.outbox_transaction import ROW_BYTES
from kizu_agent.records import Message, Priority, as_replayed
from kizu_agent.settings import OutboxConfig

MEBIBYTE = 2**20


def message(text: str, priority: int = Priority.OK, size: int = 0, expiry_s: int | None = None) -> Message:
    """A message whose payload starts with `text`."""
    return Message("acme/line/a/cam/result", text.encode().ljust(size, b" "), priority=priority, expiry_s=expiry_s)


def texts(outbox: Outbox, limit: int = 1000) -> list[str]:
    """Take everything and read it."""
    return [row.message.payload.decode().strip() for row in outbox.take(limit)]


def test_order_is_priority_then_commit(outbox: Outbox) -> None:
    """Rows come out by priority, and within one in the order of their commits."""
    outbox.put([message("b1"), message("c1", 4), message("a1", 0)])
    outbox.put([message("a2", 0), message("b2")])
    assert texts(outbox) == ["a1", "a2", "b1", "b2", "c1"]


def test_all_fields_survive_a_restart(outbox_path: Path) -> None:
    """A message comes back from the file as it was put, after the outbox was closed and opened again."""
    sent = Message("t/x", b"\x00\xff", qos=0, retain=True, content_type="image/jpeg", expiry_s=60, priority=2)
    first = Outbox(outbox_path, OutboxConfig())
    first.put([sent])
    first.close()
    second = Outbox(outbox_path, OutboxConfig())
    assert [row.message for row in second.take(5)] == [sent]
    assert second.depth() == 1
    second.close()


def test_lent_rows_are_given_out_once(outbox: Outbox) -> None:
    """A row that was taken is not given out again until it is released; a deleted one never."""
    outbox.put([message("1"), message("2"), message("3")])
    first = outbox.take(2)
    assert texts(outbox) == ["3"]
    outbox.delete([first[0].id])
    outbox.release()
    assert texts(outbox) == ["2", "3"]


def test_number_and_row_commit_together(outbox_path: Path) -> None:
    """A transaction that raises gives neither row nor number; numbers rise per camera and go on after a restart."""
    outbox = Outbox(outbox_path, OutboxConfig())
    with contextlib.suppress(ZeroDivisionError), outbox.transaction() as transaction:
        assert transaction.next_seq("cam1") == 1
        transaction.put([message("never")])
        _ = 1 / 0
    assert outbox.depth() == 0
    with outbox.transaction() as transaction:
        assert [transaction.next_seq("cam1"), transaction.next_seq("cam1"), transaction.next_seq("cam2")] == [1, 2, 1]
    outbox.close()
    reopened = Outbox(outbox_path, OutboxConfig())
    with reopened.transaction() as transaction:
        assert transaction.next_seq("cam1") == 3
    reopened.close()


def fill(outbox: Outbox, *priorities: Priority) -> None:
    """Put one message of an eighth of a mebibyte for each priority, named after it and numbered."""
    for priority in priorities:
        text = f"{priority.name.lower()} {next(_NUMBERS)}"
        outbox.put([message(text, priority, MEBIBYTE // 8 - ROW_BYTES - 100)])


_NUMBERS = itertools.count()


def kinds(outbox: Outbox) -> list[str]:
    """Take everything and name the kinds."""
    return [text.split()[0] for text in texts(outbox)]


def test_what_is_sacrificed_and_in_which_order(outbox_path: Path) -> None:
    """Heatmaps go first, then ok results, then those that warn; each is counted by cause and kind."""
    outbox = Outbox(outbox_path, OutboxConfig(max_bytes=MEBIBYTE, reserve_bytes=0))
    event, reject, warn, ok, heatmap = Priority
    fill(outbox, event, heatmap, warn, ok, heatmap, ok, reject, warn)
    assert outbox.losses() == {}
    expected: dict[tuple[str, str], int] = {}
    for kind in ("heatmap", "heatmap", "ok", "ok", "warn", "warn"):
        fill(outbox, reject)
        expected["bytes", kind] = expected.get(("bytes", kind), 0) + 1
        assert outbox.losses() == expected
    assert outbox.bytes() <= MEBIBYTE
    assert kinds(outbox) == ["event", *["reject"] * 7]
    outbox.close()


def test_events_and_rejects_stay_until_their_reserve_is_used_up(outbox_path: Path) -> None:
    """Over `max_bytes` nothing else is taken, events and rejects are; over the reserve the oldest rejects go first."""
    outbox = Outbox(outbox_path, OutboxConfig(max_bytes=MEBIBYTE, reserve_bytes=MEBIBYTE // 4))
    fill(outbox, *[Priority.REJECT] * 8, Priority.OK)
    assert outbox.losses() == {("bytes", "ok"): 1}
    fill(outbox, Priority.EVENT, Priority.EVENT)
    assert outbox.losses() == {("bytes", "ok"): 1}
    fill(outbox, Priority.EVENT)
    assert outbox.losses() == {("bytes", "ok"): 1, ("bytes", "reject"): 1}
    left = texts(outbox)
    assert [text.split()[0] for text in left] == ["event"] * 3 + ["reject"] * 7
    numbers = [int(text.split()[1]) for text in left if text.startswith("reject")]
    assert numbers == list(range(numbers[0], numbers[0] + 7))
    outbox.close()


def test_late_rows_come_after_live_ones_and_no_more_than_allowed(outbox: Outbox) -> None:
    """Whatever their priority, rows of the backlog come last, in their own order."""
    outbox.put([message("late ok"), message("late event", Priority.EVENT), message("late ok 2")])
    until = outbox.last_id
    outbox.put([message("live ok"), message("live heatmap", Priority.HEATMAP), message("live event", Priority.EVENT)])
    first = outbox.take(5, Backlog(until, 1))
    assert [row.message.payload for row in first] == [b"live event", b"live ok", b"live heatmap", b"late event"]
    assert outbox.take(5, Backlog(until, 0)) == []
    assert texts(outbox) == ["late ok", "late ok 2"]


def test_these_rows_and_no_others(outbox: Outbox) -> None:
    """Rows can be asked for by id: those that are there and not lent, in order."""
    outbox.put([message(str(number)) for number in range(4)])
    ids = [row.id for row in outbox.take(4)]
    outbox.release(ids[1:])
    outbox.delete([ids[0]])
    assert [row.id for row in outbox.take_these([ids[3], ids[0], ids[1], 999], 5)] == [ids[1], ids[3]]
    assert outbox.take_these(ids, 5)[0].id == ids[2]


def test_events_and_rejects_have_no_age(outbox_path: Path) -> None:
    """Old ok results and warnings are given up, old rejects and events never are."""
    config = OutboxConfig(max_age_s=60)
    outbox = Outbox(outbox_path, config)
    fill(outbox, *Priority)
    outbox.close()
    backdate(outbox_path, "created_mono_ns = created_mono_ns - 61000000000", "1")
    outbox = Outbox(outbox_path, config)
    assert kinds(outbox) == ["event", "reject"]
    assert outbox.losses() == {("age", "warn"): 1, ("age", "ok"): 1, ("age", "heatmap"): 1}
    outbox.close()


def test_an_outbox_of_schema_1_is_taken_over(outbox_path: Path) -> None:
    """What an older agent committed is delivered by this one, in order; its losses are still counted."""
    outbox = Outbox(outbox_path, OutboxConfig())
    outbox.put([message("heatmap", 2), message("result", 1), message("event", 0)])
    outbox.close()
    database = sqlite3.connect(outbox_path)
    with database:
        database.execute("DROP TABLE losses")
        database.execute("CREATE TABLE losses (cause TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID")
        database.execute("INSERT INTO losses VALUES ('bytes', 3)")
        database.execute("UPDATE schema SET version = 1")
    database.close()
    outbox = Outbox(outbox_path, OutboxConfig())
    rows = outbox.take(5)
    assert [(row.message.payload, row.message.priority) for row in rows] == [
        (b"event", 0),
        (b"result", 3),
        (b"heatmap", 4),
    ]
    assert outbox.losses() == {("bytes", "unknown"): 3}
    assert outbox.moved_aside is None
    outbox.close()


def test_a_loss_before_the_commit_is_counted_and_kept(outbox_path: Path) -> None:
    """What the disk never took counts at once, and over a restart after the next commit."""
    outbox = Outbox(outbox_path, OutboxConfig())
    outbox.note_loss("disk", Priority.OK)
    assert outbox.losses() == {("disk", "ok"): 1}
    outbox.put([message("after")])
    outbox.close()
    outbox = Outbox(outbox_path, OutboxConfig())
    assert outbox.losses() == {("disk", "ok"): 1}
    outbox.close()


def test_lent_rows_are_not_sacrificed(outbox_path: Path) -> None:
    """What is on its way to the broker is not counted as lost when a cap is reached."""
    outbox = Outbox(outbox_path, OutboxConfig(max_bytes=MEBIBYTE, reserve_bytes=0))
    outbox.put([message("sent", 4, MEBIBYTE // 2), message("waits", 4, MEBIBYTE // 3)])
    (sent,) = outbox.take(1)
    outbox.put([message("new", 3, MEBIBYTE // 3)])
    assert texts(outbox) == ["new"]
    outbox.delete([sent.id])
    assert (outbox.depth(), outbox.losses()) == (1, {("bytes", "heatmap"): 1})
    outbox.close()


def test_losses_are_counted_over_restarts(outbox_path: Path) -> None:
    """The counts of losses go on after a restart."""
    for expected in (1, 2):
        outbox = Outbox(outbox_path, OutboxConfig(max_bytes=MEBIBYTE, reserve_bytes=0))
        outbox.put([message("large", 3, 2 * MEBIBYTE)])
        assert (outbox.depth(), outbox.bytes(), outbox.losses()) == (0, 0, {("bytes", "ok"): expected})
        outbox.close()


def test_old_rows_of_an_earlier_boot_are_dropped_by_their_utc_age(outbox_path: Path) -> None:
    """Rows older than the age cap are dropped and counted; a row's age is its oldest known one."""
    outbox = Outbox(outbox_path, OutboxConfig(max_age_s=60))
    outbox.put([message("old"), message("young")])
    outbox.close()
    backdate(outbox_path, "boot = 1, created_ns = created_ns - 61000000000", "payload = CAST('old' AS BLOB)")
    outbox = Outbox(outbox_path, OutboxConfig(max_age_s=60))
    age_s = outbox.oldest_age_s()
    assert age_s is not None
    assert age_s >= 61
    assert texts(outbox) == ["young"]
    assert outbox.losses() == {("age", "ok"): 1}
    outbox.close()


def test_a_clock_step_ages_nothing(outbox_path: Path) -> None:
    """Rows of this boot age by the monotonic clock: a wall clock that jumped by years drops none of them."""
    outbox = Outbox(outbox_path, OutboxConfig(max_age_s=60))
    outbox.put([message("kept", expiry_s=3600)])
    outbox.close()
    backdate(outbox_path, "created_ns = 0", "1")
    outbox = Outbox(outbox_path, OutboxConfig(max_age_s=60))
    (row,) = outbox.take(5)
    assert 0 <= row.age_s < 60
    outbox.close()


def test_an_expired_message_is_dropped_and_counted(outbox_path: Path) -> None:
    """A message past its own expiry is not sent any more."""
    outbox = Outbox(outbox_path, OutboxConfig())
    outbox.put([message("stale", expiry_s=5), message("fresh", expiry_s=500)])
    outbox.close()
    backdate(outbox_path, "created_mono_ns = created_mono_ns - 6000000000", "1")
    outbox = Outbox(outbox_path, OutboxConfig())
    assert texts(outbox) == ["fresh"]
    assert (outbox.depth(), outbox.losses()) == (1, {("expired", "ok"): 1})
    outbox.close()


def backdate(path: Path, change: str, where: str) -> None:
    """Change the times of rows in a closed outbox."""
    database = sqlite3.connect(path)
    with database:
        database.execute(f"UPDATE messages SET {change} WHERE {where}")  # noqa: S608 - literals of this file
    database.close()


def test_refused_rows_are_set_aside_and_bounded(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused row leaves the queue, keeps its reason, and the oldest of too many goes."""
    monkeypatch.setattr("kizu_agent.outbox.MAX_REFUSED", 3)
    outbox.put([message(str(n)) for n in range(5)])
    for row in outbox.take(5):
        outbox.refuse(row, f"reason {row.message.payload.decode()}")
    assert [reason for _, reason in outbox.refused()] == ["reason 2", "reason 3", "reason 4"]
    assert (outbox.depth(), outbox.losses()) == (0, {("refused", "ok"): 5})


@pytest.mark.parametrize("damage", ["text", "zeros in the middle", "foreign schema", "newer schema"])
def test_an_unusable_database_is_moved_aside(outbox_path: Path, damage: str) -> None:
    """A file that cannot be used is renamed with the time and reported, and a fresh one takes messages at once."""
    outbox = Outbox(outbox_path, OutboxConfig())
    outbox.put([message(str(n), size=3000) for n in range(50)])
    outbox.close()
    spoil(outbox_path, damage)
    outbox = Outbox(outbox_path, OutboxConfig())
    outbox.put([message("new")])
    assert "new" in texts(outbox)
    assert outbox.moved_aside is not None
    assert outbox.moved_aside.exists()
    assert sum(count for (cause, _), count in outbox.losses().items() if cause == "corrupt") >= 1
    outbox.close()


def spoil(path: Path, damage: str) -> None:
    """Make a closed outbox unusable."""
    if damage == "text":
        path.write_text("this is no database, but it is long enough to be taken for one" * 100)
    elif damage == "zeros in the middle":
        data = bytearray(path.read_bytes())
        data[4096:-4096] = bytes(len(data) - 8192)
        path.write_bytes(data)
    else:
        path.unlink()
        database = sqlite3.connect(path)
        with database:
            database.execute("CREATE TABLE schema (version INTEGER)")
            if damage == "newer schema":
                database.execute("INSERT INTO schema VALUES (99)")
        database.close()


def test_numbers_go_on_after_damage(outbox_path: Path) -> None:
    """A damaged table of messages does not make a camera's numbers start again."""
    outbox = Outbox(outbox_path, OutboxConfig())
    with outbox.transaction() as transaction:
        for _ in range(7):
            transaction.next_seq("cam1")
        transaction.put([message(str(n), size=3000) for n in range(50)])
    outbox.close()
    database = sqlite3.connect(outbox_path)
    database.execute("UPDATE schema SET version = 99")
    database.commit()
    database.close()
    outbox = Outbox(outbox_path, OutboxConfig())
    with outbox.transaction() as transaction:
        assert transaction.next_seq("cam1") == 8
    assert outbox.losses() == {("corrupt", "ok"): 50}
    outbox.close()


def test_damage_while_running_costs_one_transaction(outbox_path: Path) -> None:
    """Damage met in mid-run raises `corrupt`, after which the same transaction works on a fresh file; ids go on."""
    outbox = Outbox(outbox_path, OutboxConfig())
    outbox.put([message(str(n), size=9000) for n in range(400)])
    last_id = outbox.last_id
    outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    outbox._db.execute("PRAGMA shrink_memory")
    with outbox_path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(outbox_path.stat().st_size - 4096))
    with pytest.raises(OutboxError) as caught:
        use_up_the_cache(outbox)
    assert caught.value.cause == "corrupt"
    outbox.put([message("again")])
    assert texts(outbox) == ["again"]
    assert outbox.last_id > last_id
    outbox.close()


def use_up_the_cache(outbox: Outbox) -> None:
    """Read and write enough pages to meet what lies on the disk."""
    for _ in range(50):
        outbox.take(400)
        outbox.release()
        outbox.put([message("x")])


def test_only_the_newest_damaged_databases_are_kept(outbox_path: Path) -> None:
    """A disk that damages every file is not filled with them."""
    outbox_path.parent.mkdir()
    for _ in range(MAX_MOVED_ASIDE + 3):
        outbox_path.write_text("no database" * 500)
        Outbox(outbox_path, OutboxConfig()).close()
    assert len(list(outbox_path.parent.glob("*.damaged"))) == MAX_MOVED_ASIDE


def test_a_second_process_is_refused(outbox: Outbox, outbox_path: Path) -> None:
    """Two agents on one folder would deliver everything twice: the second is told that the file is in use."""
    outbox.put([message("1")])
    code = (
        "import sys; from pathlib import Path; from kizu_agent.outbox import Outbox;"
        "from kizu_agent.settings import OutboxConfig; from kizu_agent.errors import OutboxError\n"
        "try: Outbox(Path(sys.argv[1]), OutboxConfig())\n"
        "except OutboxError as exc: print(exc.cause, exc)"
    )
    done = subprocess.run([sys.executable, "-c", code, outbox_path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("io ")
    assert "locked" in done.stdout


def test_a_full_disk_is_an_error_of_its_own(outbox: Outbox) -> None:
    """When the file cannot grow the commit raises `disk_full`, keeps nothing, and works again once there is room."""
    outbox.put([message("first")])
    (pages,) = outbox._db.execute("PRAGMA page_count").fetchone()
    outbox._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(OutboxError) as caught:
        outbox.put([message("second"), message("large", size=100_000)])
    assert caught.value.cause == "disk_full"
    outbox._db.execute("PRAGMA max_page_count = 1000000")
    outbox.put([message("third")])
    assert texts(outbox) == ["first", "third"]
    assert outbox.depth() == 2


def test_after_close_everything_raises(outbox_path: Path) -> None:
    """A closed outbox says so; closing twice is no error."""
    outbox = Outbox(outbox_path, OutboxConfig())
    outbox.close()
    outbox.close()
    with pytest.raises(OutboxError, match="closed"):
        outbox.put([message("late")])


def test_threads_share_it(outbox: Outbox) -> None:
    """While several threads commit and one takes and deletes, nothing is lost, doubled or out of order."""
    producers, each = 3, 300
    seen: list[str] = []

    def produce(name: int) -> None:
        for number in range(each):
            with outbox.transaction() as transaction:
                transaction.put([message(f"{name}:{transaction.next_seq(str(name))}:{number}")])

    threads = [threading.Thread(target=produce, args=(name,)) for name in range(producers)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(seen) < producers * each and time.monotonic() < deadline:
        rows = outbox.take(20)
        seen += [row.message.payload.decode() for row in rows]
        outbox.delete([row.id for row in rows])
    for thread in threads:
        thread.join(10)
    for name in range(producers):
        assert [s for s in seen if s.startswith(f"{name}:")] == [f"{name}:{n + 1}:{n}" for n in range(each)]
    assert outbox.depth() == 0
    assert outbox.bytes() == 0


def test_committed_rows_survive_sigkill(outbox_path: Path) -> None:
    """What a killed process had committed is there for the next one, with its numbers."""
    code = (
        "import sys; from pathlib import Path; from kizu_agent.outbox import Outbox;"
        "from kizu_agent.settings import OutboxConfig; from kizu_agent.records import Message\n"
        "outbox = Outbox(Path(sys.argv[1]), OutboxConfig())\n"
        "while True:\n"
        "    with outbox.transaction() as t:\n"
        "        seq = t.next_seq('cam'); t.put([Message('t', str(seq).encode())])\n"
        "    print(seq, flush=True)"
    )
    last = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, outbox_path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = list(itertools.islice(process.stdout, 200))
        process.kill()
        lines += process.stdout.readlines()
        process.stdout.close()
        process.wait(10)
        assert int(lines[0]) > last
        last = int(lines[-1])
    outbox = Outbox(outbox_path, OutboxConfig())
    found = [int(text) for text in texts(outbox, 100_000)]
    # The last commit may have happened just before its line could be printed.
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= last
    outbox.close()


@pytest.mark.parametrize(
    ("payload", "marked"),
    [
        (b'{"id": "a", "replayed": false, "x": 1}', b'{"id": "a", "replayed": true, "x": 1}'),
        (b'{"replayed":false}', b'{"replayed":true}'),
        (b'{"note": "\\"replayed\\": false", "x": 1}', b'{"note": "\\"replayed\\": false", "x": 1}'),
        (b"\xff\xd8\xff", b"\xff\xd8\xff"),
    ],
)
def test_only_the_member_replayed_is_marked(payload: bytes, marked: bytes) -> None:
    """A late payload gets its member `replayed` set, and nothing that only looks like it."""
    assert as_replayed(payload) == marked


class OutboxMachine(RuleBasedStateMachine):
    """Any sequence of puts, takes, deletes, releases and restarts gives what a sorted list would give."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.outbox = self.open()
        self.model: list[tuple[int, int]] = []  # (priority, number), as committed
        self.lent: dict[int, tuple[int, int]] = {}
        self.number = 0

    def open(self) -> Outbox:
        return Outbox(self.folder / "outbox.sqlite3", OutboxConfig())

    @rule(priorities=st.lists(st.integers(0, 3), max_size=4), fails=st.booleans())
    def put(self, priorities: list[int], fails: bool) -> None:
        new = [(priority, self.number + n) for n, priority in enumerate(priorities)]
        try:
            with self.outbox.transaction() as transaction:
                transaction.put([message(str(number), priority) for priority, number in new])
                if fails:
                    raise KeyError
        except KeyError:
            return
        self.number += len(new)
        self.model += new

    @rule(limit=st.integers(0, 5))
    def take(self, limit: int) -> None:
        rows = self.outbox.take(limit)
        free = sorted(entry for entry in self.model if entry not in self.lent.values())
        assert [(row.message.priority, int(row.message.payload)) for row in rows] == free[:limit]
        self.lent |= {row.id: entry for row, entry in zip(rows, free, strict=False)}

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.lent)), unique=True))
        self.outbox.delete(ids)
        for row_id in ids:
            self.model.remove(self.lent.pop(row_id))

    @rule()
    def release(self) -> None:
        self.outbox.release()
        self.lent.clear()

    @rule()
    def restart(self) -> None:
        self.outbox.close()
        self.outbox = self.open()
        self.lent.clear()

    @invariant()
    def counts_agree(self) -> None:
        assert self.outbox.depth() == len(self.model)
        assert (self.outbox.bytes() == 0) == (not self.model)

    def teardown(self) -> None:
        self.outbox.close()
        shutil.rmtree(self.folder)


TestOutboxMachine = OutboxMachine.TestCase
TestOutboxMachine.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
