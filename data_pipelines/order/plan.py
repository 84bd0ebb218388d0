"""A plan: the recipe with its inputs listed and its tokenizer made; all that the order of the data depends on.

The driver makes it once and keeps it in the storage; whoever reads opens it by its fingerprint and lists nothing.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.order.order import Order, file_order, mixture_units
from data_pipelines.sources.files import DataRecipe, InputFile, documents, list_files, read_rows
from data_pipelines.tokenizing.shards import ShardRecord, make_shard, read_record, shard_key, shard_name
from doge.common import config_tree as recipes
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.tokenizer.loading import fingerprint, load_tokenizer
from doge.tokenizer.training import TokenizerRecipe, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Plan:
    """What to prepare and in which order to read it.

    Args:
        recipe: of the data; its sources' paths are not needed any more once all shards are committed.
        tokenizer: directory in the storage.
        tokenizer_fingerprint: of that tokenizer.
        files: of each source, in the order in which they are used.
    """

    recipe: DataRecipe
    tokenizer: str
    tokenizer_fingerprint: str
    files: dict[str, list[InputFile]]

    @cached_property
    def units(self) -> dict[str, int]:
        """Slots of each source among the mixture's 1,000."""
        return mixture_units({name: source.weight for name, source in self.recipe.sources.items()})

    @cached_property
    def keys(self) -> dict[str, list[str]]:
        """Shard key of each file of each source."""
        return {
            name: [
                shard_key(self.recipe, self.recipe.sources[name], file, self.tokenizer_fingerprint) for file in files
            ]
            for name, files in self.files.items()
        }

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of everything that the samples of a step depend on: equal fingerprints, equal order."""
        recipe = self.recipe
        parts = [self.units, self.keys, recipe.seed, recipe.held_out_sequences, recipe.files_per_stripe]
        parts.append(recipe.skip_unreadable)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def order(self, catalog: "Catalog") -> Order:
        """The order of the sequences, as far as ``catalog`` knows the shards."""
        counts = {name: len(files) for name, files in self.files.items()}
        recipe = self.recipe
        return Order(self.units, counts, recipe.seed, recipe.held_out_sequences, recipe.files_per_stripe, catalog)

    def open_tokenizer(self, storage: Storage) -> "PreTrainedTokenizerFast":
        """The tokenizer that the sequences are made with."""
        return _open_stored_tokenizer(storage, self.tokenizer)

    def make_shard(
        self, storage: Storage, source: str, file: int, part: int, tokenizer: "PreTrainedTokenizerFast"
    ) -> ShardRecord | None:
        """Make and commit one shard; see `shards.make_shard`."""
        key = self.keys[source][file]
        inputs = (self.recipe, self.recipe.sources[source], self.files[source][file])
        return make_shard(storage, *inputs, key, part, tokenizer)


def make_plan(
    recipe: DataRecipe,
    tokenizer: TokenizerRecipe,
    storage: Storage,
    report: Callable[[str], None] = lambda message: None,
) -> Plan:
    """List the inputs, open or train the tokenizer, and commit the plan under ``plans/FINGERPRINT.json``.

    Args:
        recipe: what to read.
        tokenizer: which to use; one is trained when its path is None, once for the same inputs.
        storage: of the run, or shared by several: shards, tokenizers and plans of different recipes lie side by side.
        report: is called with a sentence before anything that takes long.

    Raises:
        UserError: a source or the tokenizer cannot be reached.
    """
    mixture_units({name: source.weight for name, source in recipe.sources.items()})  # weights are wrong before I/O is
    files = {name: list_files(name, recipe.sources[name]) for name in sorted(recipe.sources)}
    directory, digest = _store_tokenizer(recipe, tokenizer, files, storage, report)
    plan = Plan(recipe, directory, digest, {name: _in_order(name, files[name], recipe.seed) for name in files})
    content = json.dumps(recipes.to_dict(plan)).encode()
    storage.write_bytes(f"plans/{plan.fingerprint}.json", content)
    return plan


def load_plan(storage: Storage, fingerprint: str) -> Plan:
    """The plan that was committed under its fingerprint. Raises UserError when there is none."""
    try:
        content = storage.read_bytes(f"plans/{fingerprint}.json")
    except FileNotFoundError:
        raise UserError(
            f"{storage.root} holds no data plan {fingerprint}: was it prepared under another root?"
        ) from None
    return recipes.from_dict(Plan, json.loads(content))


def _in_order(source: str, files: list[InputFile], seed: int) -> list[InputFile]:
    return [files[at] for at in file_order(len(files), seed, source)]


class Catalog:
    """What is committed of a plan's shards: ``catalog(source, file, part)`` is a record or None.

    Records never change, so each is read once. A snapshot of all of them, which `save` leaves behind now and then,
    spares a reader thousands of small reads.

    Args:
        check_sizes: treat a shard that is missing or has the wrong size as not committed (local storage only).
    """

    def __init__(self, plan: Plan, storage: Storage, check_sizes: bool = False):
        self._plan, self._storage, self._check = plan, storage, check_sizes and storage.is_local
        self._records: dict[tuple[str, int, int], ShardRecord] = {}
        self._snapshot = f"plans/{plan.fingerprint}.shards.json"
        if not self._check:
            self._load()

    def __call__(self, source: str, file: int, part: int) -> ShardRecord | None:
        address = (source, file, part)
        if address not in self._records:
            key = self._plan.keys[source][file]
            record = read_record(self._storage, key, part)
            if record is None or (self._check and not self._is_whole(key, part, record)):
                return None
            if record.skipped and not self._plan.recipe.skip_unreadable:
                return None
            self._records[address] = record
        return self._records[address]

    def records(self, source: str) -> dict[tuple[int, int], ShardRecord]:
        """By (file, part), those of ``source`` that have been asked for."""
        return {address[1:]: record for address, record in self._records.items() if address[0] == source}

    def save(self) -> None:
        content = [[*address, *vars(record).values()] for address, record in self._records.items()]
        self._storage.write_bytes(self._snapshot, json.dumps(content).encode())

    def _load(self) -> None:
        try:
            content = json.loads(self._storage.read_bytes(self._snapshot))
        except (FileNotFoundError, json.JSONDecodeError):
            return
        for source, file, part, *values in content:
            self._records[source, file, part] = ShardRecord(*values)

    def _is_whole(self, key: str, part: int, record: ShardRecord) -> bool:
        try:
            return self._storage.size(shard_name(key, part)) == record.bytes
        except FileNotFoundError:
            return False


def _store_tokenizer(
    recipe: DataRecipe,
    wanted: TokenizerRecipe,
    files: dict[str, list[InputFile]],
    storage: Storage,
    report: Callable[[str], None],
) -> tuple[str, str]:
    """Directory and fingerprint of the tokenizer in the storage, put there if it was not."""
    if wanted.path is None:
        # No weights and no seed: another mixture of the same sources keeps the tokenizer, and so every shard.
        inputs = [
            [
                (name, recipe.sources[name].columns, [file.identity for file in listed])
                for name, listed in files.items()
            ],
            [wanted.vocab_size, wanted.training_bytes],
        ]
        name = "tokenizers/trained-" + hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
        try:
            return name, storage.read_bytes(f"{name}.sha256").decode()
        except FileNotFoundError:
            report(
                f"Training a tokenizer of {wanted.vocab_size:,} ids on {wanted.training_bytes / 1e6:,.0f} MB of text."
            )
            tokenizer = train_tokenizer(_training_texts(recipe, wanted, files), wanted.vocab_size)
    else:
        tokenizer = load_tokenizer(wanted.path)
        name = f"tokenizers/given-{fingerprint(tokenizer)[:16]}"
    conversations = [key for key, source in recipe.sources.items() if source.format == "conversation"]
    if conversations and not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer {wanted.path!r} has no chat template, which the source {conversations[0]!r} needs: set "
            f"data.sources.{conversations[0]}.format to text or choose another tokenizer."
        )
    if not storage.exists(f"{name}.sha256"):
        storage.write(name, tokenizer.save_pretrained)
        tokenizer = _open_stored_tokenizer(storage, name)  # the fingerprint is of what everybody opens
        storage.write_bytes(f"{name}.sha256", fingerprint(tokenizer).encode())
    return name, storage.read_bytes(f"{name}.sha256").decode()


def _open_stored_tokenizer(storage: Storage, name: str) -> "PreTrainedTokenizerFast":
    if storage.is_local:
        return load_tokenizer(storage.path(name))
    with tempfile.TemporaryDirectory() as folder:
        for file in storage.names(name):
            Path(os.path.join(folder, file)).write_bytes(storage.read_bytes(f"{name}/{file}"))
        return load_tokenizer(folder)


def _training_texts(recipe: DataRecipe, wanted: TokenizerRecipe, files: dict[str, list[InputFile]]) -> Iterator[str]:
    """The first documents of every source, equal bytes of each, in an order of the files that no seed changes."""
    at_a_time = 1000
    for name, listed in files.items():
        source, left = recipe.sources[name], wanted.training_bytes // len(files)
        for file in _in_order(name, listed, seed=0):
            start, rows = 0, None
            while left > 0 and (rows is None or len(rows) == at_a_time):
                rows = read_rows(source, file, start, start + at_a_time)
                for document in documents(source, rows):
                    for text in document if isinstance(document, tuple) else (document,):
                        left -= len(text.encode("utf-8", "ignore"))
                        yield text
                    if left <= 0:
                        break
                start += at_a_time
            if left <= 0:
                break
