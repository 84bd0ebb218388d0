"""A hundred schedules of misfortunes, against simulated hosts and the real decisions: every run ends well."""

import functools
import random

import pytest
from simulated_training import TrainingSimulation, befall

from cluster.elastic.decisions.commands import Commit

STEPS, SAVE_STEPS = 80, 10


@functools.cache
def misfortunes(seed: int) -> tuple[TrainingSimulation, list[str]]:
    """A run that ends, with something befalling it every few seconds until late."""
    chance = random.Random(seed)
    nodes, step_s = "abcd"[: chance.randrange(1, 5)], chance.choice([1.0, 1.0, 12.0])
    steps = STEPS if step_s < 10 else STEPS // 2
    run = TrainingSimulation(nodes, steps, SAVE_STEPS, step_s, max_failures=-1, start_s=5.0)
    told: list[str] = []

    def next_one() -> None:
        if not run.finished and run.now < 500:
            told.append(f"{run.now - 100:.0f} s {befall(run, chance)}")
            run.later(chance.uniform(1, 15), next_one)

    run.later(chance.uniform(5, 15), next_one)
    run.until(lambda: run.finished, 4000)
    return run, told


@pytest.mark.parametrize("seed", range(100))
def test_every_run_ends_with_every_step_made_and_every_commit_once(seed):
    run, told = misfortunes(seed)
    print(f"seed {seed}:", *told, sep="\n")
    assert run.reason is None
    run.run(60)  # what is still being written
    assert sorted(run.made) == list(range(1, run.steps + 1))
    assert run.committed == sorted(set(run.committed))
    assert run.committed[-1] == run.steps
    for lost, left in run.notices:  # half a minute is enough for what was made before the notice
        assert lost <= left
    for start, committed, held in run.starts:  # what is committed, or held by one that can be reached, is not lost
        assert start >= max(committed, held)


def test_the_schedules_are_hard_enough():
    """They break memberships, repeat steps, lose commits that were not written yet, and leave machines out."""
    runs = [misfortunes(seed)[0] for seed in range(20)]
    assert sum(len(run.memberships) for run in runs) > 20 * 5
    assert any(len(memberships) > 1 for run in runs for memberships in run.made.values())
    assert any("interrupted" in message for run in runs for message in run.messages())
    assert any(start == 0 for run in runs for start, _, _ in run.starts[1:])
    assert any(command for run in runs for _, command in run.done if isinstance(command, Commit))
    assert any(run.notices for run in runs)
