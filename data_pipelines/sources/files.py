"""Where text comes from: files of rows, read by range, and how a row becomes a document."""

import fnmatch
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, NamedTuple

from data_pipelines.sources import embedded
from doge.common.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt", ".txt.gz")
BLOB_DOWNLOADS = 64  # at a time, of a few kilobytes each: latency is all that counts


@dataclass(frozen=True)
class SourceRecipe:
    """One source of the mixture.

    Args:
        path: a file, a directory, a glob, or a URI of one: local, anything fsspec opens, the hub
            (``hf://datasets/OWNER/NAME@REVISION/*.parquet``), or ``python-installation://`` followed by ``prose``,
            ``conversation``, ``code`` or ``arithmetic``.
        weight: its share of the training sequences, relative to the other sources' weights.
        format: ``text`` takes ``text_column``; ``conversation`` makes ``prompt_column`` and ``text_column`` the user's
            and the assistant's turn of the chat template; ``software-heritage`` fetches the file that ``blob_column``
            names from ``blob_url``.
        blob_url: directory with one gzipped file a blob id.
        max_bytes: of a ``python-installation`` source: about how many bytes of text it holds.
    """

    path: str
    weight: float
    format: Literal["text", "conversation", "software-heritage"] = "text"
    text_column: str = "text"
    prompt_column: str = "prompt"
    blob_column: str = "blob_id"
    blob_url: str = "https://softwareheritage.s3.amazonaws.com/content"
    max_bytes: int = 1_000_000

    @property
    def columns(self) -> list[str]:
        """The columns that the format reads."""
        return {
            "text": [self.text_column],
            "conversation": [self.prompt_column, self.text_column],
            "software-heritage": [self.blob_column],
        }[self.format]


def _python_installation() -> dict[str, SourceRecipe]:
    root = embedded.SCHEME
    return {
        "prose": SourceRecipe(root + "prose", 0.7, max_bytes=7_000_000),
        "conversation": SourceRecipe(root + "conversation", 0.2, "conversation", max_bytes=2_000_000),
        "code": SourceRecipe(root + "code", 0.05, max_bytes=500_000),
        "arithmetic": SourceRecipe(root + "arithmetic", 0.05, max_bytes=500_000),
    }


@dataclass(frozen=True)
class DataRecipe:
    """Text to numbered training sequences.

    Args:
        sources: by name; the Python installation itself by default, which needs no download.
        sequence_length: tokens of a training sequence.
        seed: of the order.
        held_out_sequences: sequences that are never trained on, shared out over the sources like training.
        documents_per_shard: documents that one task tokenizes and one shard holds.
        files_per_stripe: files of a source whose sequences are mixed with one another; training on a source starts
            when the first shard of each is prepared.
        skip_unreadable: leave out, with a warning, what cannot be read, instead of stopping.
        num_cpus_per_task: CPUs that Ray reserves for a preparing task; none by default, so that preparing goes on
            beside training workers that have reserved every CPU.
        max_tasks: shards prepared at a time; 0 for as many as the cluster has CPUs.
    """

    sources: dict[str, SourceRecipe] = field(default_factory=_python_installation)
    sequence_length: int = 2048
    seed: int = 233
    held_out_sequences: int = 1000
    documents_per_shard: int = 4096
    files_per_stripe: int = 8
    skip_unreadable: bool = False
    num_cpus_per_task: float = 0.0
    max_tasks: int = 0

    def __post_init__(self):
        smallest = {
            "sequence_length": 2,
            "held_out_sequences": 0,
            "documents_per_shard": 1,
            "files_per_stripe": 1,
            "num_cpus_per_task": 0,
            "max_tasks": 0,
        }
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise UserError(f"data.{name} must be at least {least}, not {getattr(self, name)}.")


class InputFile(NamedTuple):
    """One file of a source; ``identity`` changes with its content and not with its place."""

    path: str
    size: int
    identity: str


class Unreadable(UserError):
    """A file that cannot be read, which ``data.skip_unreadable`` may leave out."""


