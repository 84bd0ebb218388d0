"""Conversations to texts for an `Encoder`, by the tokenizer's chat template.

Only the special tokens that the template writes are written by their names, so only they become special tokens; what
the turns say, and the roles they name, stay text. Where no turn spells a special token the ids are those of
`apply_chat_template`, so that a conversation reads in training as it does in use.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from data_pipelines.formats.base import Turn
from data_pipelines.tokenizing.encoder import Encoder
from doge.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# For templates that write the date, with which the ids of a shard may not change: Llama's own, where it knows none.
_NO_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


def render(
    tokenizer: "PreTrainedTokenizerFast", encoder: Encoder, conversation: tuple[Turn, ...], prompt: bool = False
) -> str:
    """Render a conversation; ``prompt`` adds the header that prompts for an answer.

    What spells a special token in a turn is one private-use character while the template sees it.

    Raises:
        UserError: the template refuses the conversation.
    """
    said = "\x00".join(text for message in conversation for text in (message.role, message.content))
    spelled = sorted(set(encoder.special.findall(said)))
    unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in said)
    masks = dict(zip(spelled, unused, strict=False))

    def masked(text: str) -> str:
        return encoder.special.sub(lambda match: masks[match[0]], text) if masks else text

    turns = [{"role": masked(message.role), "content": masked(message.content)} for message in conversation]
    try:
        template = tokenizer.get_chat_template()
        rendered = tokenizer.apply_chat_template(
            turns,
            chat_template=_NO_DATE + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except Exception as error:  # the template's own, and whatever its code runs into
        raise UserError(
            f"The chat template of the tokenizer {tokenizer.name_or_path!r} refuses a conversation "
            f"({' '.join(str(error).split())[:200]}): set the format of its source to text, or --tokenizer.path to "
            "another tokenizer."
        ) from error
    named = encoder.special.sub(lambda match: encoder.names[match[0]], str(rendered))
    return named.translate({ord(mask): spelling for spelling, mask in masks.items()}) if masks else named


def render_bordered(tokenizer: "PreTrainedTokenizerFast", encoder: Encoder, conversation: tuple[Turn, ...]) -> str:
    """Render a conversation with borders around the trained messages, an answer without the header that prompts for it.

    An answer is so encoded apart from its header, as it is when a model continues the header.

    Raises:
        UserError: the template refuses the conversation, or a part of it, or renders a message otherwise when others
            follow.
    """
    whole = render(tokenizer, encoder, conversation)
    for begin, end in reversed(list(_trained_spans(tokenizer, encoder, conversation, whole))):
        whole = whole[:begin] + encoder.border + whole[begin:end] + encoder.border + whole[end:]
    return whole


def _trained_spans(
    tokenizer: "PreTrainedTokenizerFast", encoder: Encoder, conversation: tuple[Turn, ...], whole: str
) -> Iterator[tuple[int, int]]:
    for at, message in enumerate(conversation):
        if message.trained:
            prompt = message.role == "assistant"
            before = render(tokenizer, encoder, conversation[:at], prompt) if at else ""
            after = render(tokenizer, encoder, conversation[: at + 1])
            if not (whole.startswith(before) and whole.startswith(after)):
                raise UserError(
                    f"The chat template of the tokenizer {tokenizer.name_or_path!r} renders a message otherwise when "
                    "others follow it, so the tokens of untrained messages cannot be told: set --tokenizer.path to "
                    "another tokenizer."
                )
            yield len(before), len(after)
