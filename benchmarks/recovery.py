"""Seconds that a training loses when workers and nodes die, come and go: ours against a plain elastic Ray Train.

    python benchmarks/recovery.py --rounds 3

Every round trains the same model with the same batches and the same checkpoint interval, first by
`cluster.runs.pretraining.pretrain`, then by `plain_elastic.py`, each on a cluster of its own on this machine: a head
without seats and two nodes with one seat each. To every run happens the same:

    worker     SIGKILL of a worker; to the next optimizer step of two workers
    partition  SIGSTOP of all processes of a node, which says nothing more and closes nothing; to the next step of the
               worker that is left
    node       SIGKILL of a node, its raylet and all its processes; to the next step of the worker that is left
    arrival    a new node; from its being alive in `ray.nodes()` to the first step of two workers
    announced  a drain notice for that node; from the notice to the first step of the worker that stays

Rank 1 is struck in the odd rounds, rank 0 in the even ones, halfway between two checkpoints. Before an event the run is
left alone until it has written a checkpoint and, of ours, every node has its warm spare, or a minute has gone by. Both
sides note every step with the time by the machine's monotonic clock: the plain one in its rank 0, ours in its driver,
from the records that its workers make. Steps repeated are those that were made before the event and are made again. The
kernel closes a killed process's connections at once, so a loss is noticed sooner here than that of a machine that falls
silent.

The last line is one line of JSON: the ratios ours ÷ baseline of the median seconds, the most steps that ours repeated
over an arrival and over an announced loss, the median of those repeated over a killed worker, the median seconds of
ours after a node fell silent, and the medians of both sides.
"""

import argparse
import inspect
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml
from machines import end, open_machines

from cluster.runs.recipe import Recipe
from doge.common.config_tree import from_dict, to_yaml

SIDES = ("ours", "baseline")
EVENTS = ("worker", "partition", "node", "arrival", "announced")
GLOBAL_BATCH_SIZE = 16
START_SECONDS, EVENT_SECONDS = 400, 240  # the first run also prepares the data
SPARES_SECONDS = 60  # that our run gets to have its warm spares ready


def recipe(storage: Path, name: str, save_steps: int) -> Recipe:
    """Of both sides: a model of 3M parameters, whose step of 2,048 tokens takes about 0.2 s on two CPU cores."""
    values = {
        "name": name,
        "storage": str(storage),
        "model": {
            "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "keep_window_size": 128,
        },
        "tokenizer": {"vocab_size": 2048, "training_bytes": 200_000},
        "data": {
            "sources": {"code": {"path": str(storage / "code.jsonl"), "weight": 1}},
            "sequence_length": 128, "held_out_sequences": 0, "documents_per_shard": 1000, "files_per_stripe": 1,
        },
        "optimizer": {"lr": 1e-3},
        "lr_scheduler": {"warmup_steps": 5, "decay_steps": 10},
        "engine": {"precision": "fp32"},
        "training": {
            "max_steps": 20_000, "global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": GLOBAL_BATCH_SIZE,
            "eval_steps": 20_000, "save_steps": save_steps, "logging_steps": 20_000,
        },
        "scaling": {"num_workers": [1, 2], "num_cpus_per_worker": 1, "resources_per_worker": {"seat": 1}},
    }  # fmt: skip
    return from_dict(Recipe, values)


def write_texts(storage: Path) -> None:
    """Something to read: the sources of two modules of the standard library."""
    blocks = (inspect.getsource(argparse) + inspect.getsource(inspect)).split("\n\n")
    (storage / "code.jsonl").write_text("\n".join(json.dumps({"text": block}) for block in blocks if block.strip()))


