"""Plain text: one column."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data_pipelines.formats.base import Row, register, texts


@register("text")
@dataclass(frozen=True)
class Text:
    """Makes the text of one column a document.

    Args:
        text_column: holds the text.
    """

    text_column: str = "text"
    conversations: ClassVar[bool] = False

    @property
    def columns(self) -> list[str]:
        return [self.text_column]

    def documents(self, rows: Sequence[Row]) -> list[str]:
        return texts(rows, self.text_column)
