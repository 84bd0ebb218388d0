import errno
import os
import threading

import pytest
from recorded_runs import LocalBoard

from cluster.accounts.ledger import StepRecord
from cluster.elastic.events import Event, Message
from cluster.runs import collector as collector_module
from cluster.runs.board import Board
from cluster.runs.collector import Collector
from cluster.runs.journal import Journal, journal_directory
from cluster.runs.sinks.curves_sink import MAX_POINTS, BoundedCurve
from cluster.runs.sinks.delivery import Delivery
from cluster.runs.sinks.sink import Sink
from cluster.workloads.training_events import MemberStarted, SamplesTaken, StepMade
from doge.common.errors import UserError
from doge.common.storage import Storage

EVENTS = [
    Message("ünïcode\nand lines"),
    StepMade(3, {"loss": 0.1 + 0.2, "grad_norm": float("inf")}),
    StepRecord("a", "n", "CPU", 1, 3, 5.25, {"data": 0.5, "step": 1.5}, 4, None),
    SamplesTaken(2, 16, [("code", 0, 7), ("prose", 1, 2)]),
    MemberStarted(1, 0, 0, "CPU", "float32", 4, 2, {"first step": 0.5}),
]


def messages(*numbers: int) -> list[Message]:
    return [Message(str(number)) for number in numbers]


def read(journal: Journal, position: int = 0) -> list[Event]:
    reader, found = journal.reader(position), []
    while entries := reader.read(limit=3):
        found += entries
    assert [entry.number for entry in found] == sorted({entry.number for entry in found})
    return [entry.event for entry in found]


def test_what_was_appended_is_read_from_any_position_by_any_driver(tmp_path):
    Journal(tmp_path).append(EVENTS)
    second = Journal(tmp_path)
    second.append(messages(5))
    second.append(messages(6, 7))
    everything = [*EVENTS, *messages(5, 6, 7)]
    for position in range(9):
        assert read(second, position) == everything[position:]
        assert read(Journal(tmp_path), position) == everything[position:]
    assert (second.start, second.end) == (5, 8)


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    Journal(tmp_path).append(messages(0, 1, 2))
    (segment,) = tmp_path.glob("*.jsonl")
    os.truncate(segment, segment.stat().st_size - cut)
    after = Journal(tmp_path)
    assert read(after) == messages(0, 1)
    after.append(messages(2, 3))
    assert read(after) == messages(0, 1, 2, 3)
    assert read(Journal(tmp_path), 1) == messages(1, 2, 3)


def test_a_disk_that_is_full_leaves_no_half_batch(tmp_path, monkeypatch):
    journal, fsync = Journal(tmp_path), os.fsync
    journal.append(messages(0))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        journal.append(messages(1, 2))
    assert read(journal) == messages(0)
    monkeypatch.setattr(os, "fsync", fsync)
    journal.append(messages(1))
    assert read(journal) == read(Journal(tmp_path)) == messages(0, 1)


def test_it_rotates_and_keeps_what_a_sink_still_needs(tmp_path):
    journal = Journal(tmp_path, segment_bytes=500)
    for number in range(100):
        journal.append(messages(number))
    journal.trim(40)
    assert 30 < journal.first <= 40
    assert read(journal, 40) == messages(*range(40, 100))
    journal.trim(100)
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    assert Journal(tmp_path).end == 100
    journal.save_position("MLflow", 7)
    assert journal.position("MLflow") == journal.first > 7


def test_a_driver_that_was_taken_over_writes_no_more(tmp_path):
    first = Journal(tmp_path)
    first.append(messages(0, 1))
    second = Journal(tmp_path)
    second.append(messages(2))
    with pytest.raises(UserError, match="Another process writes the journal"):
        first.append(messages(9))
    assert read(Journal(tmp_path)) == messages(0, 1, 2)


def test_an_event_of_a_newer_version_is_skipped_and_counted(tmp_path):
    journal = Journal(tmp_path)
    journal.append(messages(0, 1, 2))
    (segment,) = tmp_path.glob("*.jsonl")
    text = segment.read_text().replace('"Message", "event": {"text": "1"}', '"Rumour", "event": {"text": "1"}')
    segment.write_text(text.replace('{"text": "2"}', '{"text": "2", "new": 1}'))
    again = Journal(tmp_path)
    assert read(again) == read(again) == messages(0, 2)
    assert again.unknown == {"Rumour": 1}