def train(recipe_path: str, notes_path: str) -> None:
    """Our run's driver, which also notes what its ledger is told of steps."""
    from cluster.accounts.ledger import Ledger, StepRecord
    from cluster.elastic.events import Event
    from cluster.runs.pretraining import pretrain

    take = Ledger.take

    def noting(ledger: Ledger, event: Event) -> None:
        if isinstance(event, StepRecord) and "step" in event.seconds:
            note = {"kind": "step", "step": event.step, "time": event.ended}
            with open(notes_path, "a") as notes:
                notes.write(json.dumps(note | {"group": event.membership, "host": event.host}) + "\n")
        take(ledger, event)

    Ledger.take = noting  # type: ignore[method-assign, assignment]
    pretrain(from_dict(Recipe, yaml.safe_load(Path(recipe_path).read_text())))


@dataclass(frozen=True)
class Step:
    step: int
    time: float
    group: int
    workers: int


@dataclass(frozen=True)
class Result:
    """Of an event.

    Args:
        seconds: to the next step at the new size.
        next_step_seconds: to the next step of whatever size.
        steps_repeated: made before the event and again until the next step at the new size, or still to be.
    """

    seconds: float
    next_step_seconds: float
    steps_repeated: int


class Run:
    """A driver under way, seen from outside."""

    def __init__(self, side: str, storage: Path, name: str, save_steps: int, address: str):
        self.side, self.name, self.save_steps = side, name, save_steps
        self.notes, self.log = storage / f"{name}.jsonl", storage / f"{name}.log"
        self._told = 0  # lines of the log
        self.notes.touch()
        path = storage / f"{name}.yaml"
        path.write_text(to_yaml(recipe(storage, name, save_steps)))
        plain = Path(__file__).with_name("plain_elastic.py")
        arguments = {
            "ours": [__file__, "--train", path, self.notes],
            "baseline": [plain, "--recipe", path, "--notes", self.notes],
        }
        environment = os.environ | {"RAY_ADDRESS": address}
        with self.log.open("w") as log:
            command = [sys.executable, *map(str, arguments[side])]
            self.driver = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def rows(self, kind: str) -> list[dict]:
        complete = self.notes.read_text().rpartition("\n")[0].splitlines()
        return [row for row in map(json.loads, complete) if row["kind"] == kind]

    def steps(self) -> list[Step]:
        """All that were made, each group's once, as time went by."""
        rows = self.rows("step")
        hosts = {(row["group"], row["host"]) for row in rows if "host" in row}  # every worker of ours tells its steps
        sizes = Counter(group for group, _ in hosts)
        first: dict[tuple[int, int], Step] = {}
        for row in rows:
            key = (row["group"], row["step"])
            step = Step(row["step"], row["time"], row["group"], sizes[row["group"]] or row["workers"])
            first[key] = min(first.get(key, step), step, key=lambda each: each.time)
        return sorted(first.values(), key=lambda each: each.time)

    def worker(self, rank: int) -> tuple[int, str]:
        """Process and node of a worker that trains now."""
        if self.side == "ours":
            host = next(host for host in self._hosts() if host["rank"] == rank)
            return host["pid"], host["node"]
        row = [row for row in self.rows("worker") if row["rank"] == rank][-1]
        return row["pid"], row["node"]

    def _hosts(self) -> list[dict]:
        import ray

        from cluster.elastic.coordinator import NAMESPACE, actor_name

        return ray.get(ray.get_actor(actor_name(self.name), namespace=NAMESPACE).members.remote())

    def settle(self, workers: int, seconds: float) -> None:
        """Wait until the run is in a steady state, halfway between two checkpoints."""
        start = time.monotonic()

        def steady() -> bool:
            steps = self.steps()
            last = steps[-1] if steps else None
            if last is None or last.workers != workers or time.monotonic() - start < seconds:
                return False
            made = [step.step for step in steps if step.group == last.group]
            if made[-1] // self.save_steps == made[0] // self.save_steps:
                return False
            if not 0 <= made[-1] % self.save_steps - self.save_steps // 2 <= 1:
                return False
            if self.side != "ours" or sum(host["rank"] is None for host in self._hosts()) >= workers:
                return True
            if time.monotonic() - start < SPARES_SECONDS:
                return False
            say(f"         | not every node has a warm spare after {SPARES_SECONDS} s: going on without")
            return True

        self._wait(steady, START_SECONDS, f"a steady state with {workers} workers")

    def measure(self, began: float, workers: int) -> Result:
        """Wait for the first step of ``workers`` in a group that was not there at ``began``."""
        before = {step.group for step in self.steps() if step.time <= began}

        def after() -> list[Step]:
            return [step for step in self.steps() if step.group not in before]

        self._wait(lambda: any(step.workers == workers for step in after()), EVENT_SECONDS, f"{workers} workers")
        steps, later = self.steps(), after()
        full = next(step for step in later if step.workers == workers)
        repeated = 0
        for group in {step.group for step in later if step.time <= full.time}:
            made = [step for step in later if step.group == group]
            reached = max((step.step for step in steps if step.time < made[0].time), default=0)
            if group == full.group:  # it has only begun
                repeated += max(0, reached - full.step + 1)
            else:
                repeated += sum(step.step <= reached for step in made)
        return Result(full.time - began, later[0].time - began, repeated)

    def told(self) -> list[str]:
        """What our run has said of its workers since the last call."""
        lines = self.log.read_text().splitlines()
        new, self._told = lines[self._told :], len(lines)
        marks = ("after the last", "was interrupted", "will go soon")
        return [line for line in new if self.side == "ours" and any(mark in line for mark in marks)]

    def step_seconds(self, workers: int) -> float:
        """The median step of so many workers."""
        steps = [step for step in self.steps() if step.workers == workers]
        pairs = pairwise(steps)
        return statistics.median(b.time - a.time for a, b in pairs if (b.group, b.step) == (a.group, a.step + 1))

    def _wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        def done() -> bool:
            if self.driver.poll() is not None:
                raise RuntimeError(f"The run ended with {self.driver.poll()} while it was waited for {what}")
            return condition()

        wait_until(done, timeout_s, what)


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Raises TimeoutError, with ``what`` was waited for."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.05)


