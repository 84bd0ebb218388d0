"""The tokenizer of a plan, opened or trained once, and kept in the storage."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.formats.base import Document
from data_pipelines.order.mixture import mixture_units
from data_pipelines.order.permutation import file_order
from data_pipelines.sources.files import InputFile
from data_pipelines.sources.rows import make_documents, read_parts
from data_pipelines.sources.source_recipe import DataRecipe
from data_pipelines.tokenizing.conversations import render
from data_pipelines.tokenizing.encoder import encoder_of
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
        UserError: the tokenizer or a source cannot be read, or the conversations of a source cannot be rendered.
    """
    units = mixture_units({name: source.weight for name, source in recipe.sources.items()})
    if wanted.path is None:
        # No seed: another order of the same mixture keeps the tokenizer, and so every shard.
        inputs = [
            [
                (name, units[name], recipe.sources[name].reads, [file.identity for file in listed])
                for name, listed in files.items()
            ],
            [wanted.vocab_size, wanted.training_bytes],
        ]
        name = "tokenizers/trained-" + hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
        try:
            return name, storage.read_bytes(f"{name}.sha256").decode()
        except FileNotFoundError:
            report(
                f"Training a tokenizer of {wanted.vocab_size:,} ids on {wanted.training_bytes / 1e6:,.0f} MB of text."
            )
            texts = {name: _texts(recipe, name, listed) for name, listed in files.items()}
            tokenizer = train_tokenizer(shared_out(texts, units, wanted.training_bytes), wanted.vocab_size)
    else:
        tokenizer = load_tokenizer(wanted.path)
        name = f"tokenizers/given-{fingerprint(tokenizer)[:16]}"
        for source, listed in files.items():
            if recipe.sources[source].reader.conversations:
                _check_chat_template(tokenizer, wanted.path, source, next(_documents(recipe, source, listed), None))
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


def _check_chat_template(
    tokenizer: "PreTrainedTokenizerFast", path: str, source: str, document: Document | None
) -> None:
    """Raise UserError if the chat template renders no conversation between those who speak in a document."""
    if not document or isinstance(document, str):
        return
    turns = tuple(turn._replace(content=f"Sentence{number}") for number, turn in enumerate(document))
    reason = "it has no chat template"
    if tokenizer.chat_template:
        try:
            rendered = render(tokenizer, encoder_of(tokenizer), turns)
            if any(turn.content in rendered for turn in turns):
                return
            reason = "its chat template leaves out what the turns say"
        except UserError as error:
            reason = f"its chat template says: {' '.join(str(error.__cause__).split())[:200]}"
    raise UserError(
        f"The tokenizer {path!r} cannot render the conversations of the source {source!r} ({reason}): set "
        f"--data.sources.{source}.format text, or --tokenizer.path to another tokenizer."
    )


def shared_out(texts: Mapping[str, Iterator[str]], units: Mapping[str, int], training_bytes: int) -> Iterator[str]:
    """Yield about ``training_bytes`` of text, of each source by its units; one that ends leaves the others its rest."""
    left = dict.fromkeys(texts, 0.0)
    rest = float(training_bytes)
    while left and rest >= 1:
        total = sum(units[name] for name in left)
        for name in left:
            left[name] += rest * units[name] / total
        rest = 0.0
        for name in list(left):
            while left[name] > 0:
                text = next(texts[name], None)
                if text is None:
                    rest += left.pop(name)
                    break
                left[name] -= len(text.encode("utf-8", "ignore"))
                yield text


def _texts(recipe: DataRecipe, source: str, files: list[InputFile]) -> Iterator[str]:
    """The texts of a source's documents, in an order of the files that no seed changes."""
    for document in _documents(recipe, source, [files[at] for at in file_order(len(files), 0, source)]):
        yield from (document,) if isinstance(document, str) else (message.content for message in document)


def _documents(recipe: DataRecipe, name: str, files: list[InputFile]) -> Iterator[Document]:
    source, skip = recipe.sources[name], recipe.skip_unreadable
    for file in files:
        for part in read_parts(source, file, AT_A_TIME, skip_unreadable=skip):
            yield from make_documents(source, file, part, skip).documents
