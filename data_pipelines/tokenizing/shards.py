"""Shards: tokenized, packed and committed parts of an input file, each a pure function of its address.

A shard is addressed by a key, the hash of (content of the input file, format, tokenizer, packing), and a part: part p
holds the documents ``[p * documents_per_shard, (p + 1) * documents_per_shard)`` of the file.

    shards/KEY/00003.arrow   one Arrow record batch, uncompressed so that it can be memory-mapped, the rows of held-out
                             documents behind the others:
                             tokens: fixed_size_list<uint16 or uint32>[sequence_length], starts: list<int32>,
                             lengths: int32 (tokens before the padding);
                             trained: fixed_size_list<uint8>[sequence_length], if some tokens are not predicted
    shards/KEY/00003.json    the commit record, written after it
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_pipelines.sources.files import InputFile, layout
from data_pipelines.sources.rows import Part, document_groups, make_documents, read_parts
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from data_pipelines.tokenizing.best_fit import pack_best_fit
from data_pipelines.tokenizing.encoding import tokenize
from data_pipelines.tokenizing.held_out import held_out
from data_pipelines.tokenizing.packing import Packed, Ragged, pack_stream
from doge.common.storage import Storage, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT_VERSION = 2  # raise it when the same address would give other content


@dataclass(frozen=True)
class ShardRecord:
    """The commit record of a shard.

    Args:
        rows: number of sequences to train on.
        held_out_rows: number of sequences of held-out documents, behind those.
        tokens: tokens of all rows, without padding.
        documents: documents with text.
        bytes: size of the Arrow file.
        sha256: hash of the Arrow file.
        last: True if the input file ends with this part.
        end: offset in the input file at which the next part begins; 0 where that is found by the rows' numbers.
        skipped: what was left out first and why, if anything was.
        skipped_rows: number of rows that were left out; 0 if it was the rest of the input file.
    """

    rows: int
    held_out_rows: int
    tokens: int
    documents: int
    bytes: int
    sha256: str
    last: bool
    end: int = 0
    skipped: str | None = None
    skipped_rows: int = 0


def shard_key(recipe: DataRecipe, source: SourceRecipe, file: InputFile, tokenizer_fingerprint: str) -> str:
    """The key of all shards of a file. It does not depend on weights, seed or path."""
    address = {
        "version": FORMAT_VERSION,
        "content": file.identity,
        "layout": "".join(layout(file.path) or ("virtual",)),
        "format": source.format,
        "columns": source.reads,
        "tokenizer": tokenizer_fingerprint,
        "sequence_length": recipe.sequence_length,
        "documents_per_shard": recipe.documents_per_shard,
        "packing": recipe.packing,
        "held_out": [recipe.holds_out, source.group] if recipe.holds_out else 0.0,
    }
    return hashlib.sha256(json.dumps(address, sort_keys=True).encode()).hexdigest()[:32]


def shard_name(key: str, part: int) -> str:
    """Name of a shard's Arrow file in the storage."""
    return f"shards/{key}/{part:05d}.arrow"


def record_name(key: str, part: int) -> str:
    """Name of a shard's commit record in the storage."""
    return f"shards/{key}/{part:05d}.json"


def read_record(storage: Storage, key: str, part: int) -> ShardRecord | None:
    """Read the commit record of a shard; None if it is not committed."""
    try:
        return ShardRecord(**json.loads(storage.read_bytes(record_name(key, part))))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def read_shard_parts(
    storage: Storage, recipe: DataRecipe, source: SourceRecipe, file: InputFile, key: str, first: int
) -> Iterator[Part]:
    """Read the rows of a file's shards from part ``first`` on, each row once; see `rows.read_parts`.

    Reading begins where the record of the shard before says that it ends, or without one at the file's beginning.
    """
    before = read_record(storage, key, first - 1) if first else None
    offset = before.end if before else 0
    return read_parts(source, file, recipe.documents_per_shard, first, offset, recipe.skip_unreadable)


