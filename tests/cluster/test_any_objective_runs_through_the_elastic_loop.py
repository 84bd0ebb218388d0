"""An objective that only the tests know, in two phases, the first mostly frozen: killed in each, and resumed."""

from dataclasses import replace

import pytest
import torch
from pairs_run import PairsRun, one_process
from reconstruct_pairs import PairFeed, ReconstructPairs

from cluster.elastic.events import MembershipFormed
from cluster.workloads.phase import Phase, TrainingSettings
from cluster.workloads.side_tasks import Evaluation
from cluster.workloads.training_events import Evaluated, SamplesTaken, StepMade
from doge.common.storage import Storage
from doge.training.engine_recipe import EngineRecipe
from doge.training.objective import unit_seed
from doge.training.optimizer import OptimizerRecipe
from doge.training.schedule import SchedulerRecipe
from doge.training.state.checkpoint import Checkpoints

UNITS, STEPS = 12, (24, 24)
OPTIMIZER = OptimizerRecipe(lr=1e-2, max_grad_norm=0.5)
SCHEDULE = SchedulerRecipe(warmup_steps=4, decay_steps=8)
EVALUATION = Evaluation(PairFeed("held out"), 10, every=100)
FIRST = Phase(
    "head alone", ReconstructPairs("head", pause=0.05), PairFeed("first"), STEPS[0], UNITS, 70, OPTIMIZER, SCHEDULE,
    side_tasks=(EVALUATION,),
)  # fmt: skip
SECOND = Phase(
    "everything", ReconstructPairs("", pause=0.05), PairFeed("second"), STEPS[1], UNITS, 70, OPTIMIZER, SCHEDULE
)
SETTINGS = TrainingSettings(
    phases=(FIRST, SECOND), engine=EngineRecipe(precision="fp32"), tokenizer="none", recipe={}, seed=7, save_steps=6,
    micro_batch_size=3, record_samples=True,
)  # fmt: skip


def test_killed_in_each_of_two_phases_and_resumed_it_makes_the_steps_of_one_process(ray_cluster, tmp_path):
    storage, gate = Storage(str(tmp_path / "storage")), tmp_path / "gate"
    events, metrics = [], []
    checkpoints = Checkpoints(storage / "runs/pairs/checkpoints")
    first = replace(FIRST, objective=replace(FIRST.objective, gate=str(gate)))
    settings = replace(SETTINGS, phases=(first, SECOND))
    with PairsRun(settings, storage) as run:
        run.reach(8)
        run.kill_rank(1)  # in the first phase
        run.reach(14)
        gate.touch()
        events += run.events(SamplesTaken)
        metrics += run.events(StepMade)  # the block ends the run amid the first phase, at a step that all wait before
    gate.unlink()
    with PairsRun(settings, storage) as run:  # resumed in the first phase
        run.reach(STEPS[0] + 8)
        run.kill_rank(0)  # in the second phase, the one that commits
        run.finish()
        events += run.events(SamplesTaken)
        metrics += run.events(StepMade)
        evaluated = run.events(Evaluated)
        starts = [event.from_step for event in run.events(MembershipFormed)]
    assert starts[0] in range(12, STEPS[0])
    assert STEPS[0] in starts  # the second phase begins in a membership of its own
    assert starts[-1] > STEPS[0]
    expected, model, moments = one_process(SETTINGS)
    _, early, _ = one_process(replace(SETTINGS, phases=(FIRST,)))
    batch = FIRST.objective.prepare(early, EVALUATION.feed.read(0, 10), [unit_seed(7, 0, unit) for unit in range(10)])
    held_out = FIRST.objective.loss_sum(early, batch).loss.item() / 10

    for step in range(sum(STEPS)):
        phase, within = (FIRST, step) if step < STEPS[0] else (SECOND, step - STEPS[0])
        taken = {
            event.first + at: tuple(sample)
            for event in events
            if event.step == step
            for at, sample in enumerate(event.samples)
        }
        assert taken == {
            unit: (unit, len(phase.feed.pair(unit)[1])) for unit in range(within * UNITS, (within + 1) * UNITS)
        }
    shares = {len(event.samples) for event in events}
    assert len(shares) > 1, "the shares were never unequal"

    found = {event.step: event.metrics for event in metrics}
    assert sorted(found) == list(range(1, sum(STEPS) + 1))
    for step, (loss, norm, masked) in expected.items():
        assert found[step]["loss"] == pytest.approx(loss, abs=1e-6)
        assert found[step]["grad_norm"] == pytest.approx(norm, abs=1e-5)
        assert found[step]["masked_tokens"] == pytest.approx(masked)
    assert [event.metrics["held_out_loss"] for event in evaluated] == [pytest.approx(held_out, abs=1e-5)]

    state, position = checkpoints.latest()
    assert (state.step, position.phase, position.next_unit) == (sum(STEPS), 1, STEPS[1] * UNITS)
    for name, parameter in model.named_parameters():
        assert torch.allclose(state.parameters[name], parameter, rtol=0, atol=1e-5), name
        for key, moment in moments[name].items():
            assert torch.allclose(state.moments[key][name], moment, rtol=0, atol=1e-6), name
