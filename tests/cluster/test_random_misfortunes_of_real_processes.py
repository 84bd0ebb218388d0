"""Random misfortunes, one after the other, of real processes: the run ends as if nothing had happened.

What the simulated hundred meet (tests/unit/test_random_misfortunes_end_no_run.py), where one machine can do it.
"""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import ray
from nodes import wait_until
from pairs_run import PairsRun, one_process
from reconstruct_pairs import PairFeed, ReconstructPairs

from cluster.elastic.events import MembershipFormed
from cluster.machines.head_storage import share
from cluster.workloads.phase import Phase, TrainingSettings
from cluster.workloads.training_events import SamplesTaken, StepMade
from doge.common.storage import Storage
from doge.training.engine_recipe import EngineRecipe
from doge.training.optimizer import OptimizerRecipe
from doge.training.schedule import SchedulerRecipe
from doge.training.state.checkpoint import Checkpoints

SCHEDULES = int(os.environ.get("DOGE_TEST_SCHEDULES", 1))
UNITS, STEPS, MISFORTUNES = 12, 60, 5
MOST_SECONDS = 300


def befall(run: PairsRun, chance: random.Random, folder: Path, marker: Path) -> str:
    """Let something befall the run or its storage; returns what it was."""
    kind = chance.choice(["kill", "stop", "hang", "unable", "error", "storage"])
    hosts = run.hosts()
    if kind == "kill":
        os.kill(chance.choice(hosts)["pid"], signal.SIGKILL)
    elif kind == "stop":
        pid, seconds = chance.choice(hosts)["pid"], chance.uniform(0.5, 12)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        with suppress(ProcessLookupError):  # it was taken for hung
            os.kill(pid, signal.SIGCONT)
    elif kind == "storage":  # by its marker a process knows that the disk is there
        away = marker.rename(marker.with_name("away"))
        time.sleep(chance.uniform(0.5, 6))
        away.rename(marker)
    else:
        (folder / kind).touch()
    return kind


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_a_run_that_meets_misfortunes_makes_the_steps_of_one_process(ray_cluster, tmp_path, seed):
    chance, folder = random.Random(seed), tmp_path / "misfortunes"
    folder.mkdir()
    objective = ReconstructPairs("", pause=0.15, misfortunes=str(folder))
    optimizer, schedule = OptimizerRecipe(lr=1e-2, max_grad_norm=0.5), SchedulerRecipe(warmup_steps=4, decay_steps=8)
    phase = Phase("everything", objective, PairFeed("first"), STEPS, UNITS, 70, optimizer, schedule)
    settings = TrainingSettings(
        phases=(phase,), engine=EngineRecipe(precision="fp32"), tokenizer="none", recipe={}, seed=7, save_steps=10,
        micro_batch_size=3, record_samples=True,
    )  # fmt: skip
    storage = share(Storage(str(tmp_path / "storage")))
    (marker,) = Path(storage.root).glob(".*.shared")
    scaling = {"num_workers": (1, 2), "warm_spares": 1, "max_failures": -1, "hang_timeout_s": 5}
    with PairsRun(settings, storage, **scaling) as run:
        run.reach(3)
        for _ in range(MISFORTUNES):
            reached = max(event.step for event in run.events(StepMade))
            print(f"step {reached}:", befall(run, chance, folder, marker))
            after = min(reached + chance.randrange(2, 9), STEPS)
            wait_until(
                lambda after=after: run.is_over() or max(e.step for e in run.events(StepMade)) >= after, MOST_SECONDS,
                f"step {after}",
            )  # fmt: skip
            if run.is_over():
                break
        run.finish(MOST_SECONDS)
        made, taken = run.events(StepMade), run.events(SamplesTaken)
        formed = run.events(MembershipFormed)
        assert ray.get(run.board.stopped.remote()) is None
    print(f"{len(formed)} memberships")
    expected, _, _ = one_process(settings)
    assert {event.step for event in made} == set(expected)
    for event in made:
        assert event.metrics["loss"] == pytest.approx(expected[event.step][0], abs=1e-5)
    for step in range(STEPS):
        units = {e.first + at: sample for e in taken if e.step == step for at, sample in enumerate(e.samples)}
        assert units == {
            unit: (unit, len(phase.feed.pair(unit)[1])) for unit in range(step * UNITS, (step + 1) * UNITS)
        }
    state, position = Checkpoints(Storage(storage.root) / "runs/pairs/checkpoints").latest()
    assert (state.step, position.next_unit) == (STEPS, STEPS * UNITS)
