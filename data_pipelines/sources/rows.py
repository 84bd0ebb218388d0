"""Rows of input files, read part after part, and the documents that a source's format makes of them."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from data_pipelines.formats.base import Document, Format, Row, RowError
from data_pipelines.sources import embedded
from data_pipelines.sources.files import InputFile, check_unchanged
from data_pipelines.sources.layouts import OddRow, RawRow, Unreachable, raw_rows, reaching
from data_pipelines.sources.places import open_place
from data_pipelines.sources.source_recipe import SourceRecipe
from doge.common.errors import UserError


class Unreadable(UserError):
    """A file or a row that cannot be read, which ``data.skip_unreadable`` may leave out.

    Args:
        fault: what cannot be read and why.
        advice: what to do about it.
    """

    def __init__(self, fault: str, advice: str):
        super().__init__(f"{fault}: {advice}.")
        self.fault, self._advice = fault, advice

    def __reduce__(self) -> tuple[type["Unreadable"], tuple[str, str]]:
        return Unreadable, (self.fault, self._advice)


class Part(NamedTuple):
    """Consecutive rows of a file, as they are in it.

    Attributes:
        number: of the part; part p of a file begins with its row ``p * size``.
        start: number of its first row in the file.
        rows: the rows, JSON unparsed.
        end: offset in the file at which the next part begins; 0 where that is found by the rows' numbers.
        last: whether the file ends with this part.
        skipped: why the rest of the file is left out, if it is.
    """

    number: int
    start: int
    rows: list[RawRow]
    end: int
    last: bool
    skipped: str | None = None


class Documents(NamedTuple):
    """What a format makes of a part.

    Attributes:
        rows: the rows that documents are made of, with the columns of the source's format.
        documents: one of each row.
        skipped: for each row that is left out, which one and why.
    """

    rows: Sequence[Row]
    documents: Sequence[Document]
    skipped: list[str]


def read_parts(
    source: SourceRecipe, file: InputFile, size: int, first: int = 0, offset: int = 0, skip_unreadable: bool = False
) -> Iterator[Part]:
    """Read a file's parts of ``size`` rows from number ``first`` on; none if the file ends before it.

    Args:
        source: the source that the file belongs to.
        file: the file to read.
        size: rows of a part; the last one may have fewer.
        first: number of the first part to read.
        offset: the ``end`` of the part before it; 0 if unknown, which takes as long as reading from the beginning.
        skip_unreadable: end with a part without rows where the file cannot be read any further.

    Raises:
        Unreadable: the file is damaged, is empty or does not exist.
        UserError: it cannot be reached, or has changed since it was listed.
    """
    number, rows, end = first, list[RawRow](), 0
    try:
        for row, after in _rows(source, file, first * size, offset):
            if len(rows) == size:
                yield Part(number, number * size, rows, end, last=False)
                number, rows = number + 1, []
            rows.append(row)
            end = after
        if number == 0 and not rows:
            raise Unreadable(
                f"{file.path} is empty", "remove it, or set --data.skip-unreadable to leave out such files"
            )
        if rows:
            yield Part(number, number * size, rows, end, last=True)
    except Unreadable as error:
        if not skip_unreadable:
            raise
        yield Part(number, number * size, [], end, last=True, skipped=error.fault)


def make_documents(source: SourceRecipe, file: InputFile, part: Part, skip_unreadable: bool = False) -> Documents:
    """Make one document of each row of a part, by the source's format.

    Args:
        source: the source that the file belongs to.
        file: the file that the rows are from.
        part: rows of the file.
        skip_unreadable: leave out the rows of which no document can be made.

    Raises:
        Unreadable: no document can be made of a row (its number, from 1, is named).
        UserError: none can be made of any, which is the recipe's fault, or text cannot be fetched.
    """
    parsed = [_parse(raw) for raw in part.rows]
    odd = {at: row.reason for at, row in enumerate(parsed) if isinstance(row, OddRow)}
    unparsed = len(odd)
    rows: dict[int, Row] = {}
    for at, row in enumerate(parsed):
        if not isinstance(row, OddRow):
            missing = [column for column in source.columns if column not in row]
            if missing:
                odd[at] = f"has no column {missing[0]!r}, only {', '.join(row) or 'an empty object'}"
            else:
                rows[at] = {column: row[column] for column in source.columns}
    made = dict(zip(rows, _documents(source.reader, list(rows.values())), strict=True))
    for at, document in made.items():
        if isinstance(document, RowError):
            odd[at] = document.reason
    skipped = [f"Row {part.start + at + 1:,} of {file.path} {odd[at]}" for at in sorted(odd)]
    if part.start == 0 and not unparsed and len(skipped) == len(part.rows) > 1:
        raise UserError(f"{skipped[0]}, and no row is better: set the source's columns.")
    if skipped and not skip_unreadable:
        raise Unreadable(
            skipped[0], "repair it, set the source's columns, or set --data.skip-unreadable to leave out such rows"
        )
    good = {at: document for at, document in made.items() if not isinstance(document, RowError)}
    return Documents([rows[at] for at in good], list(good.values()), skipped)


def document_groups(source: SourceRecipe, made: Documents) -> list[str]:
    """What decides whether each document is held out: the value of the source's group column, or its own text."""
    if source.group is not None:
        return [str(row[source.group]) for row in made.rows]
    return [
        document if isinstance(document, str) else "\x00".join(f"{turn.role}\x00{turn.content}" for turn in document)
        for document in made.documents
    ]


