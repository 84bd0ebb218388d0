"""A machine's time of day may jump by an hour in either direction; see also test_a_run_has_one_writer.py."""

import ast
import os
import time
from pathlib import Path

import pytest

from cluster.elastic.events import Message
from cluster.runs.journal import Journal
from doge.common import lease as leases
from doge.common.lease import Lease
from doge.common.storage import Storage

ROOT = Path(__file__).parents[2]
HOUR = 3600.0


@pytest.fixture(params=[-HOUR, HOUR])
def jump(request, monkeypatch):
    """Lets the clock jump."""
    clock = time.time
    return lambda: monkeypatch.setattr(time, "time", lambda: clock() + request.param)


def test_only_the_journal_asks_for_the_time_of_day():
    """It notes when an event came, for MLflow, and decides nothing by it."""
    found = set()
    for folder in ("doge", "data_pipelines", "cluster", "tune", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                    "time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today",
                ):  # fmt: skip
                    found.add(str(path.relative_to(ROOT)))
    assert found == {"cluster/runs/journal.py"}


def test_a_living_writers_files_stay_and_a_dead_ones_go_whatever_their_time(jump, tmp_path):
    storage = Storage(f"memory://{tmp_path.name}", cache=str(tmp_path))
    for number, at in enumerate((0, time.time(), time.time() + 2 * HOUR)):
        (tmp_path / f"dead-{number}.partial").mkdir()
        os.utime(tmp_path / f"dead-{number}.partial", (at, at))

    def fill(path):
        jump()
        storage.write_bytes("b", b"meanwhile")  # sweeps
        Path(path).write_bytes(b"x")

    storage.write("a", fill)
    assert storage.read_bytes("a") == b"x"
    assert os.listdir(tmp_path) == []


def test_what_was_used_last_stays_in_the_cache(jump, tmp_path):
    storage = Storage(f"memory://{tmp_path.name}", cache=str(tmp_path / "cache"), cache_bytes=2000)
    for name in "abc":
        storage.write_bytes(name, name.encode() * 1000)
    storage.local("a")
    jump()
    storage.local("b")
    storage.local("a")
    storage.local("c")
    kept = sorted(path.read_text()[0] for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert kept == ["a", "c"]


def test_a_lease_stays_its_holders(jump, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.0)
    lost = []
    with Lease(Storage(str(tmp_path)), "the test", lost.append, interval=0.02) as lease:
        jump()
        time.sleep(0.1)
        assert lease.still_held()
    assert lost == []


def test_the_journal_numbers_its_events_on(jump, tmp_path):
    journal = Journal(tmp_path)
    journal.append([Message("before")])
    jump()
    journal.append([Message("after")])
    entries = Journal(tmp_path).reader(0).read()
    assert [(entry.number, entry.event.text) for entry in entries] == [(0, "before"), (1, "after")]
