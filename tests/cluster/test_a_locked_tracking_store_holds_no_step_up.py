"""MLflow's store is locked in the middle of a run: commits are made meanwhile, and every step is there afterwards."""

import pytest
from small_runs import STEPS, losses, samples


def test_commits_are_made_while_the_store_is_locked(two_workers):
    recipe, summary, (when_locked, when_free), output = two_workers
    assert when_locked < when_free == STEPS
    assert sorted(losses(recipe)) == list(range(1, STEPS + 1))
    assert losses(recipe, "held_out_loss")[STEPS] == pytest.approx(summary.held_out_loss)
    assert sorted(losses(recipe, "unigram_loss")) == sorted(losses(recipe, "ledger/steps")) == [STEPS]
    assert sorted(samples(recipe)) == list(range(STEPS))
    assert f"step {STEPS}/{STEPS}" in output
    assert "has not got" not in output
