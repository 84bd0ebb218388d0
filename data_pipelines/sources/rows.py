"""Rows of input files, read by range, and the documents that a source's format makes of them."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from data_pipelines.formats.base import Document, Row, RowError
from data_pipelines.sources import embedded
from data_pipelines.sources.files import InputFile, check_unchanged
from data_pipelines.sources.source_recipe import SourceRecipe
from doge.common.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


class Unreadable(UserError):
    """A file that cannot be read, which ``data.skip_unreadable`` may leave out."""


def read_rows(source: SourceRecipe, file: InputFile, start: int, stop: int) -> list[dict[str, Any]]:
    """Read rows ``[start, stop)`` of a file, fewer where it ends, with the columns that the source's format reads.

    Raises:
        Unreadable: the file is damaged or does not exist.
        UserError: it cannot be reached, has changed since it was listed, or lacks a column.
    """
    columns = source.reader.columns
    if file.path.startswith(embedded.SCHEME):
        rows = _embedded_rows(file, start, stop)
    else:
        rows = _file_rows(file, columns, start, stop)
    for row in rows:
        for column in columns:
            if column not in row:
                raise UserError(
                    f"{file.path} has no column {column!r}, only {', '.join(row)}: set the source's columns."
                )
    return rows


def make_documents(source: SourceRecipe, file: InputFile, start: int, rows: Sequence[Row]) -> Sequence[Document]:
    """Make one document of each row, by the source's format.

    Args:
        source: the source that the file belongs to.
        file: the file that the rows are from.
        start: number of the first row in the file.
        rows: consecutive rows with the columns of the source's format.

    Raises:
        UserError: a row is not as it should be (its number is named), or text cannot be fetched.
    """
    try:
        return source.reader.documents(rows)
    except RowError as error:
        raise UserError(f"Row {start + error.index} of {file.path} {error.reason}") from error


def _embedded_rows(file: InputFile, start: int, stop: int) -> list[dict[str, Any]]:
    if embedded.identity(file.path) != file.identity:
        raise UserError(
            f"{file.path} is not the same on this machine as on the one that listed it: give every machine the same "
            "Python installation, or point data.sources at files."
        )
    return list(islice(embedded.rows(file.path), start, stop))


def _file_rows(file: InputFile, columns: list[str], start: int, stop: int) -> list[dict[str, Any]]:
    import fsspec
    import pyarrow

    try:
        filesystem, path = fsspec.core.url_to_fs(file.path)
        check_unchanged(file, filesystem, path)
        return list(_rows(filesystem, path, columns, start, stop))
    except UserError:
        raise
    except Exception as error:  # each filesystem raises its own kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        broken: tuple[type[Exception], ...] = (
            FileNotFoundError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, TypeError, pyarrow.ArrowException,
        )  # fmt: skip
        if "://" not in file.path or file.path.startswith("file://"):
            broken += (OSError,)
        if isinstance(error, broken):
            raise Unreadable(
                f"{file.path} cannot be read ({reason}): repair or remove it, or set --data.skip-unreadable to leave "
                "such files out."
            ) from error
        raise UserError(
            f"{file.path} cannot be reached ({reason}): run the same command to resume once it can; everything "
            "prepared so far is kept."
        ) from error


def _rows(
    filesystem: "AbstractFileSystem", path: str, columns: list[str], start: int, stop: int
) -> Iterator[dict[str, Any]]:
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
                raise ValueError("the file does not hold a list of objects")
            yield from (_only(row, columns) for row in content[start:stop])


def _parquet_rows(
    filesystem: "AbstractFileSystem", path: str, columns: list[str], start: int, stop: int
) -> Iterator[dict[str, Any]]:
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
        raise ValueError(f"a row is a {type(row).__name__} and not an object")
    return {column: row[column] for column in columns} if all(column in row for column in columns) else row