def list_files(name: str, source: SourceRecipe) -> list[InputFile]:
    """The files of a source, sorted by path. Raises UserError when there is none or the place cannot be reached."""
    if source.path.startswith(embedded.SCHEME):
        return [InputFile(*file) for file in embedded.list_files(source.path, source.max_bytes)]
    import fsspec

    advice = f"point --data.sources.{name}.path at local files, for example '/data/{name}/*.parquet'"
    try:
        path = _pin_revision(source.path)
        filesystem, root = fsspec.core.url_to_fs(path)
        if not any(wildcard in root for wildcard in "*?["):
            found = filesystem.find(root, detail=True)
        else:
            found = filesystem.glob(root, detail=True)
    except Exception as error:  # each filesystem raises its own kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"The source {name} ({source.path}) cannot be reached ({reason}): {advice}.") from error
    files = [
        InputFile(filesystem.unstrip_protocol(path), info["size"], _identity(filesystem, path, info))
        for path, info in sorted(found.items())
        if info["type"] == "file" and path.endswith(SUFFIXES) and not fnmatch.fnmatch(path, "*/.*")
    ]
    if not files:
        raise UserError(f"The source {name} has no {', '.join(SUFFIXES)} file at {source.path}: {advice}.")
    return files


def read_rows(source: SourceRecipe, file: InputFile, start: int, stop: int) -> list[dict[str, Any]]:
    """Rows ``[start, stop)`` of a file, fewer where it ends, with the columns of the source's format.

    Raises:
        Unreadable: the file is damaged or not there.
        UserError: it cannot be reached, changed since it was listed, or lacks a column of text.
    """
    if file.path.startswith(embedded.SCHEME):
        if embedded.identity(file.path) != file.identity:
            raise UserError(
                f"{file.path} is not the same on this machine as on the one that listed it: give every machine the "
                "same Python installation, or point data.sources at files."
            )
        return list(islice(embedded.rows(file.path), start, stop))
    import fsspec
    import pyarrow

    try:
        filesystem, path = fsspec.core.url_to_fs(file.path)
        now = filesystem.info(path)
        if now["size"] != file.size or _identity(filesystem, path, now) != file.identity:
            raise UserError(
                f"{file.path} changed while it was being prepared: run the same command again to prepare it anew."
            )
        rows = list(_rows(filesystem, path, source.columns, start, stop))
    except UserError:
        raise
    except Exception as error:  # each filesystem raises its own kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        broken = (FileNotFoundError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, TypeError)
        broken += (OSError,) if "://" not in file.path or file.path.startswith("file://") else ()
        if isinstance(error, (*broken, pyarrow.ArrowException)):
            raise Unreadable(
                f"{file.path} cannot be read ({reason}): repair or remove it, or set --data.skip-unreadable to leave "
                "such files out."
            ) from error
        raise UserError(
            f"{file.path} cannot be reached ({reason}): run the same command again when it can; everything prepared "
            "so far is kept."
        ) from error
    for row in rows:
        for column in source.columns:
            if column not in row:
                raise UserError(
                    f"{file.path} has no column {column!r}, only {', '.join(row)}: set the source's columns."
                )
            if not isinstance(row[column], str | None):
                raise UserError(
                    f"{file.path} holds {type(row[column]).__name__} in {column!r} and no text: set the columns."
                )
    return rows


def documents(source: SourceRecipe, rows: list[dict[str, Any]]) -> list[str | tuple[str, str]]:
    """What the rows say: a text each, or a (prompt, text) pair for a conversation."""
    if source.format == "software-heritage":
        return fetch_blobs(source.blob_url, [row[source.blob_column] for row in rows])
    columns = [[_encodable(row[column] or "") for row in rows] for column in source.columns]
    return list(zip(*columns, strict=True)) if source.format == "conversation" else columns[0]


def _encodable(text: str) -> str:
    """JSON may hold half a surrogate pair, which no tokenizer takes: a question mark takes its place."""
    if not text.isascii():  # known without a look at the text
        try:
            text.encode()
        except UnicodeEncodeError:
            return text.encode("utf-8", "replace").decode()
    return text


