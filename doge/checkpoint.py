"""Checkpoints that know nothing of worker counts: full fp32 tensors by name, committed whole or not at all.

A checkpoint is a directory ``step-00000042`` that holds the tensors as safetensors, what else the run must remember as
JSON, and a manifest with every file's checksum. It appears by one rename; one whose manifest does not hold is never
read, and the one before it is taken.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from doge.engine import MOMENTS, TrainState
from doge.errors import UserError
from doge.storage import Storage, sha256

_MANIFEST, _STATE, _PARAMETERS = "manifest.json", "state.json", "parameters"


class Checkpoints:
    """The checkpoints of one run, written by one thread beside the training.

    Args:
        storage: where the run's checkpoint directories lie.
        keep: how many of the newest to keep.
    """

    def __init__(self, storage: Storage, keep: int = 2):
        self.storage = storage
        self._keep = keep
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def steps(self) -> list[int]:
        """Steps that have a directory, ascending; whether each is whole is only known by loading it."""
        return [int(name[5:]) for name in self.storage.names() if name.startswith("step-") and name[5:].isdigit()]

    def save(self, state: TrainState, memory: dict[str, Any], before_commit: Callable[[], None] = lambda: None) -> None:
        """Write ``state`` and JSON-able ``memory`` in the background; at most one write is under way.

        ``before_commit`` runs in the writing thread just before the checkpoint appears. An error of the write before
        is raised here, or by ``wait``.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, state, memory, before_commit)

    def check(self) -> None:
        """Raise now what a write that has ended raised."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return once nothing is being written. Raises what the write raised, UserError on a full disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> tuple[TrainState, dict[str, Any]] | None:
        """State and memory of the newest whole checkpoint, or None. Ones that were cut off are passed over."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except CorruptCheckpoint:
                continue
        return None

    def load(self, step: int) -> tuple[TrainState, dict[str, Any]]:
        """State and memory at ``step``. Raises CorruptCheckpoint."""
        return load_checkpoint(self.storage / _name(step))

    def _write(self, state: TrainState, memory: dict[str, Any], before_commit: Callable[[], None]) -> None:
        def fill(directory: str) -> None:
            folder = Path(directory)
            folder.mkdir()
            save_file(state.parameters, folder / f"{_PARAMETERS}.safetensors")
            for moment in MOMENTS:
                save_file(state.moments[moment], folder / f"{moment}.safetensors")
            (folder / _STATE).write_text(json.dumps({"step": state.step, "memory": memory}, indent=1))
            checksums = {file.name: sha256(str(file)) for file in sorted(folder.iterdir())}
            (folder / _MANIFEST).write_text(json.dumps(checksums, indent=1))
            before_commit()

        self.storage.sweep()
        self.storage.write(_name(state.step), fill)
        for step in self.steps()[: -self._keep]:
            self.storage.delete(_name(step))


class CorruptCheckpoint(UserError):
    """A checkpoint that was cut off or damaged."""


def load_checkpoint(storage: Storage) -> tuple[TrainState, dict[str, Any]]:
    """Read one checkpoint directory. Raises CorruptCheckpoint, or UserError if there is none."""
    names = storage.names()
    if not names:
        raise UserError(f"There is no checkpoint at {storage.root}: give the path of a step-… directory.")
    damaged = CorruptCheckpoint(f"The checkpoint {storage.root} is incomplete or damaged: take an earlier one.")
    if _MANIFEST not in names:
        raise damaged
    try:
        checksums = json.loads(storage.read_bytes(_MANIFEST))
        if any(sha256(storage.local(name)) != checksum for name, checksum in checksums.items()):
            raise damaged
        state = json.loads(storage.read_bytes(_STATE))
        parameters = load_file(storage.local(f"{_PARAMETERS}.safetensors"))
        moments = {moment: load_file(storage.local(f"{moment}.safetensors")) for moment in MOMENTS}
    except (FileNotFoundError, ValueError, KeyError):
        raise damaged from None
    return TrainState(state["step"], parameters, moments), state["memory"]


def _name(step: int) -> str:
    return f"step-{step:08d}"
