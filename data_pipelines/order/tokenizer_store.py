"""The tokenizer of a plan, opened or trained once, and kept in the storage."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.formats.base import Document
from data_pipelines.order.permutation import file_order
from data_pipelines.sources.files import InputFile
from data_pipelines.sources.rows import make_documents, read_parts
from data_pipelines.sources.source_recipe import DataRecipe
from doge.common.errors import UserError
from doge.common.storage import Storage
from doge.tokenizer.loading import fingerprint, load_tokenizer
from doge.tokenizer.training import TokenizerRecipe, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AT_A_TIME = 1000  # rows that are read


def store_tokenizer(
    recipe: DataRecipe,
    wanted: TokenizerRecipe,
    files: dict[str, list[InputFile]],
    storage: Storage,
    report: Callable[[str], None],
) -> tuple[str, str]:
    """Open or train the wanted tokenizer and keep it in the storage.

    Args:
        recipe: names the sources to train on.
        wanted: path of a tokenizer, or how to train one.
        files: files of each source, sorted by path.
        storage: holds the tokenizers.
        report: called with a sentence before a tokenizer is trained.

    Returns:
        The tokenizer's directory in the storage and its fingerprint.

    Raises:
        UserError: the tokenizer or a source cannot be read, or a chat template is missing.
    """
    if wanted.path is None:
        # No weights and no seed: another mixture of the same sources keeps the tokenizer, and so every shard.
        inputs = [
            [(name, recipe.sources[name].reads, [file.identity for file in listed]) for name, listed in files.items()],
            [wanted.vocab_size, wanted.training_bytes],
        ]
        name = "tokenizers/trained-" + hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
        try:
            return name, storage.read_bytes(f"{name}.sha256").decode()
        except FileNotFoundError:
            report(
                f"Training a tokenizer of {wanted.vocab_size:,} ids on {wanted.training_bytes / 1e6:,.0f} MB of text."
            )
            tokenizer = train_tokenizer(_training_texts(recipe, wanted, files), wanted.vocab_size)
    else:
        tokenizer = load_tokenizer(wanted.path)
        name = f"tokenizers/given-{fingerprint(tokenizer)[:16]}"
    conversations = [key for key, source in recipe.sources.items() if source.reader.conversations]
    if conversations and not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer {wanted.path!r} has no chat template, which the conversations of the source "
            f"{conversations[0]!r} need: set --data.sources.{conversations[0]}.format text, or --tokenizer.path to "
            "another tokenizer."
        )
    if not storage.exists(f"{name}.sha256"):
        storage.write(name, tokenizer.save_pretrained)
        tokenizer = open_stored_tokenizer(storage, name)  # the fingerprint is of what everybody opens
        storage.write_bytes(f"{name}.sha256", fingerprint(tokenizer).encode())
    return name, storage.read_bytes(f"{name}.sha256").decode()


def open_stored_tokenizer(storage: Storage, name: str) -> "PreTrainedTokenizerFast":
    """Open the tokenizer in the directory ``name`` of the storage."""
    if storage.is_local:
        return load_tokenizer(storage.path(name))
    with tempfile.TemporaryDirectory() as folder:
        for file in storage.names(name):
            Path(os.path.join(folder, file)).write_bytes(storage.read_bytes(f"{name}/{file}"))
        return load_tokenizer(folder)


def _training_texts(recipe: DataRecipe, wanted: TokenizerRecipe, files: dict[str, list[InputFile]]) -> Iterator[str]:
    """The first documents of every source, equal bytes of each, in an order of the files that no seed changes."""
    share = wanted.training_bytes // len(files)
    for name, listed in files.items():
        left = share
        documents = _documents(recipe, name, [listed[at] for at in file_order(len(listed), 0, name)])
        while left > 0 and (document := next(documents, None)) is not None:
            for text in (document,) if isinstance(document, str) else (message.content for message in document):
                left -= len(text.encode("utf-8", "ignore"))
                yield text


def _documents(recipe: DataRecipe, name: str, files: list[InputFile]) -> Iterator[Document]:
    source, skip = recipe.sources[name], recipe.skip_unreadable
    for file in files:
        for part in read_parts(source, file, AT_A_TIME, skip_unreadable=skip):
            yield from make_documents(source, file, part, skip).documents
