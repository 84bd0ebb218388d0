"""A question and its answer: two columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data_pipelines.formats.base import Row, Turn, register, texts


@register("conversation")
@dataclass(frozen=True)
class Conversation:
    """Makes two columns the user's and the assistant's turn of a conversation.

    Args:
        prompt_column: holds the user's turn.
        text_column: holds the assistant's turn.
    """

    prompt_column: str = "prompt"
    text_column: str = "text"
    conversations: ClassVar[bool] = True

    @property
    def columns(self) -> list[str]:
        return [self.prompt_column, self.text_column]

    def documents(self, rows: Sequence[Row]) -> list[tuple[Turn, ...]]:
        turns = zip(texts(rows, self.prompt_column), texts(rows, self.text_column), strict=True)
        return [(Turn("user", prompt), Turn("assistant", text)) for prompt, text in turns]
