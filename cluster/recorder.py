"""What the driver does with all that the workers tell: the console, MLflow, the recorded samples, the ledger."""

import json
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.board import Post
from cluster.console import Console
from cluster.ledger import Ledger
from cluster.recipe import Recipe
from doge.errors import UserError
from doge.storage import Storage
from doge.tracking import Tracker

POLL_SECONDS = 0.25
WAIT_MESSAGE_SECONDS = 60
LEDGER_SECONDS = 30  # between two writes of the ledger


class Recorder:
    """Takes the workers' posts from the board and deals with them: the console, MLflow, the recorded samples."""

    def __init__(self, recipe: Recipe, board, directory: Storage, tracker: Tracker, console: Console):
        self.over = False
        self._recipe = recipe
        self._board, self._directory, self._tracker, self._console = board, directory, tracker, console
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._done = threading.Event()
        self._membership: dict[str, Any] = {}
        self._started: dict[int, dict[str, Any]] = {}  # what its members said, by rank

        self._ledger_written = time.monotonic()
        self.ledger = self._open_ledger()
        self.ledger.begin(time.monotonic())

    def __enter__(self) -> "Recorder":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        self.ledger.close(time.monotonic())
        self._write_ledger()

    def report(self, step: int) -> list[tuple[str, str]]:
        """The ledger's figures as labelled lines, after they went to MLflow and the timeline was drawn."""
        from doge.plots import plot_timeline

        figures = self.ledger.figures(self._recipe.ledger)
        self._tracker.log_metrics([{"step": step} | figures.metrics()])
        with tempfile.TemporaryDirectory() as folder:
            plot = Path(folder, "timeline.png")
            plot_timeline(plot, self.ledger.timeline(), self._recipe.name)
            self._directory.write_bytes("timeline.png", plot.read_bytes())
            self._tracker.log_artifact(plot)
        return [*figures.rows(), ("timeline", self._directory.path("timeline.png"))]

    def _open_ledger(self) -> Ledger:
        """The run's ledger, which an earlier driver may have begun."""
        training, length = self._recipe.training, self._recipe.data.sequence_length
        with suppress(
            FileNotFoundError, ValueError, KeyError, TypeError
        ):  # a ledger that does not read is not worth a run
            ledger = Ledger.from_dict(json.loads(self._directory.read_bytes("ledger.json")))
            if ledger.tokens_per_step == training.global_batch_size * length:
                return ledger
        return Ledger(training.global_batch_size * length, length)

    def _write_ledger(self) -> None:
        self._ledger_written = time.monotonic()
        with suppress(UserError):  # the next time
            self._directory.write_bytes("ledger.json", json.dumps(self.ledger.to_dict()).encode())

    def _work(self) -> None:
        import ray

        handled, last, started, told = 0, False, time.monotonic(), False
        while not last:
            last = self._done.wait(POLL_SECONDS)
            if not (handled or told) and time.monotonic() - started > WAIT_MESSAGE_SECONDS:
                told = True
                self._console.say("Waiting for the cluster to have room for the workers, and for them to start.")
            posts = ray.get(self._board.take.remote(handled))
            try:
                self._handle(posts)
            except Exception as error:  # the run must not train on unrecorded, nor wait for a recorder that is gone
                reason = str(error) if isinstance(error, UserError) else f"Recording the run failed: {error!r}."
                ray.get(self._board.stop.remote(reason, unrecorded=True))
                self._handle = lambda posts: None  # what follows a gap must not be recorded
            handled += len(posts)
        ray.get(self._board.take.remote(handled))

    def _handle(self, posts: list[Post]) -> None:
        rows = []
        for post in posts:
            if post.kind in ("step", "evaluation", "experts"):
                rows.append({k: v for k, v in post.content.items() if k != "held_out_tokens"})
            if post.kind == "step":
                self._console.step(post.content)
            elif post.kind == "evaluation":
                self._console.say(f"step {post.content['step']:,}  held-out loss {post.content['held_out_loss']:.4f}")
            elif post.kind == "samples":
                self._write_samples(*post.content)
            elif post.kind == "membership":
                self._membership, self._started = post.content, {}
                self.ledger.membership(post.content["number"], post.content["from_step"], post.content["at"])
            elif post.kind == "joined":
                self.ledger.joined(*post.content)
            elif post.kind == "left":
                self.ledger.left(*post.content)
            elif post.kind == "ledger":
                self.ledger.record(post.content)
            elif post.kind == "member":
                self._tell_member(post.content)
            elif post.kind == "message":
                self._console.say(post.content)
        self._tracker.log_metrics(rows)
        if time.monotonic() - self._ledger_written > LEDGER_SECONDS:
            self._write_ledger()

    def _write_samples(self, step: int, first: int, samples: list[tuple]) -> None:
        """One file a step and share, from sequence number to place; a repeated step writes the same again."""
        content = {first + at: sample for at, sample in enumerate(samples)}
        self._directory.write_bytes(f"samples/step-{step:08d}-{first:012d}.json", json.dumps(content).encode())

    def _tell_member(self, member: dict[str, Any]) -> None:
        """Once every member has made its first step, say who they are and what it took."""
        membership = self._membership
        if member["membership"] != membership.get("number"):
            return
        self._started[member["rank"]] = member
        if len(self._started) < membership["world_size"]:
            return
        members = [self._started[rank] for rank in range(len(self._started))]
        counted = Counter(m["device"] for m in members)
        devices = ", ".join(f"{number} × {device}" if number > 1 else device for device, number in counted.items())
        text = f"{_count(len(members), 'worker')} on {devices}, {member['precision']}"
        if len(members) > 1:
            text += f", sharing {' + '.join(str(m['share']) for m in members)} sequences a step"
        text += f", from step {member['step']:,}"
        if repeated := membership["reached"] - member["step"]:
            text += f", repeating {_count(repeated, 'step')}"
        if membership["lost_s"] is not None:
            parts = {"regrouping": membership["lost_s"] + membership["formed_s"]}
            for name in members[0]["seconds"]:
                parts[name] = max(m["seconds"][name] for m in members)
            text += f", {sum(parts.values()):.1f} s after the last ("
            text += ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items()) + ")"
        self._console.say(f"{text}.")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
