"""Two machines in one: Ray nodes that are held to a core each, and real runs on them, watched from outside.

A core of its own makes a worker compute with one thread, alone as beside others, and keeps a worker that is stopped
from lending its core to the others, as between two machines.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 120
TINY = {
    "preset": "Doge-20M", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 1, "num_key_value_heads": 1, "initializer_range": 0.06,
}  # fmt: skip
"""The model of `jobs/recipes/tiny.yaml`."""


def make_recipe(name: str, storage: str, seats: str, **values: dict[str, Any]):
    """A recipe on the embedded sources.

    Args:
        name: of the run.
        storage: its root.
        seats: "seat" for any node, "seat-0" for the first alone.
        values: nested, over the defaults here.
    """
    from cluster.recipe import Recipe
    from doge.recipe import from_dict

    tree = {
        "model": TINY,
        "tokenizer": {"vocab_size": 4096, "training_bytes": 2_000_000},
        "data": {"sequence_length": 256, "held_out_sequences": 0},
        "lr_scheduler": {"warmup_steps": 2, "decay_steps": 2},
        "training": {"logging_steps": 1},
        "scaling": {"num_cpus_per_worker": 0, "resources_per_worker": {seats: 1}},
    }
    for key, value in values.items():
        tree[key] = value if "preset" in value else tree.get(key, {}) | value
    return from_dict(Recipe, {"name": name, "storage": storage} | tree)


class Run:
    """A training by `jobs/pretrain.py` in a process of its own.

    Args:
        recipe: of the run.
        environment: of the process.
        echo: is called with the driver's lines other than steps.
    """

    def __init__(self, recipe, environment: dict[str, str], echo: Callable[[str], None] = lambda line: None):
        self.recipe, self._echo = recipe, echo
        self.seen: dict[int, float] = {}
        """When the driver first told of each step; monotonic, up to a quarter of a second late."""
        self._lines: list[str] = []
        self._process = _job("pretrain", recipe, environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            if step := re.match(r"step ([\d,]+)/", line):
                self.seen.setdefault(int(step[1].replace(",", "")), time.monotonic())
            else:
                self._lines.append(line)
                if "(raylet)" not in line:  # Ray's own account of a worker that was killed on purpose
                    self._echo(line.rstrip())

    def wait_for(self, step: int, timeout: float = 600.0) -> None:
        """Return once the driver has told of ``step``."""
        deadline = time.monotonic() + timeout
        while step not in self.seen:
            if self._process.poll() is not None:
                self.finish()
            if time.monotonic() > deadline:
                raise RuntimeError(f"Step {step} of {self.recipe.name} did not come in {timeout:g} s.")
            time.sleep(0.05)

    def members(self) -> list[dict]:
        """The hosts that train, by rank, as the coordinator knows them."""
        import ray

        from cluster.coordinator import NAMESPACE, actor_name

        hosts = ray.get(ray.get_actor(actor_name(self.recipe.name), namespace=NAMESPACE).members.remote())
        return sorted((host for host in hosts if host["rank"] is not None), key=lambda host: host["rank"])

    def seconds(self, first: int, last: int) -> float:
        """From the end of step ``first`` to the end of step ``last``."""
        return self.seen[last] - self.seen[first]

    def finish(self) -> "Run":
        """Wait for the end. Raises RuntimeError if it is not a good one."""
        self._reader.join()
        if self._process.wait():
            raise RuntimeError(f"The run {self.recipe.name} failed:\n{''.join(self._lines[-15:])}")
        return self

    def history(self, metric: str) -> dict[int, float]:
        """What MLflow holds of a metric, by step."""
        from doge.storage import Storage
        from doge.tracking import Tracker

        root = Storage(self.recipe.storage)
        run = root / f"runs/{self.recipe.name}"
        return dict(Tracker(self.recipe.tracking, root, run, self.recipe.name).history(metric))

    def ledger(self) -> dict[str, Any]:
        """The run's ledger, as it lies beside it."""
        return json.loads(Path(self.recipe.storage, "runs", self.recipe.name, "ledger.json").read_text())


