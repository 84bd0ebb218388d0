"""`benchmarks/turns.py`: two sides take turns, and nobody stays stopped when the turns end, whatever ends them."""

import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Starts a child that counts processor time, as the process itself does.
FAMILY = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
print(child.pid, flush=True)
while True: pass
"""


@pytest.fixture
def families():
    started = [subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    families = [[psutil.Process(each.pid), psutil.Process(int(each.stdout.readline()))] for each in started]
    yield families
    for process in families[0] + families[1]:
        process.kill()
    for each in started:
        each.wait()
        each.stdout.close()


@pytest.fixture
def turns_class(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from turns import Turns

    return Turns


def stopped(family):
    return [process.status() == psutil.STATUS_STOPPED for process in family]


@pytest.mark.slow
def test_one_side_runs_at_a_time_and_all_go_on_afterwards(families, turns_class):
    seen = set()
    with turns_class(*([family[0].pid] for family in families), turn_seconds=0.05) as turns:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            first, second = (stopped(family) for family in families)
            seen.add((tuple(first), tuple(second)))
            time.sleep(0.003)
    assert {((False, False), (True, True)), ((True, True), (False, False))} <= seen
    assert not any(stopped(families[0]) + stopped(families[1]))
    assert min(turns.seconds) > 0


def test_being_late_does_not_add_up(turns_class, monkeypatch):
    """In made-up time: a machine with other work lets every third turn or so last longer than it should."""
    turns = sys.modules[turns_class.__module__]
    chance, clock, left = random.Random(0), [0.0], [301]

    def wait(*arguments):
        clock[0] += arguments[-1] + chance.choice([0.0, 0.0, 0.5])
        left[0] -= 1
        return [] if left[0] else [0], [], []

    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(turns, "select", SimpleNamespace(select=wait))
    monkeypatch.setattr(turns, "_send", lambda *_: None)
    monkeypatch.setattr(turns, "_stop", lambda *_: None)
    seconds = turns.alternate([{1}, {2}], 0.2)
    assert sum(seconds) == pytest.approx(clock[0])
    assert abs(seconds[0] - seconds[1]) <= 0.5 + 0.2 + 1e-6


@pytest.mark.slow
def test_nobody_stays_stopped_when_the_owner_is_killed(families):
    code = (
        f"import sys, time; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from turns import Turns\n"
        f"with Turns([{families[0][0].pid}], [{families[1][0].pid}]):\n"
        "    print('inside', flush=True)\n"
        "    time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "inside\n"
    holder = psutil.Process(owner.pid).children()[0]
    owner.kill()
    owner.wait()
    owner.stdout.close()
    psutil.wait_procs([holder], timeout=20)
    assert not any(stopped(families[0]) + stopped(families[1]))


@pytest.mark.slow
def test_turns_that_end_before_their_block_are_an_error(families, turns_class):
    turns = turns_class([families[0][0].pid]).__enter__()
    turns._holder.kill()
    turns._holder.wait()
    with pytest.raises(RuntimeError, match="failed"):
        turns.__exit__()
    for process in families[0]:
        process.resume()
