"""The `Format` seam and the registry of all formats.

A format is a frozen dataclass whose fields are its options. It takes their values from the keys of the same name of a
`SourceRecipe`, and from the recipe's ``options`` where there is no such key:

    @register("titled")
    @dataclass(frozen=True)
    class Titled:
        title_column: str = "title"
        conversations: ClassVar[bool] = False

        @property
        def columns(self) -> list[str]:
            return [self.title_column]

        def documents(self, rows: Sequence[Row]) -> list[str]:
            return texts(rows, self.title_column)
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from doge.common.errors import UserError

Row = Mapping[str, Any]


class Turn(NamedTuple):
    """One turn of a conversation; the model is not trained to predict the tokens of an untrained one."""

    role: str
    content: str
    trained: bool = True


Document = str | tuple[Turn, ...]  # plain text, or a conversation that the chat template renders


class Format(Protocol):
    """Makes documents of rows."""

    @property
    def conversations(self) -> bool:
        """Whether the documents are conversations, for which the tokenizer needs a chat template."""

    @property
    def columns(self) -> list[str]:
        """The columns of a row that are read."""

    def documents(self, rows: Sequence[Row]) -> Sequence[Document]:
        """Make one document of each row, all of one kind; one without text is left out of training.

        Raises:
            RowError: a row is not as it should be.
            UserError: the text cannot be fetched.
        """


class RowError(Exception):
    """A row of which no document can be made.

    Args:
        index: of the row among those given to `Format.documents`.
        reason: what is wrong, to follow "Row 7 of FILE".
    """

    def __init__(self, index: int, reason: str):
        super().__init__(f"row {index} {reason}")
        self.index, self.reason = index, reason


FORMATS: dict[str, Callable[..., Format]] = {}

FormatT = TypeVar("FormatT", bound=Callable[..., Format])


def register(name: str) -> Callable[[FormatT], FormatT]:
    """Class decorator that makes a format known by ``name``."""

    def add(cls: FormatT) -> FormatT:
        FORMATS[name] = cls
        return cls

    return add


def format_class(name: str) -> Callable[..., Format]:
    """The format of a name. Raises UserError, which names the nearest, when there is none."""
    if name not in FORMATS:
        raise UserError(
            f"There is no format {name!r} of a source; the nearest is {nearest(name, FORMATS)} "
            f"(of {', '.join(sorted(FORMATS))})."
        )
    return FORMATS[name]


def option_names(name: str) -> set[str]:
    """The options of a format. Raises UserError when there is no such format."""
    return set(inspect.signature(format_class(name)).parameters)


def nearest(name: str, known: Iterable[str]) -> str:
    """The most similar of the known names."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def texts(rows: Sequence[Row], column: str) -> list[str]:
    """The texts of a column, "" for None. Raises RowError for a value that is no text."""
    return [_text(index, row[column], column) for index, row in enumerate(rows)]


def _text(index: int, value: Any, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(index, f"holds {type(value).__name__} in {column!r} and no text")
    if not value.isascii():  # known without a look at the text
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON may hold half a surrogate pair, which no tokenizer takes
            return value.encode("utf-8", "replace").decode()
    return value
