"""Checkpoints that know nothing of worker counts: full fp32 tensors by name, committed whole or not at all.

A checkpoint is a directory ``step-00000042`` that holds the tensors as safetensors, what else the run must remember as
JSON, and a manifest with every file's checksum. It appears by one rename; one whose manifest does not hold is never
read, and the one before it is taken.

An object store has no renames. There the files of every attempt lie in a folder of their own below the checkpoint's, so
that those of two writers never mix, and the manifest, which comes last and alone, names them.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from doge.common.errors import UserError
from doge.common.storage import Storage, StorageError, sha256
from doge.common.words import count
from doge.training.state.run_position import RunPosition
from doge.training.state.train_state import MOMENTS, TrainState

_MANIFEST, _STATE, _PARAMETERS = "manifest.json", "state.json", "parameters"
GRACE_SECONDS = 2.0  # that a healthy write gets before a newer state may replace those that wait
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 1.0, 30.0  # between two attempts

Checkpoint = tuple[TrainState, RunPosition]
Loaded = TypeVar("Loaded")


class Checkpoints:
    """The checkpoints of one run, written by one thread beside the training.

    A storage that fails is tried again, with growing pauses, until it is back: training goes on meanwhile, and the
    newest state takes the place of an older one that is still unwritten.

    Args:
        storage: where the run's checkpoint directories lie.
        keep: how many of the newest to keep.
        say: is called, from the writing thread, with a sentence when the storage begins to fail and when it is back.
    """

    def __init__(self, storage: Storage, keep: int = 2, say: Callable[[str], None] = lambda message: None):
        self.storage = storage
        self.committed: int | None = None  # the newest step that this object committed
        self.attempts = 0  # to write one, so far
        self._keep, self._say = keep, say
        self._changed = threading.Condition()
        self._next: _Order | None = None  # to be written as soon as the writer is free
        self._writing: _Order | None = None
        self._warned = False  # that a second writer is not refused
        self._trouble: Exception | None = None  # why the storage fails, while it does
        self._error: BaseException | None = None  # what ended the writing, until it is raised

    def steps(self) -> list[int]:
        """Steps that have a directory, ascending; whether each is whole is only known by loading it."""
        return [int(name[5:]) for name in self.storage.names() if name.startswith("step-") and name[5:].isdigit()]

    def save(
        self,
        state: TrainState,
        position: RunPosition,
        before_commit: Callable[[], None] = lambda: None,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        """Write ``state`` and ``position`` in the background; they must not change any more.

        A write that is under way gets two seconds to end, so that a small run skips none of its checkpoints; beyond
        that, or where the storage fails, the state waits for its turn and replaces one that waited.

        ``before_write`` runs in the writing thread before the storage is touched, and ``before_commit`` just before
        the checkpoint appears, when all its files are where they belong. Where one of them raises Superseded, the state
        is dropped without a word. What else they raise, other than a StorageError, ends the writing, and is raised
        here, by ``check`` or ``wait``, once.
        """
        with self._changed:
            if self._trouble is None:
                self._changed.wait_for(lambda: self._is_idle() or self._trouble is not None, GRACE_SECONDS)
            self._raise()
            self._next = _Order(state, position, before_commit, before_write)
            if self._writing is None:
                self._writing, self._next = self._next, None
                threading.Thread(target=self._work, name="checkpoint", daemon=True).start()

    def has(self, step: int) -> bool:
        """Whether this object committed ``step`` last, or is about to."""
        with self._changed:
            steps = [order.state.step for order in (self._writing, self._next) if order is not None]
            return step in (self.committed, *steps)

    def check(self) -> None:
        """Raise now what ended the writing. A storage that fails is no such thing: it is tried again."""
        with self._changed:
            self._raise()

    def wait(self, timeout: float = 600.0) -> None:
        """Return once everything is written; a storage that fails is tried again for ``timeout`` seconds.

        Raises what ended the writing, and UserError when the newest state is still unwritten after that time.
        """
        with self._changed:
            self._changed.wait_for(self._is_idle, timeout)
            self._raise()
            if self._writing is not None:
                step = (self._next or self._writing).state.step
                reason = _reason(self._trouble) if self._trouble else "its storage does not answer"
                kept = "nothing was committed before" if self.committed is None else f"step {self.committed:,} is kept"
                raise UserError(
                    f"The checkpoint of step {step:,} could not be written for {timeout:,.0f} s ({reason}; {kept}): "
                    "mend the storage and run the same command again."
                )

    def latest(self) -> Checkpoint | None:
        """State and position of the newest whole checkpoint; None where there never was one.

        Ones that were cut off are passed over. Raises UserError where none is whole: to begin anew then would lose the
        run without a word.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.load(step)
            except CorruptCheckpoint:
                continue
        if steps:
            raise UserError(
                f"No checkpoint in {self.storage.root} can be read ({count(len(steps), 'damaged one')}): bring one "
                "back, or remove that directory to begin anew."
            )
        return None

    def load(self, step: int) -> Checkpoint:
        """State and position at ``step``. Raises CorruptCheckpoint."""
        return load_checkpoint(self.storage / _name(step))

    def _is_idle(self) -> bool:
        return self._writing is None

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        """The writing thread: ends when nothing is left to write."""
        pause, failed_since, attempts = FIRST_PAUSE_SECONDS, 0.0, 0
        while self._writing is not None:
            order, trouble, error, dropped = self._writing, None, None, False
            self.attempts += 1
            try:
                self._write(order)
            except Superseded:
                dropped = True
            except BaseException as raised:
                if order.refused or not isinstance(raised, (StorageError, OSError, SafetensorError)):
                    error = raised
                else:
                    trouble = raised
            if trouble is not None:
                attempts += 1
                if attempts == 1:
                    failed_since = time.monotonic()
                    self._tell(
                        f"The checkpoint of step {order.state.step:,} cannot be written ({_reason(trouble)}): training "
                        "goes on and it is tried again until it can."
                    )
                with self._changed:
                    self._trouble = trouble
                    self._changed.notify_all()
                time.sleep(pause)
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
            elif attempts and error is None:
                self._tell(
                    f"The checkpoint of step {order.state.step:,} is written: the storage is back after "
                    f"{time.monotonic() - failed_since:,.0f} s and {attempts} failed attempts."
                )
                pause, attempts = FIRST_PAUSE_SECONDS, 0
            with self._changed:
                if trouble is None:
                    self._trouble, self._error = None, error
                    if error is None and not dropped:
                        self.committed = order.state.step
                    self._writing = None
                if error is not None:
                    self._next = None
                elif self._next is not None:
                    self._writing, self._next = self._next, None
                self._changed.notify_all()

    def _tell(self, message: str) -> None:
        with suppress(Exception):  # nobody listens any more
            self._say(message)

    def _write(self, order: "_Order") -> None:
        step = order.state.step
        order.check(order.before_write)
        self.storage.sweep()
        if self.storage.has_renames:
            self.storage.write(_name(step), order.fill, lambda: order.check(order.before_commit))
        else:
            self._upload(order)
        with suppress(StorageError, OSError):  # they go with the next one
            for outlived in self._outlived(step):
                self.storage.delete(_name(outlived))

    def _upload(self, order: "_Order") -> None:
        """Write a checkpoint where there are no renames."""
        directory = self.storage / _name(order.state.step)
        before = _read_manifest(directory)  # of a damaged checkpoint, say
        folder, files = uuid.uuid4().hex[:16], {}

        def fill(path: str) -> None:
            order.fill(path)
            manifest = Path(path, _MANIFEST)
            files.update(json.loads(manifest.read_bytes()))
            manifest.unlink()

        try:
            directory.write(folder, fill)
            order.check(order.before_commit)
            if before is not None and _read_manifest(directory) != before:
                raise Superseded
            manifest = json.dumps({f"{folder}/{name}": checksum for name, checksum in files.items()}, indent=1).encode()
        except BaseException:
            with suppress(Exception):
                directory.delete(folder)
            raise
        if before is not None:
            directory.write_bytes(_MANIFEST, manifest)
            return
        try:
            refuses = directory.create(_MANIFEST, manifest)
        except FileExistsError:  # another writer's, or ours whose answer was lost
            if _read_manifest(directory) == manifest:
                return
            with suppress(Exception):
                directory.delete(folder)
            raise Superseded from None
        if not refuses and not self._warned:
            self._warned = True
            self._tell(
                f"The storage {self.storage.root} cannot refuse a second writer of a checkpoint: end a process of this "
                "run that was stopped, instead of letting it go on."
            )

    def _outlived(self, newest: int) -> list[int]:
        """Steps up to the newest whose directories may go: torn ones, and all but the newest whole ones."""
        steps = [step for step in self.steps() if step <= newest]
        whole = [step for step in steps if self.storage.exists(f"{_name(step)}/{_MANIFEST}")]
        return [step for step in steps if step not in whole[-self._keep :]]