class Machines:
    """A Ray cluster of this machine: a head without seats and ``nodes`` with one seat each; see `open_machines`."""

    def __init__(self, folder: str, environment: dict[str, str], nodes: list[str], address: str):
        self.storage, self.environment = f"{folder}/doge", environment
        self.nodes, self.address = nodes, address

    def prepare(self, recipe) -> None:
        """Make the data of a recipe, so that no run has to do it beside its training."""
        job = _job("prepare_data", recipe, self.environment)
        try:
            text, _ = job.communicate()
        finally:
            _end(job)
        if job.returncode:
            raise RuntimeError(f"Preparing the data failed:\n{text}")

    @contextmanager
    def run(self, recipe, echo: Callable[[str], None] = lambda line: None) -> Iterator[Run]:
        """A run that has made its first step; it is ended with the block."""
        run = Run(recipe, self.environment, echo)
        try:
            run.wait_for(1)
            for member in run.members():
                if len(psutil.Process(member["pid"]).cpu_affinity()) != 1:
                    raise RuntimeError(f"Host {member['host']} is not held to one core.")
            yield run
        finally:
            _end(run._process)


@contextmanager
def open_machines(number: int = 2) -> Iterator[Machines]:
    """Start a head and ``number`` nodes, node *i* on core *i* with the resources "seat" and "seat-i"; end them."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < number:
        raise SystemExit(f"{number} nodes need {number} cores, but this process has {len(cores)}.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the blocks that end what was started
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ |= token
    import ray

    started: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory(prefix="doge-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short paths
        address = f"127.0.0.1:{_free_port()}"
        environment = os.environ | {"DOGE_HOME": f"{folder}/doge", "RAY_ADDRESS": address}

        def start(*options: str, core: int | None = None) -> None:
            command = [Path(sys.executable).parent / "ray", "start", "--block", "--disable-usage-stats", *options]
            command += ["--object-store-memory=500000000"]
            prefix = [] if core is None else ["taskset", "-c", str(core)]
            with open(f"{folder}/node-{len(started)}.log", "w") as log:
                started.append(
                    subprocess.Popen(
                        [*prefix, *command],
                        stdout=log,
                        stderr=log,
                        env=environment | {"RAY_ADDRESS": ""},
                        start_new_session=True,  # a signal to the command's group is for the command alone
                    )
                )

        def ready(place: int) -> bool:
            log = Path(folder, f"node-{place}.log").read_text()
            if started[place].poll() is not None:
                raise RuntimeError(f"Ray did not start:\n{log}")
            return "Ray runtime started" in log

        try:
            port = address.rpartition(":")[2]
            start("--head", f"--port={port}", f"--temp-dir={folder}/ray", "--include-dashboard=false", "--num-cpus=2")
            _wait_until(lambda: ready(0), "the head")
            for place in range(number):
                resources = json.dumps({"seat": 1, f"seat-{place}": 1})
                start(f"--address={address}", "--num-cpus=0", f"--resources={resources}", core=cores[place])
                _wait_until(lambda: ready(len(started) - 1), "a node")
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            _wait_until(lambda: ray.cluster_resources().get("seat") == number, "the seats")
            seats = {name: node["NodeID"] for node in ray.nodes() for name in node["Resources"]}
            yield Machines(folder, environment, [seats[f"seat-{place}"] for place in range(number)], address)
        finally:
            ray.shutdown()
            for process in reversed(started):
                _end(process)


def _job(name: str, recipe, environment: dict[str, str]) -> subprocess.Popen:
    """`jobs/{name}.py` with a recipe, its output in a pipe."""
    from doge.recipe import to_yaml

    Path(recipe.storage).mkdir(parents=True, exist_ok=True)
    path = Path(recipe.storage, f"{recipe.name}.yaml")
    path.write_text(to_yaml(recipe))
    command = [sys.executable, f"jobs/{name}.py", "--recipe", str(path)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _end(process: subprocess.Popen) -> None:
    """SIGKILL a process that was started here, with all its children, and wait until they are gone."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), process]
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family[:-1], timeout=10)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"Waited {START_SECONDS} s for {what}.")
        time.sleep(0.2)
