"""A worker that hangs, a second driver of the same run, a loss that turns NaN, a board that is ended."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from small_runs import STEPS, losses, members, samples, small_recipe

from cluster.runs.pretraining import Pretraining, pretrain
from doge.common.errors import UserError

HANG_SECONDS = 15  # three times what the second driver needs to see that the first one lives
EXPERTS = {
    "model": {"preset": "Doge-MoE-20M", "num_experts": 32, "expert_retrieval_size": 16},
    "engine": {"states": "partitioned", "zero_stage": 2, "precision": "bf16"},
}


def at_step(recipe, step: int, act) -> threading.Thread:
    """Call ``act`` in a thread once the run has made a step."""
    folder = Path(recipe.storage, "runs", recipe.name, "samples")

    def work() -> None:
        while not list(folder.glob(f"step-{step:08d}-*")):
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_worker_that_hangs_is_replaced_and_a_second_driver_refused(ray_cluster, home, texts, capsys):
    """The run stands still while its worker does, so that the second driver certainly meets it.

    With experts, bf16 and states that ZeRO 2 partitions, which nothing else runs end to end.
    """
    scaling = {"warm_spares": 1, "hang_timeout_s": HANG_SECONDS}
    recipe = small_recipe(home, texts, name="hangs", scaling=scaling, **EXPERTS)
    refusals = []

    def disturb() -> None:
        os.kill(members("hangs")[1]["pid"], signal.SIGSTOP)
        try:
            pretrain(recipe)
        except UserError as error:
            refusals.append(str(error))

    disturbance = at_step(recipe, 15, disturb)
    pretrain(recipe)
    disturbance.join(30)
    out = capsys.readouterr().out
    assert re.search(r"Step \d+ was interrupted: a worker", out)
    assert "repeating" in out  # each worker held a part of the state alone
    assert sorted(losses(recipe)) == list(range(1, STEPS + 1))
    assert losses(recipe)[STEPS] < losses(recipe)[1]
    assert sorted(losses(recipe, "experts/usage")) == list(range(10, STEPS + 1, 10))
    assert 0 < losses(recipe, "experts/usage")[STEPS] <= 1
    assert sorted(samples(recipe)) == list(range(STEPS))
    assert len(refusals) == 1
    assert "the training of hangs" in refusals[0]


def test_a_board_that_is_ended_ends_the_run_with_the_step_to_resume_from(ray_cluster, home, texts, capfd):
    import ray

    pretraining = Pretraining(small_recipe(home, texts, name="boardless", scaling={"num_workers": 1}), None)
    at_step(pretraining.recipe, 25, lambda: ray.kill(pretraining.run._board.handle))
    with pytest.raises(UserError, match=r"^Ray lost the process .*: run the same command to resume from step [12]0\.$"):
        pretraining.execute()
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err


def test_a_loss_that_turns_nan_names_the_step_and_the_sequences(ray_cluster, home, texts):
    recipe = small_recipe(
        home, texts, name="diverges", optimizer={"lr": 1e30}, scaling={"num_workers": 1},
        training={"max_steps": 20, "save_steps": 1},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"In step (\d+) \(sequences \d+ to \d+\) the loss was (nan|inf)") as caught:
        pretrain(recipe)
    assert "the last checkpoint is of step" in str(caught.value)
