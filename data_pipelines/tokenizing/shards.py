"""Shards: tokenized, packed and committed parts of an input file, each a pure function of its address.

A shard is addressed by a key, the hash of (content of the input file, format, tokenizer, packing), and a part: part p
holds the documents ``[p * documents_per_shard, (p + 1) * documents_per_shard)`` of the file.

    shards/KEY/00003.arrow   one Arrow record batch, uncompressed so that it can be memory-mapped:
                             tokens: fixed_size_list<uint16 or uint32>[sequence_length], starts: list<int32>;
                             trained: fixed_size_list<uint8>[sequence_length], if some tokens are not predicted
    shards/KEY/00003.json    the commit record, written after it
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_pipelines.sources.files import SUFFIXES, InputFile
from data_pipelines.sources.rows import Unreadable, make_documents, read_rows
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from data_pipelines.tokenizing.encoding import tokenize
from data_pipelines.tokenizing.packing import Packed, pack, token_dtype
from doge.common.storage import Storage, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT_VERSION = 1  # raise it when the same address would give other content


@dataclass(frozen=True)
class ShardRecord:
    """The commit record of a shard.

    Args:
        rows: number of sequences.
        tokens: tokens of all documents, without the last row's padding.
        documents: documents with text.
        bytes: size of the Arrow file.
        sha256: hash of the Arrow file.
        last: True if the input file ends with this part.
        skipped: the reason why the input file was left out, if it was.
    """

    rows: int
    tokens: int
    documents: int
    bytes: int
    sha256: str
    last: bool
    skipped: str | None = None


def shard_key(recipe: DataRecipe, source: SourceRecipe, file: InputFile, tokenizer_fingerprint: str) -> str:
    """The key of all shards of a file. It does not depend on weights, seed or path."""
    address = {
        "version": FORMAT_VERSION,
        "content": file.identity,
        "layout": next((suffix for suffix in SUFFIXES if file.path.endswith(suffix)), "virtual"),
        "format": source.format,
        "columns": source.reads,
        "tokenizer": tokenizer_fingerprint,
        "sequence_length": recipe.sequence_length,
        "documents_per_shard": recipe.documents_per_shard,
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


def make_shard(
    storage: Storage,
    recipe: DataRecipe,
    source: SourceRecipe,
    file: InputFile,
    key: str,
    part: int,
    tokenizer: "PreTrainedTokenizerFast",
) -> ShardRecord | None:
    """Read, tokenize, pack and commit one shard; None if the file ends before it.

    A file that cannot be read becomes one shard without rows if the recipe skips such files.

    Raises:
        UserError: the file cannot be read, or a row of it is not as its format needs it.
    """
    start = part * recipe.documents_per_shard
    skipped = None
    try:
        # one row more tells whether the file goes on
        rows = read_rows(source, file, start, start + recipe.documents_per_shard + 1)
        if not rows and part == 0:
            raise Unreadable(f"{file.path} is empty: remove it, or set --data.skip-unreadable to leave such files out.")
    except Unreadable as error:
        if not recipe.skip_unreadable:
            raise
        rows, skipped = [], str(error)
    if not rows and not skipped:
        return None
    last = len(rows) <= recipe.documents_per_shard
    documents = make_documents(source, file, start, rows[: recipe.documents_per_shard])
    ids = tokenize(tokenizer, documents)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    packed = pack(ids, recipe.sequence_length, pad, token_dtype(len(tokenizer)))
    committed: dict[str, Any] = {}

    def fill(path: str) -> None:
        write_arrow(path, packed)
        with open(path, "rb") as stream:
            committed["bytes"] = stream.seek(0, 2)
        committed["sha256"] = sha256(path)

    storage.write(shard_name(key, part), fill)
    record = ShardRecord(
        rows=len(packed.tokens),
        tokens=packed.length,
        documents=int(np.count_nonzero(ids.lengths)),
        last=last,
        skipped=skipped,
        **committed,
    )
    storage.write_bytes(record_name(key, part), json.dumps(asdict(record)).encode())
    return record


def write_arrow(path: str, packed: Packed) -> None:
    """Write packed rows as an Arrow file that can be memory-mapped."""
    import pyarrow as pa

    tokens = pa.FixedSizeListArray.from_arrays(pa.array(packed.tokens.ravel()), packed.tokens.shape[1])
    starts = pa.ListArray.from_arrays(pa.array(packed.offsets), pa.array(packed.starts))
    columns = {"tokens": tokens, "starts": starts}
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
    length: int
    trained: np.ndarray | None

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray | None]:
        """Return (tokens, segment starts, number of tokens before padding, trained or None) of one sequence."""
        starts = self.starts[self.offsets[row] : self.offsets[row + 1]]
        width = self.tokens.shape[1]
        trained = None if self.trained is None else self.trained[row]
        return self.tokens[row], starts, min(width, self.length - row * width), trained


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
        length=record.tokens,
        trained=trained,
    )