def measure_run(
    side: str, storage: Path, round_number: int, options: argparse.Namespace
) -> Iterator[tuple[str, Result]]:
    """One run of one side; yields every event with what came of it."""
    rank = round_number % 2
    with open_machines(2, own_cores=False) as machines:
        run = Run(side, storage, f"{side}-{round_number}", options.save_steps, machines.address)
        try:
            run.settle(2, options.settle_s)
            say(f"{side:8} round {round_number}: median step of two workers {run.step_seconds(2):.3f} s")
            if "worker" in options.events:
                pid, _ = run.worker(rank)
                began = time.monotonic()
                os.kill(pid, signal.SIGKILL)
                yield tell(run, "worker", round_number, run.measure(began, 2))
                run.settle(2, options.settle_s)
            if "partition" in options.events:
                node = machines.find(run.worker(rank)[1])
                began = time.monotonic()
                node.freeze()
                yield tell(run, "partition", round_number, run.measure(began, 1))
                node.kill()
                machines.add_node()
                run.settle(2, options.settle_s)
            node = machines.find(run.worker(rank)[1])
            began = time.monotonic()
            node.kill()
            yield tell(run, "node", round_number, run.measure(began, 1))
            if not {"arrival", "announced"} & set(options.events):
                return
            run.settle(1, options.settle_s)
            node = machines.add_node()
            yield tell(run, "arrival", round_number, run.measure(node.alive_at, 2))
            if "announced" not in options.events:
                return
            run.settle(2, options.settle_s)
            began = time.monotonic()
            node.drain(options.notice_s)
            timer = threading.Timer(options.notice_s, node.kill)
            timer.start()
            try:
                yield tell(run, "announced", round_number, run.measure(began, 1))
            finally:
                timer.cancel()
        except BaseException:
            say("\n".join(run.log.read_text().splitlines()[-15:]))
            raise
        finally:
            end(run.driver)