def fetch_blobs(url: str, blob_ids: list[str]) -> list[str]:
    """Texts of Software Heritage's gzipped blobs; one that is not there (404) is empty, as in smollm-corpus' recipe.

    Raises UserError when the place cannot be reached after five attempts.
    """
    import requests
    from urllib3.util.retry import Retry

    retry = Retry(total=5, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=BLOB_DOWNLOADS, max_retries=retry)
    with requests.Session() as session, ThreadPoolExecutor(BLOB_DOWNLOADS) as pool:
        session.mount("http://", adapter)
        session.mount("https://", adapter)

        def fetch(blob_id: str) -> str:
            response = session.get(f"{url.rstrip('/')}/{blob_id}", timeout=60)
            if response.status_code == 404:
                return ""
            response.raise_for_status()
            content = response.content
            if content[:2] == b"\x1f\x8b":  # not yet unpacked on the way
                content = gzip.decompress(content)
            return content.decode("utf-8", errors="ignore")

        try:
            return list(pool.map(fetch, blob_ids))
        except (requests.RequestException, OSError, EOFError) as error:
            pool.shutdown(cancel_futures=True)
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"Blobs cannot be fetched from {url} ({reason}): check the connection, or point the source's path at "
                "files that hold the text and set its format to text."
            ) from error


def _rows(filesystem, path: str, columns: list[str], start: int, stop: int) -> Iterator[dict[str, Any]]:
    if path.endswith(".parquet"):
        yield from _parquet_rows(filesystem, path, columns, start, stop)
        return
    compression = "gzip" if path.endswith(".gz") else None
    with filesystem.open(path, "rb", compression=compression) as stream:
        if ".txt" in os.path.basename(path):  # a text file is one document
            if text := stream.read().decode("utf-8"):
                yield from islice([dict.fromkeys(columns, text)], start, stop)
        elif ".jsonl" in os.path.basename(path):
            lines = (line for line in stream if line.strip())
            yield from (_only(json.loads(line), columns) for line in islice(lines, start, stop))
        else:
            content = json.load(stream)
            if not isinstance(content, list):
                raise ValueError("the file is no list of objects")
            yield from (_only(row, columns) for row in content[start:stop])


def _parquet_rows(filesystem, path: str, columns: list[str], start: int, stop: int) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with filesystem.open(path, "rb") as stream, parquet.ParquetFile(stream) as file:
        known = [column for column in columns if column in file.schema_arrow.names]
        if len(known) < len(columns):
            known = file.schema_arrow.names  # read_rows names what there is
        first = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            begin, end = max(start, first), min(stop, first + rows)
            if begin < end:
                table = file.read_row_group(group, columns=known)
                yield from table.slice(begin - first, end - begin).to_pylist()
            first += rows


def _only(row: Any, columns: list[str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"a row is {type(row).__name__} and no object")
    return {column: row[column] for column in columns} if all(column in row for column in columns) else row


def _pin_revision(path: str) -> str:
    """Put the commit that a hub path means today into it, so that the inputs do not move under a run."""
    if not path.startswith("hf://"):
        return path
    from huggingface_hub import HfApi, HfFileSystem

    resolved = HfFileSystem().resolve_path(path)
    if not hasattr(resolved, "repo_id"):  # a bucket has no commits
        return path
    commit = HfApi().repo_info(resolved.repo_id, repo_type=resolved.repo_type, revision=resolved.revision).sha
    return f"hf://{resolved.repo_type}s/{resolved.repo_id}@{commit}/{resolved.path_in_repo}"


_WHOLE, _BLOCK, _BLOCKS = 64 << 20, 1 << 20, 16


def _identity(filesystem, path: str, info: dict[str, Any]) -> str:
    """What a file's content is known by, never its place or time, so that moving or touching it makes nothing anew.

    A store's own content hash where it has one. Otherwise the sha256 of the content, of a file above 64 MiB that of 16
    blocks of 1 MiB spread over it: with the size, that notices any edit but one that keeps the length of the file and
    lies between the blocks; a parquet file's last block holds what it says of all the others.
    """
    lfs = info.get("lfs") or {}
    for value in (lfs.get("sha256"), info.get("blob_id"), info.get("ETag"), info.get("etag"), info.get("md5Hash")):
        if value:
            return str(value).strip('"')
    return _content_digest(filesystem, path, info["size"], info.get("mtime"))


@lru_cache(maxsize=1024)
def _content_digest(filesystem, path: str, size: int, modified: float | None) -> str:
    """Cached by the time of modification too: each part of a file asks again."""
    digest = hashlib.sha256(str(size).encode())
    with filesystem.open(path, "rb") as stream:
        if size <= _WHOLE:
            while block := stream.read(_BLOCK):
                digest.update(block)
        else:
            for block in range(_BLOCKS):
                stream.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