@dataclass
class _Order:
    state: TrainState
    position: RunPosition
    before_commit: Callable[[], None]
    before_write: Callable[[], None]
    refused: bool = False  # by one of them

    def fill(self, directory: str) -> None:
        """Write the checkpoint's files."""
        folder, state = Path(directory), self.state
        folder.mkdir()
        save_file(state.parameters, folder / f"{_PARAMETERS}.safetensors")
        for moment in MOMENTS:
            save_file(state.moments[moment], folder / f"{moment}.safetensors")
        (folder / _STATE).write_text(json.dumps({"step": state.step, "memory": self.position.to_dict()}, indent=1))
        checksums = {file.name: sha256(str(file)) for file in sorted(folder.iterdir())}
        (folder / _MANIFEST).write_text(json.dumps(checksums, indent=1))

    def check(self, whether: Callable[[], None]) -> None:
        try:
            whether()
        except StorageError:
            raise
        except BaseException:
            self.refused = True
            raise


class Superseded(Exception):
    """Others have gone on from a newer state, and publish checkpoints: this writer's would only be in their way."""


class CorruptCheckpoint(UserError):
    """A checkpoint that was cut off or damaged."""


def load_checkpoint(storage: Storage) -> Checkpoint:
    """Read one checkpoint directory. Raises CorruptCheckpoint, or UserError if there is none."""
    names = storage.names()
    if not names:
        raise UserError(f"There is no checkpoint at {storage.root}: give the path of a step-… directory.")
    damaged = CorruptCheckpoint(f"The checkpoint {storage.root} is incomplete or damaged: take an earlier one.")
    if _MANIFEST not in names:
        raise damaged

    def read(name: str, load: Callable[[str], Loaded]) -> Loaded:
        """Load a file; a copy in the cache that is damaged, or of an earlier file, is fetched again."""
        stored, checksum = files[name]
        for again in (False, True):
            with storage.reading(stored, again) as path:
                if sha256(path) == checksum:
                    return load(path)  # out of the page cache, right after hashing
            if storage.is_local:
                break
        raise damaged

    try:
        checksums = json.loads(storage.read_bytes(_MANIFEST))
        files = {stored.rpartition("/")[2]: (stored, checksum) for stored, checksum in checksums.items()}
        values = json.loads(read(_STATE, lambda path: Path(path).read_bytes()))
        step, position = values["step"], RunPosition.from_dict(values["memory"])
        with ThreadPoolExecutor(len(MOMENTS) + 1) as pool:
            names = [f"{name}.safetensors" for name in (_PARAMETERS, *MOMENTS)]
            parameters, *moments = pool.map(lambda name: read(name, load_file), names)
    except (FileNotFoundError, ValueError, KeyError, SafetensorError):
        raise damaged from None
    return TrainState(step, parameters, dict(zip(MOMENTS, moments, strict=True))), position


def _read_manifest(checkpoint: Storage) -> bytes | None:
    try:
        return checkpoint.read_bytes(_MANIFEST)
    except FileNotFoundError:
        return None


def _reason(error: Exception) -> str:
    """An error's sentence without its full stop, to be put in another."""
    return str(error).rstrip(".")


def _name(step: int) -> str:
    return f"step-{step:08d}"