def tell(run: Run, event: str, round_number: int, result: Result) -> tuple[str, Result]:
    text = f"{run.side:8} round {round_number}: {event:9} {result.seconds:6.1f} s"
    if result.seconds - result.next_step_seconds > 1e-3:
        text += f" (a step of fewer after {result.next_step_seconds:.1f} s)"
    say(f"{text}, {result.steps_repeated} steps repeated")
    time.sleep(1)  # until the driver has said so
    for line in run.told():
        say(f"         | {line}")
    return event, result


def say(text: str) -> None:
    print(text, flush=True)


def summary(results: dict[str, dict[str, list[Result]]]) -> dict:
    """The figures of all rounds; None where nothing was measured."""

    def median(side: str, event: str, of: str) -> float | None:
        values = [getattr(result, of) for result in results[side][event]]
        return statistics.median(values) if values else None

    def ratio(event: str) -> float | None:
        ours, baseline = (median(side, event, "seconds") for side in SIDES)
        return ours / baseline if ours and baseline else None

    def most_repeated(event: str) -> int | None:
        return max((result.steps_repeated for result in results["ours"][event]), default=None)

    figures: dict = {
        "worker_ratio": ratio("worker"),
        "worker_steps_repeated": median("ours", "worker", "steps_repeated"),
        "partition_seconds": median("ours", "partition", "seconds"),
        "node_ratio": ratio("node"),
        "grow_ratio": ratio("arrival"),
        "grow_steps_repeated": most_repeated("arrival"),
        "announced_steps_repeated": most_repeated("announced"),
    }
    for side in SIDES:
        figures[side] = {
            event: {of: median(side, event, of) for of in ("seconds", "next_step_seconds", "steps_repeated")}
            | {"measured": len(results[side][event])}
            for event in EVENTS
        }
    return figures


def show(figures: dict) -> None:
    say(f"\n{'median':10} {'ours':>9} {'baseline':>9} {'ratio':>6}   steps repeated: {'ours':>4} {'baseline':>8}")
    for event in EVENTS:
        ours, baseline = (figures[side][event] for side in SIDES)
        cells = [
            f"{'-' if each['seconds'] is None else format(each['seconds'], '.1f'):>7} s" for each in (ours, baseline)
        ]
        both = ours["seconds"] and baseline["seconds"]
        ratio = f"{ours['seconds'] / baseline['seconds']:.2f}" if both else "-"
        repeated = [f"{'-' if each['steps_repeated'] is None else each['steps_repeated']}" for each in (ours, baseline)]
        say(f"{event:10} {cells[0]} {cells[1]} {ratio:>6}   {repeated[0]:>20} {repeated[1]:>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, by turns")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--events", nargs="+", choices=EVENTS, default=EVENTS, help="a node is lost in any case")
    parser.add_argument("--save-steps", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--settle-s", type=float, default=10, help="seconds at least between two events")
    parser.add_argument("--notice-s", type=float, default=30, help="seconds between the notice and the node's end")
    parser.add_argument("--logs", help="directory for the drivers' logs and notes; by default they are not kept")
    parser.add_argument("--train", nargs=2, metavar=("RECIPE", "NOTES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(*options.train)
        return
    results: dict[str, dict[str, list[Result]]] = {side: {event: [] for event in EVENTS} for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="recovery-", ignore_cleanup_errors=True) as folder:
        storage = Path(options.logs or folder).resolve()
        storage.mkdir(parents=True, exist_ok=True)
        write_texts(storage)
        for round_number in range(1, options.rounds + 1):
            for side in options.sides:
                try:
                    for event, result in measure_run(side, storage, round_number, options):
                        results[side][event].append(result)
                except (TimeoutError, RuntimeError) as error:  # the other runs still count
                    say(f"{side:8} round {round_number}: {error}")
    figures = summary(results)
    show(figures)
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
