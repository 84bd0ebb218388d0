"""Frozen values: whoever changes them makes every shard in the world anew and stops every run from resuming."""

import hashlib
from dataclasses import replace

import pytest

from data_pipelines.order.plan import Plan
from data_pipelines.sources.files import InputFile
from data_pipelines.sources.source_recipe import DataRecipe
from data_pipelines.tokenizing.encoding import tokenize
from data_pipelines.tokenizing.shards import pack
from doge.common.config_tree import from_dict
from doge.tokenizer.training import train_tokenizer

SOURCE_KEYS = (
    "path", "weight", "format", "text_column", "prompt_column", "blob_column", "blob_url", "max_bytes",
)  # fmt: skip
HERITAGE = "https://softwareheritage.s3.amazonaws.com/content"
SOURCES = {
    "web": ("/data/web/*.jsonl.gz", 7.0, "text", "text", "prompt", "blob_id", HERITAGE, 1_000_000),
    "chat": ("/data/chat", 2.0, "conversation", "answer", "question", "blob_id", HERITAGE, 1_000_000),
    "code": ("/data/code", 0.5, "software-heritage", "text", "prompt", "sha", "http://blobs", 1_000_000),
    "math": ("python-installation://arithmetic", 0.5, "text", "text", "prompt", "blob_id", HERITAGE, 500),
}
FILES = {
    "web": [InputFile("/data/web/b.jsonl.gz", 7, "b" * 64), InputFile("/data/web/a.jsonl.gz", 9, "a" * 64)],
    "chat": [InputFile("/data/chat/0.parquet", 5, "c" * 64)],
    "code": [InputFile("/data/code/0.json", 5, "d" * 64)],
    "math": [InputFile("python-installation://arithmetic/0-1/500", 0, "e" * 64)],
}
TEXTS = [f"The {word} of {number} is {number * 7}, isn't it?" for number in range(40) for word in ("sum", "größe")]


@pytest.fixture(scope="module")
def recipe():
    """As an earlier run resolved and saved it."""
    sources = {name: dict(zip(SOURCE_KEYS, values, strict=True)) for name, values in SOURCES.items()}
    values = {
        "sources": sources, "sequence_length": 64, "seed": 233, "held_out_sequences": 1000, "documents_per_shard": 100,
        "files_per_stripe": 8, "skip_unreadable": False, "num_cpus_per_task": 0.0, "max_tasks": 0,
    }  # fmt: skip
    return from_dict(DataRecipe, values)


def test_shard_keys_and_the_fingerprint_of_the_order_are_those_of_earlier_runs(recipe):
    plan = Plan(recipe, "tokenizers/given", "f" * 64, FILES)
    assert plan.keys == {
        "web": ["fc0be2988ae46cf2129d8e0262facba9", "1927f78ab145cc2cfd42a8ceb3c906e3"],
        "chat": ["3e61e97e593b6b78e9e9a9dae037b4da"],
        "code": ["d3636bd7c3e650f79baedb5f3f59a62c"],
        "math": ["27dadbe366090a2583e23b2c5657f53b"],
    }
    assert plan.fingerprint == "b98838201113c9c9f9a73d07821c2fdd83ef2f5cfc2d0b4a2a278d1aea37eb2f"


@pytest.mark.parametrize(
    ("source", "packing", "length", "digest"),
    [
        ("web", "stream", 1274, "a5853e450d3ffcd267af1db7337992ffa87542e4e5375623700f35a153668c54"),
        ("chat", "best_fit", 3767, "92f486ff97ff42690d1990f02ac9d09fbdf2c210667613c370da70f4d48bf397"),
    ],
)
def test_equal_rows_become_equal_shards(recipe, source, packing, length, digest):
    reader, tokenizer = recipe.sources[source].reader, train_tokenizer(TEXTS, 320)
    rows = [{"text": text, "question": text[:20], "answer": text} for text in TEXTS]
    rows += [dict.fromkeys(("text", "question", "answer"), text) for text in (None, "", "a<|end_of_text|>b")]
    packed = pack(replace(recipe, packing=packing), tokenize(tokenizer, reader.documents(rows)), tokenizer)
    content = b"".join(array.tobytes() for array in packed if array is not None)
    assert (packed.lengths.sum(), hashlib.sha256(content).hexdigest()) == (length, digest)
