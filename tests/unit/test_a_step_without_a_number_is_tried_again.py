"""A loss that is no number, or a spike: tried once more, then left out or the end of the run, as the recipe says."""

from types import SimpleNamespace

import pytest

from cluster.workloads.careful_step import careful_step
from cluster.workloads.training_events import StepSkipped
from doge.common.errors import UserError
from doge.training.state.run_position import RunningMean, RunPosition
from doge.training.step_result import StepRefused, StepResult

NAN = float("nan")


class Loop:
    """What a step needs of the loop around it."""

    def __init__(self, on_nonfinite="stop", rank=0, replicas="replicas", steps=(100,), on_spike="off", usual=2.0):
        self.rank, self.posts, self.said, self.commits = rank, [], [], 0
        self.settings = SimpleNamespace(on_nonfinite=on_nonfinite, on_spike=on_spike, spike_factor=2.0)
        self.engine = SimpleNamespace(step_count=100, replicas=replicas, all_gather_floats=lambda numbers: [numbers])
        self.engine.skip = lambda: setattr(self.engine, "step_count", self.engine.step_count + 1)
        checkpoints = SimpleNamespace(wait=lambda timeout: None, steps=lambda: list(steps))
        self.workload = SimpleNamespace(say=self.said.append, checkpoints=checkpoints)
        self.position = RunPosition("feed", "tokenizer", next_unit=800, loss=RunningMean(usual, RunningMean.STEPS))
        self.phase = SimpleNamespace(units_per_step=8)
        self.post = self.posts.append

    def commit(self) -> None:
        self.commits += 1


def attempts(*results):
    """A step that gives these results, one attempt after the other."""
    left = list(results)

    def make(max_loss):
        result = left.pop(0)
        if not isinstance(result, Exception) and result.loss > max_loss:
            raise StepRefused(result.loss, result.grad_norm, max_loss)
        if isinstance(result, Exception):
            raise result
        return result

    return make


GOOD = StepResult(loss=2.0, grad_norm=1.0, weight=3.0)


def test_a_good_step_is_made_once():
    loop = Loop()
    assert careful_step(loop, 100, attempts(GOOD)) is GOOD
    assert loop.said == loop.posts == []


def test_a_passing_fault_costs_one_more_attempt_and_is_told():
    loop = Loop()
    assert careful_step(loop, 100, attempts(StepRefused(NAN, 1.0), GOOD)) is GOOD
    assert loop.said == ["In step 101 the loss was nan and the gradient norm 1: the step is tried once more."]
    assert loop.engine.step_count == 100


def test_one_that_repeats_is_left_out_and_recorded_where_the_recipe_says_so():
    loop = Loop("skip")
    assert careful_step(loop, 100, attempts(StepRefused(NAN, 1.0), StepRefused(NAN, 1.0))) is None
    assert loop.engine.step_count == 101
    assert loop.posts == [StepSkipped(101, 800, 8, "the loss was nan and the gradient norm 1")]
    assert "its units (800 to 807) are left out" in loop.said[-1]
    other = Loop("skip", rank=1)
    assert careful_step(other, 100, attempts(StepRefused(NAN, 1.0), StepRefused(NAN, 1.0))) is None
    assert (other.engine.step_count, other.posts, other.said) == (101, [], [])


def test_one_that_repeats_ends_the_run_with_the_last_good_state_committed():
    loop = Loop()
    with pytest.raises(UserError, match=r"In step 101 \(sequences 800 to 807\) the loss was inf .* is of step 100"):
        careful_step(loop, 100, attempts(StepRefused(float("inf"), NAN), StepRefused(float("inf"), NAN)))
    assert loop.commits == 1


def test_where_the_state_is_partitioned_the_update_is_made_and_the_run_ends():
    loop = Loop("skip", replicas=None, steps=())
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        careful_step(loop, 100, attempts(StepResult(loss=2.0, grad_norm=NAN, weight=3.0)))
    assert loop.commits == 0


SPIKE = StepResult(loss=4.5, grad_norm=1.0, weight=3.0)


def test_a_spike_is_left_out_too_and_a_level_that_stays_is_not():
    assert careful_step(Loop(), 100, attempts(SPIKE)) is SPIKE  # as long as nobody asked
    loop = Loop(on_spike="skip")
    assert careful_step(loop, 100, attempts(SPIKE, GOOD)) is GOOD
    assert careful_step(loop, 100, attempts(SPIKE, SPIKE)) is None
    assert loop.engine.step_count == 101
    assert loop.posts == [StepSkipped(101, 800, 8, "the loss was 4.5, beyond the bound of 4 and the gradient norm 1")]
    skipped = sum(careful_step(loop, 100, attempts(SPIKE, SPIKE)) is None for _ in range(100))
    assert 1 < skipped < 20


def test_a_spike_may_end_the_run_and_one_of_a_new_run_does_not():
    loop = Loop(on_spike="stop")
    with pytest.raises(UserError, match=r"beyond the bound of 4 .* --training.on-spike skip"):
        careful_step(loop, 100, attempts(SPIKE, SPIKE))
    assert loop.commits == 1
    partitioned = Loop(on_spike="stop", replicas=None)
    with pytest.raises(UserError, match="beyond the bound of 4"):
        careful_step(partitioned, 100, lambda max_loss: SPIKE)
    loop = Loop(on_spike="stop")
    loop.position = RunPosition("feed", "tokenizer")
    for _ in range(RunningMean.STEPS):
        assert careful_step(loop, 0, attempts(SPIKE)) is SPIKE


def test_the_mean_that_a_spike_is_measured_by_is_in_the_checkpoint():
    loop = Loop(on_spike="skip")
    careful_step(loop, 100, attempts(StepResult(loss=3.0, grad_norm=1.0, weight=3.0)))
    assert loop.position.loss == RunningMean(2.0 + 1.0 / RunningMean.STEPS, RunningMean.STEPS)
    assert RunPosition.from_dict(loop.position.to_dict()) == loop.position
    assert RunningMean(-1.0, RunningMean.STEPS).bound(2.0) == 0.0  # a reward's loss may be negative
