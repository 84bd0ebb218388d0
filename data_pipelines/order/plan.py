"""A plan: the recipe with its inputs listed and its tokenizer made; all that the order of the data depends on.

The driver makes it once and keeps it in the storage. Readers open it by its fingerprint and list nothing.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from data_pipelines.order.mixture import mixture_units
from data_pipelines.order.order import FindShard, Order
from data_pipelines.order.permutation import file_order
from data_pipelines.order.tokenizer_store import open_stored_tokenizer, store_tokenizer
from data_pipelines.sources.files import InputFile, list_files
from data_pipelines.sources.rows import Part
from data_pipelines.sources.source_recipe import DataRecipe
from data_pipelines.tokenizing.shards import ShardRecord, make_shard, read_shard_parts, shard_key
from doge.common.config_tree import from_dict, to_dict
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.tokenizer.training import TokenizerRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Plan:
    """What to prepare and in which order to read it.

    Args:
        recipe: recipe of the data; the paths in it are no longer needed once all shards are committed.
        tokenizer: directory of the tokenizer in the storage.
        tokenizer_fingerprint: fingerprint of that tokenizer.
        files: files of each source, in the order in which they are used.
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

    def order(self, find_shard: FindShard) -> Order:
        """The order of the sequences, as far as ``find_shard`` knows the shards."""
        counts = {name: len(files) for name, files in self.files.items()}
        recipe = self.recipe
        return Order(self.units, counts, recipe.seed, recipe.held_out_sequences, recipe.files_per_stripe, find_shard)

    def open_tokenizer(self, storage: Storage) -> "PreTrainedTokenizerFast":
        """Open the tokenizer that the sequences are made with."""
        return open_stored_tokenizer(storage, self.tokenizer)

    def read_parts(self, storage: Storage, source: str, file: int, first: int) -> Iterator[Part]:
        """Read the rows of a file's shards from part ``first`` on; see `shards.read_shard_parts`."""
        inputs = (self.recipe, self.recipe.sources[source], self.files[source][file])
        return read_shard_parts(storage, *inputs, self.keys[source][file], first)

    def commit_part(
        self, storage: Storage, source: str, file: int, part: Part, tokenizer: "PreTrainedTokenizerFast"
    ) -> ShardRecord:
        """Make and commit the shard of rows that have been read; see `shards.make_shard`."""
        inputs = (self.recipe, self.recipe.sources[source], self.files[source][file])
        return make_shard(storage, *inputs, self.keys[source][file], part, tokenizer)

    def make_shard(
        self, storage: Storage, source: str, file: int, part: int, tokenizer: "PreTrainedTokenizerFast"
    ) -> ShardRecord | None:
        """Read one part of a file, make and commit its shard; None if the file ends before it."""
        read = next(self.read_parts(storage, source, file, part), None)
        return None if read is None else self.commit_part(storage, source, file, read, tokenizer)


def make_plan(
    recipe: DataRecipe,
    tokenizer: TokenizerRecipe,
    storage: Storage,
    report: Callable[[str], None] = lambda message: None,
) -> Plan:
    """List the inputs, open or train the tokenizer, and commit the plan under ``plans/FINGERPRINT.json``.

    Args:
        recipe: recipe of the data.
        tokenizer: the tokenizer to use; where its path is None one is trained, once for the same inputs.
        storage: keeps plans, tokenizers and shards; different recipes may share one.
        report: called with a sentence before anything that takes long.

    Raises:
        UserError: a source or the tokenizer cannot be reached.
    """
    mixture_units({name: source.weight for name, source in recipe.sources.items()})  # weights are wrong before I/O is
    files = {name: list_files(name, recipe.sources[name]) for name in sorted(recipe.sources)}
    directory, digest = store_tokenizer(recipe, tokenizer, files, storage, report)
    plan = Plan(recipe, directory, digest, {name: _in_order(name, files[name], recipe.seed) for name in files})
    storage.write_bytes(f"plans/{plan.fingerprint}.json", json.dumps(to_dict(plan)).encode())
    return plan


def load_plan(storage: Storage, fingerprint: str) -> Plan:
    """Open the plan that was committed under its fingerprint.

    Raises:
        UserError: there is none, or another version of this project made it, whose shards are not those of this one.
    """
    try:
        content = storage.read_bytes(f"plans/{fingerprint}.json")
    except FileNotFoundError:
        raise UserError(
            f"{storage.root} holds no data plan {fingerprint}: set --storage to the root it was prepared under."
        ) from None
    plan: Plan | None = None
    with suppress(UserError):  # a key that recipes have no more, or a value that they do not take
        plan = from_dict(Plan, json.loads(content))
    if plan is None or plan.fingerprint != fingerprint:
        raise UserError(
            f"The data plan {fingerprint} in {storage.root} is of another version of this project, which orders or "
            "packs the data otherwise: resume the run with that version, or choose another --name, and --from one of "
            "its checkpoints to train on with the data of this version."
        )
    return plan


def _in_order(source: str, files: list[InputFile], seed: int) -> list[InputFile]:
    return [files[at] for at in file_order(len(files), seed, source)]
