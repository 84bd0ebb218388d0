"""Documents to token ids: the whole cost of preparing text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.formats.base import Document, Turn
from data_pipelines.tokenizing.conversations import render, render_bordered
from data_pipelines.tokenizing.encoder import encoder_of
from data_pipelines.tokenizing.packing import Ragged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def tokenize(tokenizer: "PreTrainedTokenizerFast", documents: Sequence[Document]) -> Ragged:
    """Encode documents as the smallest type that holds all ids; a document without text has no tokens.

    A text goes from BOS (if there is one) to EOS. In a conversation the chat template alone writes special tokens.
    What looks like one in a text, or in what a conversation's turns say, is encoded as text. All documents are of one
    kind.

    Raises:
        UserError: the chat template refuses a conversation, or does not tell the tokens of its untrained messages.
    """
    encoder = encoder_of(tokenizer)
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) == len(documents):
        return _enclose(encoder.encode(texts), tokenizer.bos_token_id, tokenizer.eos_token_id)
    conversations = [document for document in documents if not isinstance(document, str)]
    whole = all(message.trained for conversation in conversations for message in conversation)

    def text_of(conversation: tuple[Turn, ...]) -> str:
        if not any(message.content for message in conversation):
            return ""
        return (render if whole else render_bordered)(tokenizer, encoder, conversation)

    texts = [text_of(conversation) for conversation in conversations]
    return encoder.encode(texts) if whole else encoder.encode_bordered(texts)


def _enclose(documents: Ragged, bos: int | None, eos: int) -> Ragged:
    """Put BOS, if there is one, and EOS around every document that is not empty."""
    full = documents.lengths > 0
    lengths = documents.lengths + full * (1 if bos is None else 2)
    ends = np.cumsum(lengths)[full]
    values = np.empty(int(lengths.sum()), documents.values.dtype)
    inner = np.ones(len(values), bool)
    inner[ends - 1] = False
    values[ends - 1] = eos
    if bos is not None:
        starts = ends - lengths[full]
        inner[starts] = False
        values[starts] = bos
    values[inner] = documents.values
    return Ragged(values, lengths)
