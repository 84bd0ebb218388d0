"""Layouts: the raw rows of a file one after the other, and the places in it at which reading can go on.

A row of JSON Lines or of a JSON list is raw until it is parsed, so that whoever looks for a place need not parse. A
compressed file is always unpacked from its beginning, block by block: where it is damaged, the same rows are lost
wherever reading began.
"""

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipelines.sources.files import layout
from doge.common.errors import UserError
from doge.common.git_lfs import POINTER, GitLfsPointer

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from pyarrow import RecordBatch

_BLOCK = 1 << 20  # bytes
_BATCH = 1024  # rows of a parquet file


class OddRow(NamedTuple):
    """A row that cannot be read; ``reason`` follows "Row 7 of FILE"."""

    reason: str


RawRow = bytes | dict[str, Any] | OddRow  # JSON that is not parsed yet, or the columns of a row


class Unreachable(Exception):
    """A filesystem failed. Its own error is the cause, which says nothing about the file's content."""


def raw_rows(
    filesystem: "AbstractFileSystem", path: str, columns: list[str], start: int, offset: int
) -> Iterator[tuple[RawRow, int]]:
    """Yield the rows from number ``start`` on, each with the offset at which the next one begins.

    Args:
        filesystem: the filesystem that the file is in.
        path: path of the file in it.
        columns: columns to read of a parquet file.
        start: number of the first row to yield.
        offset: where that row begins, as it was yielded with the row before it; 0 if unknown.

    Raises:
        Unreachable: the filesystem failed.
        GitLfsPointer: a clone's pointer stands in place of the file.
        Exception: the file is damaged; each library raises its own kinds.
    """
    ending, compression = layout(path) or ("", "")
    with reaching():
        stream: Any = filesystem.open(path, "rb")
    with stream:
        file = _Reached(stream)
        if start == 0 and stream.seekable():
            _refuse_pointer(file)
        if ending == ".parquet":
            yield from ((row, 0) for row in _parquet_rows(file, columns, start))
            return
        unpacked = _OPEN[compression](file)
        blocks = iter(lambda: unpacked.read(_BLOCK), b"")
        if ending == ".txt":  # one document
            text = b"".join(blocks).decode("utf-8-sig")
            yield from islice([(dict.fromkeys(columns, text), 0)] if text else [], start, None)
            return
        first = next(blocks, b"") if ending == ".json" else b""
        opening = re.match(rb"(?:\xef\xbb\xbf)?\s*\[", first)
        begin = offset or (opening.end() if opening else 0)
        if compression or begin <= len(first):
            blocks = _after(chain([first], blocks), begin)
        else:
            file.seek(begin)
        rows = _elements(blocks, begin) if opening else _lines(blocks, begin)
        yield from rows if offset else islice(rows, start, None)


@contextmanager
def reaching() -> Iterator[None]:
    """Raise what a filesystem raises as Unreachable, but not that there is no such file or that it has changed."""
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # each filesystem raises its own kinds
        raise Unreachable from error


def _refuse_pointer(file: "_Reached") -> None:
    if file.read(len(POINTER)) == POINTER:
        raise GitLfsPointer("it stands in place of the file: run `git lfs pull` in its folder")
    file.seek(0)


class _Reached:
    """A stream whose own errors are Unreachable, and so are told from those of whoever unpacks what it reads."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        with reaching():
            return bytes(self._stream.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        with reaching():
            return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def _zstd(file: _Reached) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")  # reads frame after frame


_OPEN: dict[str, Callable[[Any], Any]] = {
    "": lambda file: file,
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}


def _after(blocks: Iterator[bytes], offset: int) -> Iterator[bytes]:
    """What follows the first ``offset`` bytes."""
    for block in blocks:
        if offset < len(block):
            yield block[offset:]
        offset = max(0, offset - len(block))


def _lines(blocks: Iterator[bytes], offset: int) -> Iterator[tuple[bytes, int]]:
    """The lines that are not blank."""
    pieces: list[bytes] = []
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for line in whole:
            if pieces:
                line = b"".join([*pieces, line])
                pieces = []
            offset += len(line) + 1
            if line and not line.isspace():
                yield line, offset
        pieces.append(rest)
    last = b"".join(pieces)
    if last.strip():
        yield last, offset + len(last)


_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[\[\]{},]', re.DOTALL)
_QUOTE, _COMMA, _OPENING, _CLOSING, _END = b'"'[0], b","[0], b"[{", b"]}", b"]"[0]


def _elements(blocks: Iterator[bytes], offset: int) -> Iterator[tuple[bytes, int]]:
    """The elements of a JSON list from behind its bracket or a comma on."""
    text, begin, at, depth = b"", 0, 0, 0  # an element begins at `begin`; brackets are counted up to `at`
    while True:
        more = b"".join(islice(blocks, 1 + (len(text) - begin) // _BLOCK))  # twice as much for an element's every try
        if not more:
            raise ValueError("the list has no end")
        text, at, offset = text[begin:] + more, at - begin, offset + begin
        begin = 0
        for token in _TOKEN.finditer(text, at):
            kind = text[token.start()]
            if kind == _QUOTE:
                if not token[1]:
                    break
            elif kind in _OPENING:
                depth += 1
            elif kind in _CLOSING and depth:
                depth -= 1
            elif not depth:
                element = text[begin : token.start()].strip()
                if element or kind == _COMMA:
                    yield element, offset + token.end()
                if kind != _COMMA:
                    if kind != _END or text[token.end() :].strip() or any(block.strip() for block in blocks):
                        raise ValueError("the list ends before the file does")
                    return
                begin = token.end()
            at = token.end()


def _parquet_rows(file: _Reached, columns: list[str], start: int) -> Iterator[dict[str, Any] | OddRow]:
    """The rows from number ``start`` on; row groups before it are not read, and none is held as a whole."""
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(pyarrow.PythonFile(file, mode="r"), buffer_size=_BLOCK) as content:
        known = [column for column in columns if column in content.schema_arrow.names]
        if len(known) < len(columns):
            known = content.schema_arrow.names  # whoever misses one names what there is
        for group in range(content.metadata.num_row_groups):
            rows = content.metadata.row_group(group).num_rows
            if start < rows:
                for batch in content.iter_batches(_BATCH, [group], known):
                    yield from _batch_rows(batch.slice(min(start, batch.num_rows)))
                    start = max(0, start - batch.num_rows)
            else:
                start -= rows


def _batch_rows(batch: "RecordBatch") -> list[dict[str, Any] | OddRow]:
    try:
        return batch.to_pylist()
    except Exception as error:  # a value that Python has no like of, or text that is not UTF-8
        if batch.num_rows == 1:
            return [OddRow(f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})")]
        return [row for at in range(batch.num_rows) for row in _batch_rows(batch.slice(at, 1))]
