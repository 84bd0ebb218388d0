import json
import random
import statistics

import pytest
from simulated_runs import SEQUENCE_LENGTH, TOKENS_PER_STEP, SimulatedRun

from cluster.accounts.ledger import Ledger, LedgerRecipe, StepRecord

TEN_MINUTES = 600.0


def figures(run: SimulatedRun):
    return run.ledger.figures(LedgerRecipe())


@pytest.mark.parametrize("seed", range(20))
def test_goodput_is_what_counts_over_what_an_undisturbed_twin_makes(seed):
    chance = random.Random(seed)
    speeds = [chance.choice([8, 16, 32]) for _ in range(chance.randint(2, 8))]
    how = {
        "replace_seconds": chance.choice([5.0, 25.0, 60.0]),
        "restart_seconds": chance.choice([(0.2, 1.0), (3.0, 12.0), (15.0, 25.0)]),
        "save_steps": chance.choice([1, 10, 40]),
        "spare_seconds": chance.choice([0.0, 15.0, 30.0]),
    }
    twin = SimulatedRun(seed + 1000, speeds, **how).run(TEN_MINUTES)
    disturbed = SimulatedRun(seed, speeds, kill_seconds=90.0, **how)
    seen_outside = disturbed.run(TEN_MINUTES) / twin
    result = figures(disturbed)
    assert result.goodput == pytest.approx(seen_outside, abs=0.03)
    assert result.goodput + sum(result.lost.values()) == pytest.approx(1, abs=0.005)
    assert result.restarts >= 5


@pytest.mark.slow
def test_over_many_runs_the_ledger_leans_to_neither_side():
    errors = []
    for seed in range(40):
        twin = SimulatedRun(seed + 1000, [16, 16, 16, 8]).run(TEN_MINUTES)
        disturbed = SimulatedRun(seed, [16, 16, 16, 8], kill_seconds=90.0)
        errors.append(disturbed.run(TEN_MINUTES) / twin - figures(disturbed).goodput)
    assert abs(statistics.mean(errors)) < 0.01


@pytest.mark.parametrize("speeds", [[16], [16, 16], [32, 8, 8]])
def test_an_undisturbed_run_has_a_goodput_of_one_whatever_it_waits_for(speeds):
    run = SimulatedRun(3, speeds)
    tokens = run.run(200.0)
    result = figures(run)
    assert result.goodput == pytest.approx(1.0)
    assert sum(result.lost.values()) == pytest.approx(0.0)
    assert (result.lost_steps, result.restarts, result.restart_seconds) == (0, 0, None)
    assert result.tokens == tokens
    assert result.busy_share < 0.97  # the stalls are told apart all the same


def test_what_the_starts_of_replacements_cost_is_lost_and_that_of_the_first_spares_is_not():
    how = {"restart_seconds": (0.1, 0.2), "replace_seconds": 1.0, "save_steps": 10, "spare_seconds": 30.0}
    undisturbed = SimulatedRun(3, [64, 64], **how)
    undisturbed.run(300.0)
    assert figures(undisturbed).goodput == pytest.approx(1.0)
    disturbed = SimulatedRun(4, [64, 64], kill_seconds=90.0, **how)
    disturbed.run(TEN_MINUTES)
    result = figures(disturbed)
    starts = (result.restarts // 2) * 30.0  # every kill makes two: of the survivors, then with the replacement
    assert result.lost["spares"] == pytest.approx(starts / TEN_MINUTES * (1 - 1 / 1.8), abs=0.03)


def test_what_the_first_spares_cost_an_undisturbed_twin_has_lost_as_well():
    how = {"restart_seconds": (0.1, 0.2), "replace_seconds": 1.0, "save_steps": 10, "spare_seconds": 30.0}
    twin = SimulatedRun(1003, [64, 64], **how).run(150.0)
    disturbed = SimulatedRun(3, [64, 64], kill_seconds=90.0, **how)
    seen_outside = disturbed.run(150.0) / twin
    assert figures(disturbed).restarts
    assert figures(disturbed).goodput == pytest.approx(seen_outside, abs=0.03)


def test_a_run_without_its_fastest_worker_is_held_to_what_it_made_before():
    how = {"replace_seconds": 1e9, "restart_seconds": (0.1, 0.2), "save_steps": 1}
    full, small = (SimulatedRun(6, speeds, **how).run(400.0) for speeds in ([48, 16], [16]))
    run = SimulatedRun(5, [48, 16], kill_seconds=100.0, **how)
    tokens = run.run(400.0)
    result = figures(run)
    assert result.goodput == pytest.approx(tokens / full, abs=0.03)
    assert result.lost["absence"] == pytest.approx((1 - run.killed_at / 400.0) * (1 - small / full), abs=0.03)
    assert result.lost["restarts"] < 0.03


def test_a_run_that_grows_is_held_to_its_new_speed_only_from_then_on():
    small = SimulatedRun(1, [16], save_steps=1)
    small.run(100.0)
    ledger = Ledger.from_dict(json.loads(json.dumps(small.ledger.to_dict())))
    grown = SimulatedRun(2, [16, 16, 16], save_steps=1, ledger=ledger, clock=small.clock, highest=small.highest)
    grown.run(100.0)
    result = figures(grown)
    assert result.lost["absence"] == pytest.approx(0.0)
    assert result.tokens == grown.highest * TOKENS_PER_STEP
    assert result.undisturbed_tokens_per_s > 2 * figures(small).undisturbed_tokens_per_s
    start = result.restart_seconds  # of the second driver
    lost = start * result.undisturbed_tokens_per_s / (result.tokens + start * result.undisturbed_tokens_per_s)
    assert 1 - result.goodput == pytest.approx(lost, abs=0.04)


def test_lost_steps_are_those_that_were_made_again():
    run = SimulatedRun(7, [16, 16], kill_seconds=60.0)
    made = set()
    take = run.ledger.take

    def counted(event):
        if isinstance(event, StepRecord):
            made.add((event.membership, event.step))
        take(event)

    run.ledger.take = counted
    tokens = run.run(300.0)
    result = figures(run)
    assert result.lost_steps == len(made) - run.highest > 0
    assert result.tokens == tokens == run.highest * TOKENS_PER_STEP
    assert {worker.tokens % SEQUENCE_LENGTH for worker in result.workers} == {0}
