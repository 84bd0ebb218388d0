"""Promises 1, 6 and 7 end to end, through Ray Train and DeepSpeed in real processes."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from small_runs import STEPS, losses, members, samples, small_recipe

from cluster.runs.pretraining import pretrain
from doge.common.errors import UserError

EQUAL = {"shares": "equal"}  # the same losses to the last digit


@pytest.fixture(scope="module")
def runs(one_worker, two_workers, home, texts):
    """Finished runs of the same recipe with one, two and three workers; 8 sequences do not divide by three."""
    recipe = small_recipe(home, texts, name="three-workers", scaling=EQUAL | {"num_workers": 3})
    return {1: one_worker, 2: two_workers[:2], 3: (recipe, pretrain(recipe))}


def test_one_two_and_three_workers_train_on_the_same_samples(runs):
    recorded = {number: samples(recipe) for number, (recipe, _) in runs.items()}
    assert recorded[1] == recorded[2] == recorded[3]
    assert sorted(recorded[1]) == list(range(STEPS))
    for step, places in recorded[1].items():
        assert sorted(places) == list(range(8 * step, 8 * step + 8))
    everything = [place for places in recorded[1].values() for place in places.values()]
    assert len(set(everything)) > 200  # the data is not one sequence over and over


def test_one_two_and_three_workers_have_the_same_losses(runs):
    one, two, three = (losses(runs[number][0]) for number in (1, 2, 3))
    assert sorted(one) == sorted(two) == sorted(three) == list(range(1, STEPS + 1))
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=1e-3)
        assert three[step] == pytest.approx(loss, rel=1e-3)
    assert one[STEPS] < one[1] - 1
    held_out = [losses(runs[number][0], "held_out_loss") for number in (1, 2, 3)]
    for found in held_out:
        assert found == pytest.approx(held_out[0], rel=1e-3)
        assert sorted(found) == list(range(20, STEPS + 1, 20))


def test_a_killed_worker_changes_no_loss(runs, home, texts, capsys):
    """SIGKILL between two checkpoints: the run goes on with the step under way and ends equal to the last digit."""
    recipe = small_recipe(home, texts, name="killed", scaling=EQUAL | {"warm_spares": 1})
    killed = []

    def kill_at(step: int) -> None:
        directory = f"{recipe.storage}/runs/killed/samples"
        while not any(name.startswith(f"step-{step:08d}") for name in os.listdir(directory)):
            time.sleep(0.02)
        killed.append(members("killed")[-1]["pid"])
        os.kill(killed[0], signal.SIGKILL)

    os.makedirs(f"{recipe.storage}/runs/killed/samples")
    killer = threading.Thread(target=kill_at, args=(12,), daemon=True)
    killer.start()
    pretrain(recipe)
    assert killed
    starts = re.findall(r"2 workers on .*, from step (\d+)(?:, repeating (\d+) step)?", capsys.readouterr().out)
    (begun, again), (resumed, repeated) = starts
    assert (begun, again) == ("0", "")
    assert int(resumed) >= 12
    assert int(repeated or 0) <= 1  # one that the killed worker had made before the other
    assert losses(recipe) == losses(runs[2][0])
    assert losses(recipe, "held_out_loss") == losses(runs[2][0], "held_out_loss")
    assert samples(recipe) == samples(runs[2][0])


def test_the_exported_model_is_stock_transformers(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, summary = runs[1]
    model = AutoModelForCausalLM.from_pretrained(summary.model, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(summary.model)
    assert type(model).__module__ == "transformers.models.doge.modeling_doge"
    ids = model.generate(**tokenizer("def main", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert len(tokenizer.decode(ids[0])) > len("def main")


def test_the_summary_stands_beside_honest_baselines(runs):
    recipe, summary = runs[1]
    assert summary.step == STEPS
    assert summary.tokens_seen == STEPS * 8 * 64
    assert summary.held_out_loss == losses(recipe, "held_out_loss")[STEPS]
    assert summary.bigram_loss < summary.unigram_loss
    assert len(summary.samples) == 3
    assert Path(summary.plot).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_finished_run_is_shown_again(runs, ray_cluster, texts, capsys):
    recipe, summary = runs[2]
    assert pretrain(recipe) == summary
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"was started with optimizer.lr = 0.003, not 0.1: choose another --name"):
        pretrain(small_recipe(recipe.storage, texts, name=recipe.name, optimizer={"lr": 0.1}))