def make_shard(
    storage: Storage,
    recipe: DataRecipe,
    source: SourceRecipe,
    file: InputFile,
    key: str,
    part: Part,
    tokenizer: "PreTrainedTokenizerFast",
) -> ShardRecord:
    """Tokenize, pack and commit one shard.

    If the recipe skips what cannot be read, odd rows are left out, and a file that is damaged ends with a shard
    without rows.

    Raises:
        UserError: a row is not as its format needs it.
    """
    made = make_documents(source, file, part, recipe.skip_unreadable)
    ids = tokenize(tokenizer, made.documents)
    apart = held_out(document_groups(source, made), recipe.holds_out)
    training, kept = (pack(recipe, ids.chosen(mask), tokenizer) for mask in (~apart, apart))
    packed = training + kept
    committed: dict[str, Any] = {}

    def fill(path: str) -> None:
        write_arrow(path, packed)
        with open(path, "rb") as stream:
            committed["bytes"] = stream.seek(0, 2)
        committed["sha256"] = sha256(path)

    storage.write(shard_name(key, part.number), fill)
    record = ShardRecord(
        rows=len(training.tokens),
        held_out_rows=len(kept.tokens),
        tokens=int(packed.lengths.sum()),
        documents=int(np.count_nonzero(ids.lengths)),
        last=part.last,
        end=part.end,
        skipped=part.skipped or next(iter(made.skipped), None),
        skipped_rows=len(made.skipped),
        **committed,
    )
    storage.write_bytes(record_name(key, part.number), json.dumps(asdict(record)).encode())
    return record


def pack(recipe: DataRecipe, documents: Ragged, tokenizer: "PreTrainedTokenizerFast") -> Packed:
    """Pack documents into rows as the recipe says."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    how = (documents, recipe.sequence_length, pad, documents.values.dtype)
    return pack_stream(*how) if recipe.packing == "stream" else pack_best_fit(*how, tokenizer.bos_token_id)


def write_arrow(path: str, packed: Packed) -> None:
    """Write packed rows as an Arrow file that can be memory-mapped."""
    import pyarrow as pa

    tokens = pa.FixedSizeListArray.from_arrays(pa.array(packed.tokens.ravel()), packed.tokens.shape[1])
    starts = pa.ListArray.from_arrays(pa.array(packed.offsets), pa.array(packed.starts))
    columns = {"tokens": tokens, "starts": starts, "lengths": pa.array(packed.lengths)}
    if packed.trained is not None:
        columns["trained"] = pa.FixedSizeListArray.from_arrays(pa.array(packed.trained.ravel()), tokens.type.list_size)
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


class OpenShard(NamedTuple):
    """A memory-mapped shard: arrays as in `Packed`, read-only, valid while the shard is referenced."""

    tokens: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray | None

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray | None]:
        """Return (tokens, segment starts, number of tokens before padding, trained or None) of one sequence."""
        starts = self.starts[self.offsets[row] : self.offsets[row + 1]]
        trained = None if self.trained is None else self.trained[row]
        return self.tokens[row], starts, int(self.lengths[row]), trained


class Damaged(Exception):
    """A committed shard is missing or differs from its record."""


def open_shard(path: str, record: ShardRecord) -> OpenShard:
    """Memory-map a local shard after a check of its sha256. Raises Damaged if it is missing or differs."""
    import pyarrow as pa

    try:
        if sha256(path) != record.sha256:
            raise Damaged(path)
        batch = pa.ipc.open_file(pa.memory_map(path)).get_batch(0)
    except (OSError, pa.ArrowException) as error:
        raise Damaged(path) from error
    tokens, starts = batch.column("tokens"), batch.column("starts")
    width = tokens.type.list_size
    trained = None
    if "trained" in batch.schema.names:
        trained = batch.column("trained").flatten().to_numpy().reshape(-1, width)
    return OpenShard(
        tokens=tokens.flatten().to_numpy().reshape(-1, width),
        starts=starts.values.to_numpy(),
        offsets=starts.offsets.to_numpy(),
        lengths=batch.column("lengths").to_numpy(),
        trained=trained,
    )