def test_a_run_whose_storage_is_remote_has_its_journal_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DOGE_CACHE", str(tmp_path / "cache"))
    assert journal_directory(Storage(str(tmp_path)) / "runs/x") == tmp_path / "runs/x/journal"
    one, two = (journal_directory(Storage("memory://bucket") / f"runs/{name}") for name in "ab")
    assert one.parent == two.parent == tmp_path / "cache/journals"
    assert one != two


def test_the_board_keeps_nothing_that_is_in_the_journal(tmp_path):
    board, journal = LocalBoard(), Journal(tmp_path)
    with Collector(board, journal, print):
        for number in range(50):
            board.post(Message(str(number)))
        assert board.settle() is None
        assert read(journal) == messages(*range(50))
    inner: Board = board._board
    assert inner._waiting == []


def test_a_journal_that_cannot_be_written_holds_commits_up_until_it_can(tmp_path, monkeypatch):
    board, journal, said = LocalBoard(), Journal(tmp_path), []
    append, full = journal.append, threading.Event()

    def try_append(events):
        if full.is_set() and events:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(events)

    monkeypatch.setattr(journal, "append", try_append)
    with Collector(board, journal, said.append):
        full.set()
        board.post(Message("0"))
        settled = threading.Thread(target=board.settle)
        settled.start()
        settled.join(1.0)
        assert settled.is_alive()
        assert "No space left on device" in said[0]
        full.clear()
        settled.join(10)
        assert not settled.is_alive()
        assert said[1:] == ["The run is recorded again."]
    assert read(journal) == messages(0)
    assert board.stopped() is None


def test_one_that_never_can_be_written_again_stops_the_run_and_its_commits(tmp_path, monkeypatch):
    monkeypatch.setattr(collector_module, "PATIENCE_SECONDS", 0.0)
    board, journal = LocalBoard(), Journal(tmp_path / "journal")
    (tmp_path / "journal").write_text("no directory")
    with Collector(board, journal, print):
        board.post(Message("0"))
    assert "could not be recorded in" in board.stopped()
    assert board.settle() == board.stopped()


class Fails(Sink):
    """Fails a number of times, and then hangs until it is let go."""

    name = "memory"

    def __init__(self, failures: int = 0):
        self.failures, self.got, self.free = failures, [], threading.Event()

    def handle(self, entries):
        self.failures -= 1
        if self.failures >= 0:
            raise RuntimeError("not yet")
        self.free.wait()
        self.got += [entry.event for entry in entries]


def test_a_sink_that_fails_or_hangs_is_said_once_and_holds_no_other_up(tmp_path):
    journal, said, slow, quick = Journal(tmp_path, segment_bytes=200), [], Fails(2), Fails()
    quick.free.set()
    quick.name = "other"
    delivery = Delivery(journal, [slow, quick], said.append)
    delivery.start()
    for number in range(20):
        journal.append(messages(number))
    assert delivery.catch_up([quick], 10)
    assert quick.got == messages(*range(20))
    assert journal.first == 0  # the slow one still needs it all
    slow.free.set()
    assert delivery.close() == {}
    assert slow.got == messages(*range(20))
    assert said == [
        "memory cannot be written now, nothing waits for it and it catches up later: not yet",
        "memory can be written again.",
    ]
    assert journal.first > 10


def test_the_end_waits_for_no_sink_for_ever(tmp_path):
    journal, hung = Journal(tmp_path), Fails()
    delivery = Delivery(journal, [hung], print)
    delivery.start()
    journal.append(messages(0, 1, 2))
    (sentence,) = delivery.close(0.2).values()
    assert sentence.startswith("memory has not got the last 3 events of the run (it does not answer).")
    again = Fails()
    again.free.set()
    second = Delivery(Journal(tmp_path), [again], print)
    second.start()
    assert second.close() == {}
    assert again.got == messages(0, 1, 2)


def test_a_curve_is_bounded_and_knows_each_step_once():
    curve = BoundedCurve([])
    for step in (*range(1, 15_001), *range(14_000, 20_002)):
        curve.add(step, float(step))
    assert len(curve.points) <= MAX_POINTS + 1
    assert curve.points[-1] == (20_001, 20_001.0)
    steps = [step for step, _ in curve.points[:-1]]
    assert steps == list(range(8, 20_001, 8))
    assert BoundedCurve.from_dict(curve.to_dict()).points == curve.points
