"""Without any download there are four sources of real text, the same on every look."""

import ast
import re

import pytest

from data_pipelines.sources.embedded import SCHEME, identity, list_files, rows
from doge.common.errors import UserError

BYTES = 60_000


def everything(kind, max_bytes=BYTES):
    return [row for name, _, _ in list_files(SCHEME + kind, max_bytes) for row in rows(name)]


@pytest.mark.parametrize("kind", ["prose", "conversation", "code", "arithmetic"])
def test_each_kind_is_deterministic_and_bounded(kind):
    files = list_files(SCHEME + kind, BYTES)
    assert files == list_files(SCHEME + kind, BYTES)
    assert len(files) == len({name for name, _, _ in files})
    assert all(identity(name) == digest for name, _, digest in files)
    found = everything(kind)
    assert found == everything(kind)
    size = sum(len("".join(row.values()).encode()) for row in found)
    assert BYTES / 4 < size < BYTES * 12  # a source file is taken whole, the reference's topics among them


def test_more_bytes_give_more_text():
    assert len(everything("arithmetic", 200_000)) > 2 * len(everything("arithmetic", 60_000))
    assert len(everything("conversation", 400_000)) > 2 * len(everything("conversation", 40_000))


def test_prose_holds_the_language_reference():
    assert any(row["text"].startswith('with\n\nThe "with" statement') for row in everything("prose", 1_000_000))


def test_conversations_ask_for_code_and_answer_without_the_docstring():
    found = everything("conversation")
    assert len(found) > 20
    parsed = [ast.parse(row["text"]).body[0] for row in found]
    assert all(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in parsed)
    assert all(node.name in row["prompt"] for node, row in zip(parsed, found, strict=True))
    assert not any(ast.get_docstring(node) for node in parsed)


def test_code_parses():
    assert all(ast.parse(row["text"]) for row in everything("code"))


def test_arithmetic_is_right():
    claims = [
        (left, right)
        for row in everything("arithmetic")
        for left, right in re.findall(r"^([\d +*-]+) = ([-\d]+)$", row["text"], re.MULTILINE)
    ]
    assert len(claims) > 100
    assert all(eval(left) == int(right) for left, right in claims)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="There is no source python-installation://poetry"):
        list_files(SCHEME + "poetry", BYTES)
