"""A loss or gradient that is no number: tried once more, then left out or the end of the run, as the recipe says."""

from types import SimpleNamespace

import pytest

from cluster.workloads.careful_step import careful_step
from cluster.workloads.training_events import StepSkipped
from doge.common.errors import UserError
from doge.training.step_result import NotFinite, StepResult

NAN = float("nan")


class Loop:
    """What a step needs of the loop around it."""

    def __init__(self, on_nonfinite: str = "stop", rank: int = 0, replicas: object = "replicas", steps=(100,)):
        self.rank, self.posts, self.said, self.commits = rank, [], [], 0
        self.settings = SimpleNamespace(on_nonfinite=on_nonfinite)
        self.engine = SimpleNamespace(step_count=100, replicas=replicas, all_gather_floats=lambda numbers: [numbers])
        self.engine.skip = lambda: setattr(self.engine, "step_count", self.engine.step_count + 1)
        checkpoints = SimpleNamespace(wait=lambda timeout: None, steps=lambda: list(steps))
        self.workload = SimpleNamespace(say=self.said.append, checkpoints=checkpoints)
        self.position, self.phase = SimpleNamespace(next_unit=800), SimpleNamespace(units_per_step=8)
        self.post = self.posts.append

    def commit(self) -> None:
        self.commits += 1


def attempts(*results):
    """A step that gives these results, one attempt after the other."""
    left = list(results)

    def make():
        result = left.pop(0)
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
    assert careful_step(loop, 100, attempts(NotFinite(NAN, 1.0), GOOD)) is GOOD
    assert loop.said == ["In step 101 the loss was nan and the gradient norm 1.0: the step is tried once more."]
    assert loop.engine.step_count == 100


def test_one_that_repeats_is_left_out_and_recorded_where_the_recipe_says_so():
    loop = Loop("skip")
    assert careful_step(loop, 100, attempts(NotFinite(NAN, 1.0), NotFinite(NAN, 1.0))) is None
    assert loop.engine.step_count == 101
    assert loop.posts == [StepSkipped(101, 800, 8, "the loss was nan and the gradient norm 1.0")]
    assert "its units (800 to 807) are left out" in loop.said[-1]
    other = Loop("skip", rank=1)
    assert careful_step(other, 100, attempts(NotFinite(NAN, 1.0), NotFinite(NAN, 1.0))) is None
    assert (other.engine.step_count, other.posts, other.said) == (101, [], [])


def test_one_that_repeats_ends_the_run_with_the_last_good_state_committed():
    loop = Loop()
    with pytest.raises(UserError, match=r"In step 101 \(sequences 800 to 807\) the loss was inf .* is of step 100"):
        careful_step(loop, 100, attempts(NotFinite(float("inf"), NAN), NotFinite(float("inf"), NAN)))
    assert loop.commits == 1


def test_where_the_state_is_partitioned_the_update_is_made_and_the_run_ends():
    loop = Loop("skip", replicas=None, steps=())
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        careful_step(loop, 100, attempts(StepResult(loss=2.0, grad_norm=NAN, weight=3.0)))
    assert loop.commits == 0
