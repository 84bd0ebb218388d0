"""Promises 1 and 6 while workers, rank 0 and whole nodes die and come, on a cluster of several nodes."""

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nodes import Node, add_node, wait_until
from small_runs import hosts, losses, members, samples, small_recipe

from cluster.runs.pretraining import pretrain
from cluster.runs.recipe import Recipe

STEPS, SAVE_STEPS = 400, 10
SEED = int(os.environ.get("DOGE_TEST_SEED", random.SystemRandom().randrange(10**6)))


def elastic_recipe(storage, texts, name, workers):
    """Workers only on the test's own nodes, which have the resource ``seat``."""
    training = {
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "eval_steps": STEPS,
        "global_batch_size": 16,
        "logging_steps": 100,
    }
    scaling = {
        "num_workers": workers,
        "num_cpus_per_worker": 0,
        "resources_per_worker": {"seat": 1},
        "hang_timeout_s": 300,
        "warm_spares": int(workers != 1),
    }
    return small_recipe(storage, texts, name=name, training=training, scaling=scaling)


class Disturbance(threading.Thread):
    """Does something when the run has made a step, and keeps what came of it."""

    def __init__(self, recipe: Recipe, step: int, act: Callable[[], object]):
        super().__init__(daemon=True)
        self.samples = Path(recipe.storage, "runs", recipe.name, "samples")
        self.step, self.act, self.done = step, act, None
        self.start()

    def run(self) -> None:
        while not list(self.samples.glob(f"step-{self.step:08d}-*")):
            time.sleep(0.02)
        self.done = self.act() or True


def kill_rank(run: str, rank: int) -> int:
    pid = members(run)[rank]["pid"]
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.fixture(scope="module")
def nodes(ray_cluster):
    print(f"DOGE_TEST_SEED={SEED}")
    started = [add_node(ray_cluster.address, {"seat": 1}), add_node(ray_cluster.address, {"seat": 1})]
    yield started
    for node in started:
        node.kill()


@pytest.fixture(scope="module")
def undisturbed(nodes, home, texts):
    recipe = elastic_recipe(home, texts, "undisturbed", 1)
    pretrain(recipe)
    return samples(recipe), losses(recipe), losses(recipe, "held_out_loss")


def check(recipe, undisturbed, out: str) -> list[str]:
    """The run is the undisturbed one; returns the line of each of its memberships."""
    recorded, expected, held_out = undisturbed
    assert samples(recipe) == recorded
    found = losses(recipe)
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    assert found[STEPS] == pytest.approx(expected[STEPS], rel=1e-3)
    assert losses(recipe, "held_out_loss") == pytest.approx(held_out, rel=1e-3)
    begun = [line for line in out.splitlines() if re.match(r"\d workers? on", line)]
    for line in begun:
        first, repeated = (int(n or 0) for n in re.search(r"from step (\d+)(?:, repeating (\d+))?", line).groups())
        # No committed step is lost; one that was being written when its writer died may be.
        assert first >= (first + repeated) // SAVE_STEPS * SAVE_STEPS - SAVE_STEPS
    return begun


def test_a_lost_worker_and_a_lost_rank_0_change_no_sample(nodes, undisturbed, home, texts, capsys):
    print(f"DOGE_TEST_SEED={SEED}")
    seeded = random.Random(SEED)
    recipe = elastic_recipe(home, texts, "lost", [1, 2])
    worker = Disturbance(recipe, seeded.randrange(12, 50), lambda: kill_rank("lost", 1))
    rank_0 = Disturbance(recipe, seeded.randrange(60, 100), lambda: kill_rank("lost", 0))
    pretrain(recipe)
    assert worker.done
    assert rank_0.done
    begun = check(recipe, undisturbed, capsys.readouterr().out)
    assert sum("after the last" in line for line in begun) >= 2


def test_a_node_that_dies_one_that_comes_and_one_that_is_announced_to_go(
    nodes, undisturbed, ray_cluster, home, texts, capsys
):
    """Only the death may repeat steps, and none that was committed."""
    print(f"DOGE_TEST_SEED={SEED}")
    seeded = random.Random(SEED)
    recipe = elastic_recipe(home, texts, "moving", [1, 2])
    doomed = nodes.pop()
    death = Disturbance(recipe, seeded.randrange(12, 30), doomed.kill)
    arrival = Disturbance(recipe, 60, lambda: add_node_meanwhile(recipe.name, ray_cluster.address))
    departure = Disturbance(recipe, 61, lambda: drain_meanwhile(recipe.name, arrival))
    pretrain(recipe)
    nodes.append(arrival.done)
    assert death.done
    assert departure.done
    begun = check(recipe, undisturbed, capsys.readouterr().out)
    assert [line[0] for line in begun] == ["2", "1", "2", "1"]
    assert "after the last" in begun[1]
    assert "repeating" not in begun[2] + begun[3]


def add_node_meanwhile(run: str, address: str) -> Node:
    """Add a node, and hold the training, whose steps take milliseconds, until a process there could take part."""
    with held_training(run):
        node = add_node(address, {"seat": 1})
        wait_until(lambda: any(host["node"] == node.node_id for host in hosts(run)), 120, "a process on the new node")
    return node


def drain_meanwhile(run: str, arrival: Disturbance) -> None:
    """Announce that the new node goes, once it takes part, and hold the training until the run has heard it."""
    wait_until(lambda: len(members(run)) == 2, 120, "the new node to take part")
    with held_training(run):
        arrival.done.drain(deadline_s=30)
        wait_until(lambda: any(host["leaving"] for host in hosts(run)), 30, "the notice")


@contextmanager
def held_training(run: str) -> Iterator[None]:
    trainer = members(run)[0]["pid"]
    os.kill(trainer, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(trainer, signal.SIGCONT)
