"""Frozen values: whoever changes them makes every shard in the world anew and stops every run from resuming."""

import hashlib

import pytest

from data_pipelines.order.plan import Plan
from data_pipelines.sources.files import InputFile
from data_pipelines.sources.source_recipe import DataRecipe
from data_pipelines.tokenizing.encoding import tokenize
from data_pipelines.tokenizing.packing import pack
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
        "web": ["766e2271d4d2e6805196ec2a21d972a2", "97148e8067fccd65f994fb5a3db35c56"],
        "chat": ["b5d93a8d55bbc429433282232b3b086d"],
        "code": ["be6b198102378991945fe74a2bf92e0d"],
        "math": ["5c1de63a4e6650fabcdaa34d9b4716cd"],
    }
    assert plan.fingerprint == "8813c209b62649e74f9e253c1d03c68508b9684c0c16060390ada03ae3326296"


@pytest.mark.parametrize(
    ("source", "length", "digest"),
    [
        ("web", 1274, "b75f21f3aac976eaf57d498b9651956403952e1726330c28a798d346add5a870"),
        ("chat", 3767, "c23ba5a7ed3815a3345f508d9dbe2b8d03658b3af3939ea9e2efd8ed75fe5f6a"),
    ],
)
def test_equal_rows_become_equal_shards(recipe, source, length, digest):
    reader, tokenizer = recipe.sources[source].reader, train_tokenizer(TEXTS, 320)
    rows = [{"text": text, "question": text[:20], "answer": text} for text in TEXTS]
    rows += [dict.fromkeys(("text", "question", "answer"), text) for text in (None, "", "a<|end_of_text|>b")]
    packed = pack(tokenize(tokenizer, reader.documents(rows)), 64, 2)
    content = b"".join(array.tobytes() for array in (packed.tokens, packed.starts, packed.offsets))
    assert (packed.length, hashlib.sha256(content).hexdigest()) == (length, digest)
