"""Several machines in one: Ray nodes of this machine that come, drain and die, and real runs, seen from outside.

A node that is held to a core of its own makes its worker compute with one thread, alone as beside others, and keeps a
worker that is stopped from lending its core to the others, as between two machines.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
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
        seats: "seat" for any node, "seat-0" for the first alone, or a label of some.
        values: nested, over the defaults here.
    """
    from cluster.runs.recipe import Recipe
    from doge.common.config_tree import from_dict

    tree: dict[str, Any] = {
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
        self.process = _job("pretrain", recipe, environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
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
            if self.process.poll() is not None and step not in self.finish().seen:
                raise RuntimeError(f"{self.recipe.name} ended before step {step}.")
            if time.monotonic() > deadline:
                raise RuntimeError(f"Step {step} of {self.recipe.name} did not come in {timeout:g} s.")
            time.sleep(0.05)

    def members(self) -> list[dict]:
        """The hosts that train, by rank, as the coordinator knows them."""
        import ray

        from cluster.elastic.coordinator import NAMESPACE, actor_name

        hosts = ray.get(ray.get_actor(actor_name(self.recipe.name), namespace=NAMESPACE).members.remote())
        return sorted((host for host in hosts if host["rank"] is not None), key=lambda host: host["rank"])

    def begin(self) -> None:
        """Return once it has made its first step, with each worker on one core."""
        self.wait_for(1)
        for member in self.members():
            if len(psutil.Process(member["pid"]).cpu_affinity()) != 1:
                raise RuntimeError(f"Host {member['host']} is not held to one core.")

    def seconds(self, first: int, last: int) -> float:
        """From the end of step ``first`` to the end of step ``last``."""
        return self.seen[last] - self.seen[first]

    def finish(self) -> "Run":
        """Wait for the end. Raises RuntimeError if it is not a good one."""
        self._reader.join()
        if self.process.wait():
            raise RuntimeError(f"The run {self.recipe.name} failed:\n{''.join(self._lines[-15:])}")
        return self

    def interrupt(self) -> None:
        """Stop the run as Ctrl-C does, and wait for its end."""
        self.process.send_signal(signal.SIGINT)
        self._reader.join()
        self.process.wait()

    def history(self, metric: str) -> dict[int, float]:
        """What MLflow holds of a metric, by step."""
        from doge.common.storage import Storage
        from doge.reporting.tracking import Tracker

        root = Storage(self.recipe.storage)
        run = root / f"runs/{self.recipe.name}"
        return dict(Tracker(self.recipe.tracking, root, run, self.recipe.name).history(metric))

    def ledger(self) -> dict[str, Any]:
        """The run's ledger, as it lies beside it."""
        return json.loads(Path(self.recipe.storage, "runs", self.recipe.name, "ledger.json").read_text())


@dataclass(frozen=True)
class Node:
    """A Ray node of this machine.

    Args:
        node_id: Ray's.
        address: of its cluster.
        alive_at: monotonic time at which the cluster was seen to know it.
    """

    node_id: str
    address: str
    alive_at: float
    process: subprocess.Popen

    def kill(self) -> None:
        """SIGKILL the raylet and every process of it, as when the machine loses its power."""
        end(self.process)

    def freeze(self) -> None:
        """SIGSTOP all of it: it says nothing more, and closes no connection."""
        family = psutil.Process(self.process.pid)
        for process in [family, *family.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def drain(self, deadline_s: float) -> None:
        """Announce that the node will be taken away in ``deadline_s`` seconds, as `ray drain-node` does."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

        deadline_ms = int((time.time() + deadline_s) * 1000)
        accepted, refusal = GcsClient(address=self.address).drain_node(
            self.node_id, DRAIN_NODE_REASON_PREEMPTION, "it is taken away", deadline_ms
        )
        if not accepted:
            raise RuntimeError(f"The notice was refused: {refusal}")


class Machines:
    """A Ray cluster of this machine: a head without seats, and nodes with a seat each; see `open_machines`."""

    def __init__(self, folder: str, environment: dict[str, str], address: str):
        self.storage, self.environment = f"{folder}/doge", environment
        self.address, self.nodes = address, list[Node]()
        self._folder, self._started = folder, list[subprocess.Popen]()

    def add_node(self, core: int | None = None, *labels: str) -> Node:
        """Start node *i* with the resources "seat" and "seat-i", held to ``core`` if given; returns once Ray has it.

        ``labels`` are further resources, of which it has one each.
        """
        import ray

        seat = f"seat-{len(self.nodes)}"
        resources = json.dumps(dict.fromkeys(["seat", seat, *labels], 1))
        prefix = [] if core is None else ["taskset", "-c", str(core)]
        process = self._start(f"--address={self.address}", "--num-cpus=1", f"--resources={resources}", prefix=prefix)
        while not (known := [node for node in ray.nodes() if node["Alive"] and seat in node["Resources"]]):
            self._check(process)
            time.sleep(0.05)
        self.nodes.append(Node(known[0]["NodeID"], self.address, time.monotonic(), process))
        return self.nodes[-1]

    def find(self, node_id: str) -> Node:
        """The node that Ray knows by this id."""
        return next(node for node in self.nodes if node.node_id == node_id)

    def prepare(self, recipe) -> None:
        """Make the data of a recipe, so that no run has to do it beside its training."""
        job = _job("prepare_data", recipe, self.environment)
        try:
            text, _ = job.communicate()
        finally:
            end(job)
        if job.returncode:
            raise RuntimeError(f"Preparing the data failed:\n{text}")

    @contextmanager
    def launch(self, recipe, echo: Callable[[str], None] = lambda line: None) -> Iterator[Run]:
        """A run that is about to start; it is ended with the block."""
        run = Run(recipe, self.environment, echo)
        try:
            yield run
        finally:
            end(run.process)

    @contextmanager
    def run(self, recipe, echo: Callable[[str], None] = lambda line: None) -> Iterator[Run]:
        """A run that has begun; it is ended with the block."""
        with self.launch(recipe, echo) as run:
            run.begin()
            yield run

    def favor(self, run: Run) -> None:
        """Let all else that belongs to the cluster and the run's driver yield to the hosts that train now.

        Of Ray's processes there are as many as on several machines, but they share the cores of one. A host that starts
        later yields as well. Linux weighs niceness within a session only, so that whole sessions yield too.
        """
        favored = {member["pid"] for member in run.members()}
        others: dict[int, int] = {}  # a process of each session
        for root in [*self._started, run.process]:
            for process in [psutil.Process(root.pid), *psutil.Process(root.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    if process.pid in favored:
                        continue
                    others.setdefault(os.getsid(process.pid), process.pid)
                    for thread in process.threads():
                        os.setpriority(os.PRIO_PROCESS, thread.id, 19)
        for session in others.keys() - {os.getsid(pid) for pid in favored}:
            with suppress(FileNotFoundError):  # it has ended, or Linux was built without this
                Path(f"/proc/{others[session]}/autogroup").write_text("19")
            time.sleep(0.2)  # Linux refuses who is not root a second one within a tenth of a second

    def _start_head(self) -> None:
        port = self.address.rpartition(":")[2]
        head = self._start(
            "--head", f"--port={port}", f"--temp-dir={self._folder}/ray", "--include-dashboard=false", "--num-cpus=2"
        )
        while "Ray runtime started" not in self._log(head).read_text():
            self._check(head)
            time.sleep(0.05)

    def _start(self, *options: str, prefix: Sequence[str] = ()) -> subprocess.Popen:
        command: list[str | Path] = [*prefix, Path(sys.executable).parent / "ray", "start", "--block"]
        command += ["--disable-usage-stats", *options]
        with open(f"{self._folder}/node-{len(self._started)}.log", "w") as log:
            process = subprocess.Popen(
                [*command, "--object-store-memory=200000000"],
                stdout=log,
                stderr=log,
                env=self.environment | {"RAY_ADDRESS": ""},
                start_new_session=True,  # a signal to the command's group is for the command alone
            )
        self._started.append(process)
        return process

    def _log(self, process: subprocess.Popen) -> Path:
        return Path(self._folder, f"node-{self._started.index(process)}.log")

    def _check(self, process: subprocess.Popen) -> None:
        """Raises RuntimeError if a node that starts has ended."""
        if process.poll() is not None:
            raise RuntimeError(f"Ray did not start:\n{self._log(process).read_text()}")

    def _end(self) -> None:
        for process in reversed(self._started):
            end(process)


@contextmanager
def open_machines(number: int = 2, own_cores: bool = True) -> Iterator[Machines]:
    """Start a head, to which this process is connected, and ``number`` nodes, and end them.

    With ``own_cores`` node *i* is held to core *i*.
    """
    cores = first_cores(number) if own_cores else [None] * number

    def leave(*_) -> None:
        sys.exit(143)  # by way of the blocks that end what was started

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs and theirs would ignore it
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # a process keeps to its first one
    import ray

    with tempfile.TemporaryDirectory(prefix="doge-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short paths
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        environment = os.environ | {"DOGE_HOME": f"{folder}/doge", "RAY_ADDRESS": address}
        if own_cores:  # by default Ray's daemons go before its workers, which several nodes' would feel
            environment["RAY_worker_niceness"] = "0"
        machines = Machines(folder, environment, address)
        try:
            machines._start_head()
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            signal.signal(signal.SIGTERM, leave)  # Ray has put its own in place, which ends the process at once
            for core in cores:
                machines.add_node(core)
            yield machines
        finally:
            ray.shutdown()
            machines._end()


def first_cores(number: int) -> list[int]:
    """Cores that this process may use. Raises SystemExit if there are fewer."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < number:
        raise SystemExit(f"{number} nodes need {number} cores, but this process has {len(cores)}.")
    return cores[:number]


def _job(name: str, recipe, environment: dict[str, str]) -> subprocess.Popen:
    """`jobs/{name}.py` with a recipe, its output in a pipe."""
    from doge.common.config_tree import to_yaml

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


def end(process: subprocess.Popen) -> None:
    """SIGKILL a process that was started here, with all its children, and wait until they are gone."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), process]
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family[:-1], timeout=10)
    process.wait()
