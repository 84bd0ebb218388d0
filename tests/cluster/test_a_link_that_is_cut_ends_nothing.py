"""Three machines that share no directory; the link of rank 0's, which is not the head, is cut amid the steps.

Nothing closes: no machine is told that another is gone.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from networks import Network, why_not
from nodes import wait_until
from small_runs import losses, samples, small_recipe

from doge.common.config_tree import to_yaml

ROOT = Path(__file__).resolve().parents[2]
CUT_SECONDS = float(os.environ.get("DOGE_TEST_CUT_SECONDS", "0"))
PATIENCE = 180

pytestmark = pytest.mark.skipif(CUT_SECONDS == 0, reason="takes four minutes: set DOGE_TEST_CUT_SECONDS, such as 60")

LOOK = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
from cluster.elastic.coordinator import NAMESPACE, actor_name
coordinator = ray.get_actor(actor_name(sys.argv[2]), namespace=NAMESPACE)
for _ in sys.stdin:
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    hosts = ray.get(coordinator.members.remote())
    print(json.dumps([host | {"address": addresses[host["node"]]} for host in hosts]), flush=True)
"""


class Looker:
    """Asks the run's coordinator for its hosts, from a process of another cluster than this one's."""

    def __init__(self, network: Network, run: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOK, network.address, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=ROOT, env=network.environment() | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def hosts(self) -> list[dict]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        while not (answer := self.process.stdout.readline()).startswith("["):  # Ray tells it of lost nodes there
            assert answer, f"the one that looks ended with {self.process.wait(10)}"
        return json.loads(answer)


@contextmanager
def held(pids: list[int]):
    """Processes that are stopped meanwhile: the steps of this run take milliseconds."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_survivors_of_a_cut_link_keep_their_processes_and_lose_no_step(one_worker, home, texts):
    if reason := why_not():
        pytest.skip(reason)
    scaling = {
        "num_workers": [1, 3], "num_cpus_per_worker": 0, "resources_per_worker": {"seat": 1}, "hang_timeout_s": 300,
    }  # fmt: skip
    recipe = small_recipe(home, texts, name="cut", scaling=scaling)
    records = home / "runs/cut/samples"

    def shares() -> Counter:
        return Counter(int(path.name.split("-")[1]) for path in records.glob("step-*"))

    def step_of(workers: int) -> None:
        last = max([*shares(), 9])
        wait_until(
            lambda: sum(step > last and number == workers for step, number in shares().items()) >= 2, PATIENCE,
            f"two steps of {workers} workers after step {last}",
        )  # fmt: skip

    with tempfile.TemporaryDirectory(prefix="doge-cut-", dir="/tmp") as folder, Network(Path(folder), home) as network:
        for number, letter in enumerate("abc"):
            network.add_machine(letter, number + 2)
        (Path(folder) / "recipe.yaml").write_text(to_yaml(recipe))
        with open(f"{folder}/driver.log", "w") as log:
            driver = subprocess.Popen(
                [sys.executable, "jobs/pretrain.py", "--recipe", f"{folder}/recipe.yaml"], stdout=log, stderr=log,
                cwd=ROOT, env=network.environment(),
            )  # fmt: skip
        try:
            step_of(3)
            looker = Looker(network, "cut")
            members = {host["rank"]: host for host in looker.hosts() if host["rank"] is not None}
            lost = members[0]["address"]
            letter = "abc"[int(lost.rpartition(".")[2]) - 2]
            survivors = [host["pid"] for host in members.values() if host["address"] != lost]
            network.cut(letter)
            began = time.monotonic()
            step_of(2)
            seconds = time.monotonic() - began
            with held(survivors):
                time.sleep(max(0.0, CUT_SECONDS - seconds))
                network.heal(letter)
                wait_until(
                    lambda: any(
                        host["address"] == lost and host["pid"] != members[0]["pid"] for host in looker.hosts()
                    ),
                    PATIENCE, "the machine to come back",
                )  # fmt: skip
            step_of(3)
            now = {host["pid"] for host in looker.hosts()}
            looker.close()
            assert driver.wait(PATIENCE) == 0
        finally:
            driver.kill()
            driver.wait()
            said = Path(folder, "driver.log").read_text()
            print(said)
    print(f"partition_seconds: {seconds:.1f}")
    assert set(survivors) <= now
    assert seconds < 40
    undisturbed, _ = one_worker
    assert samples(recipe) == samples(undisturbed)
    for metric in ("loss", "held_out_loss"):
        assert losses(recipe, metric) == pytest.approx(losses(undisturbed, metric), rel=1e-3)
    repeated = [int(found) for found in re.findall(r"repeating (\d+) step", said)]
    assert all(number <= 1 for number in repeated)
