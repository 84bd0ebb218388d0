"""An hour in which 69 workers are killed, at made-up seconds, against the real decisions."""

import random

import pytest
from simulated_training import TrainingSimulation

HOUR, KILLS = 3600.0, 69


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "seed"), [("ab", 0), ("ab", 1), ("abcdefgh", 2)])
def test_goodput_at_69_kills_an_hour(nodes, seed):
    """Steps of the hour, over those of an hour in which nothing happens; a process takes 12 s to start."""
    chance = random.Random(seed)
    run = TrainingSimulation(nodes, steps=10**6, save_steps=50, step_s=1.0, start_s=12.0, max_failures=-1)
    run.until(lambda: run.made)
    first, killed = max(run.made), []

    def kill() -> None:
        alive = [host for host in run.hosts.values() if host.ready and not host.dead]
        killed.append(chance.choice(run.members() or alive))
        run.kill(killed[-1])

    for _ in range(KILLS):
        run.later(chance.uniform(0, HOUR), kill)
    run.run(HOUR)
    assert len(killed) == KILLS
    goodput = (max(run.made) - first) / HOUR
    print(f"goodput {goodput:.3f}, {len(run.memberships)} memberships")
    assert goodput >= 0.9
    assert len(run.memberships) > KILLS / 2
    repeated = sum(len(memberships) - 1 for memberships in run.made.values())
    assert (
        repeated == 0 or nodes == "ab"
    )  # of survivors, each holds the whole state; of two, both may be killed at once
