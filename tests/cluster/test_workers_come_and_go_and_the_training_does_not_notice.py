"""Promises 1 and 6 while workers, rank 0 and whole nodes die and come, on a cluster of several nodes."""

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nodes import Node, add_node, wait_until
from small_runs import hosts, losses, members, samples, small_recipe

from cluster.runs.pretraining import pretrain
from cluster.runs.recipe import Recipe

SEED = int(os.environ.get("DOGE_TEST_SEED", random.SystemRandom().randrange(10**6)))
PATIENCE = 150  # seconds for anything that is waited for


@pytest.fixture
def nodes(ray_cluster) -> Iterator[list[Node]]:
    """Two nodes, which alone have the resource ``seat``; whatever else is put into the list ends with the test."""
    started = [add_node(ray_cluster.address, {"seat": 1}), add_node(ray_cluster.address, {"seat": 1})]
    yield started
    for node in started:
        node.kill()


class Misfortune(threading.Thread):
    """All that befalls the run, one thing after the other; ``error`` is what went wrong with that itself."""

    def __init__(self, recipe: Recipe, nodes: list[Node], address: str):
        super().__init__(daemon=True)
        self.recipe, self.nodes, self.address = recipe, nodes, address
        self.seeded, self.error = random.Random(SEED), None
        self.start()

    def run(self) -> None:
        try:
            self.wait_for_steps_of(2, at_least=self.seeded.randrange(11, 16))
            self.kill_rank(1)
            self.let_them_be_two()
            self.kill_rank(0)
            self.let_them_be_two()
            self.nodes.pop(self.seeded.randrange(2)).kill()
            self.wait_for_steps_of(1)
            with self.held_training():
                arrived = add_node(self.address, {"seat": 1})
                self.nodes.append(arrived)
                self.wait_for_hosts_of(2)
            self.wait_for_steps_of(2)
            with self.held_training():  # its steps take milliseconds
                arrived.drain(deadline_s=60)
                wait_until(lambda: any(host["leaving"] for host in hosts(self.recipe.name)), PATIENCE, "the notice")
        except BaseException as error:
            self.error = error

    def let_them_be_two(self) -> None:
        """Hold the training, once it goes on with one worker, until another could take part; and wait until it does."""
        self.wait_for_steps_of(1)
        with self.held_training():
            self.wait_for_hosts_of(2)
        self.wait_for_steps_of(2)
        time.sleep(self.seeded.uniform(0, 0.1))

    def wait_for_hosts_of(self, nodes: int) -> None:
        there = {node.node_id for node in self.nodes}

        def ready() -> int:
            return len(there & {host["node"] for host in hosts(self.recipe.name)})

        wait_until(lambda: ready() == nodes, PATIENCE, "a process that could take part")

    def wait_for_steps_of(self, workers: int, at_least: int = 0) -> None:
        """Wait for steps that were never made before, by so many workers: each of them records its samples.

        The first one may be half a record of the last step before a loss.
        """
        folder = Path(self.recipe.storage, "runs", self.recipe.name, "samples")

        def steps() -> dict[int, int]:
            return Counter(int(path.name.split("-")[1]) for path in folder.glob("step-*"))

        last = max([*steps(), at_least - 1])
        wait_until(
            lambda: sum(step > last and shares == workers for step, shares in steps().items()) >= 2, PATIENCE,
            f"two steps of {workers} after step {last}",
        )  # fmt: skip

    def kill_rank(self, rank: int) -> None:
        os.kill(members(self.recipe.name)[rank]["pid"], signal.SIGKILL)

    @contextmanager
    def held_training(self) -> Iterator[None]:
        trainer = members(self.recipe.name)[0]["pid"]
        os.kill(trainer, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(trainer, signal.SIGCONT)


def test_lost_workers_and_nodes_and_announced_departures_change_no_sample(
    nodes, one_worker, ray_cluster, home, texts, capsys
):
    """Two workers lose rank 1, rank 0 and a node; another node comes, and is announced to go. Only the losses may
    repeat steps, and none that was committed."""
    print(f"DOGE_TEST_SEED={SEED}")
    scaling = {
        "num_workers": [1, 2], "num_cpus_per_worker": 0, "resources_per_worker": {"seat": 1}, "hang_timeout_s": 300,
    }  # fmt: skip
    recipe = small_recipe(home, texts, name="disturbed", scaling=scaling)
    misfortune = Misfortune(recipe, nodes, ray_cluster.address)
    pretrain(recipe)
    misfortune.join(PATIENCE)
    assert misfortune.error is None

    undisturbed, _ = one_worker
    assert samples(recipe) == samples(undisturbed)
    for metric in ("loss", "held_out_loss"):
        assert losses(recipe, metric) == pytest.approx(losses(undisturbed, metric), rel=1e-3)

    begun = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\d workers? on", line)]
    assert [line[0] for line in begun] == ["2", "1", "2", "1", "2", "1", "2", "1"], "\n".join(begun)
    for number, line in enumerate(begun):
        repeated = int(re.search(r"from step \d+(?:, repeating (\d+))?", line)[1] or 0)
        assert ("after the last" in line) == (number in (1, 3, 5))
        # Survivors have the whole state: at most the step is repeated that a lost one had made before the others.
        assert repeated <= (number in (1, 3, 5))