def _parse(raw: RawRow) -> dict[str, Any] | OddRow:
    if not isinstance(raw, bytes):
        return raw
    try:
        row = json.loads(raw.decode("utf-8-sig"))  # of bytes Python would guess the encoding, line by line
    except RecursionError:
        return OddRow("is nested too deep")
    except UnicodeDecodeError as error:
        return OddRow(f"is not UTF-8 ({error.reason} at byte {error.start:,})")
    except ValueError as error:
        return OddRow(f"is not JSON ({error})")
    return row if isinstance(row, dict) else OddRow(f"is {json.dumps(row)[:40]} and no object")


def _documents(reader: Format, rows: Sequence[Row]) -> list[Document | RowError]:
    """A document of each row, or why there is none."""
    try:
        return list(reader.documents(rows))
    except RowError as error:
        if len(rows) == 1:
            return [error]
    middle = len(rows) // 2
    return [*_documents(reader, rows[:middle]), *_documents(reader, rows[middle:])]


def _rows(source: SourceRecipe, file: InputFile, start: int, offset: int) -> Iterator[tuple[RawRow, int]]:
    if file.path.startswith(embedded.SCHEME):
        if embedded.identity(file.path) != file.identity:
            raise UserError(
                f"{file.path} is not the same on this machine as on the one that listed it: give every machine the "
                "same Python installation, or point data.sources at files."
            )
        yield from ((row, 0) for row in islice(embedded.rows(file.path), start, None))
        return
    try:
        with reaching():
            filesystem, path = open_place(file.path)
            check_unchanged(file, filesystem, path)
        yield from raw_rows(filesystem, path, source.columns, start, offset)
    except UserError:
        raise
    except Exception as error:  # each filesystem and each library raises its own kinds
        cause = error.__cause__ if isinstance(error, Unreachable) else None
        reason = f"{type(cause or error).__name__}: {' '.join(str(cause or error).split())[:200]}"
        if cause and not (file.path.startswith("file://") and isinstance(cause, OSError)):
            raise UserError(
                f"{file.path} cannot be reached ({reason}): run the same command to resume once it can; everything "
                "prepared so far is kept."
            ) from error
        raise Unreadable(
            f"{file.path} cannot be read ({reason})",
            "repair or remove it, or set --data.skip-unreadable to leave out such files",
        ) from error
