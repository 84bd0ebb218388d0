import io
import json
import pickle

import pytest
from recorded_runs import recorded_run

from cluster.runs.console import Console
from cluster.runs.recipe import Recipe, check_same_run, redacted
from doge.common.config_tree import flatten, from_dict, to_yaml
from doge.common.errors import MachineError, UserError
from doge.common.redaction import without_secrets
from doge.reporting.tracking import show_command


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:hush@host:5000/api:", "at http://***@host:5000/api:"),
        ("(url: https://hush@host/x)", "(url: https://***@host/x)"),
        ("https://me:hu@sh@host", "https://***@host"),
        ("https://me:hu/sh@host/x", "https://***@host/x"),
        ("postgresql+psycopg2://me:hush@db/runs", "postgresql+psycopg2://***@db/runs"),
        ("s3://KEY:hush@bucket/doge", "s3://***@bucket/doge"),
        ("https://host/d.parquet?token=hush&rows=3", "https://host/d.parquet?token=***&rows=3"),
        ("https://host/d?X-Amz-Signature=hush'", "https://host/d?X-Amz-Signature=***'"),
        ("az://box/d?sv=1&sig=hush", "az://box/d?sv=1&sig=***"),
        ("http://host:5000/runs/@me and mail@host", "http://host:5000/runs/@me and mail@host"),
        ("is optimizer.lr = 3 the key? token=yes", "is optimizer.lr = 3 the key? token=yes"),
    ],
)
def test_passwords_and_tokens_of_uris_are_left_out(text, shown):
    assert without_secrets(text) == shown


def test_no_error_for_the_user_has_one():
    error = MachineError("http://me:hush@host does not answer.")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "http://***@host does not answer."
    assert isinstance(error, UserError)


def test_nor_what_is_printed_kept_or_tracked(tmp_path):
    output = io.StringIO()
    console = Console(10, 10, output)
    console.say("from http://me:hush@host")
    console.table([("data", "https://host/x?token=hush")])
    console.step(10, {"loss": 1.0, "tokens_per_s": 1.0, "learning_rate": 1.0})
    values = {
        "tracking": {"uri": "http://me:hush@host"},
        "data": {"sources": {"web": {"path": "https://host/x?token=hush", "weight": 1}}},
    }
    recipe = from_dict(Recipe, values)
    console.table(recipe.plan())
    kept = to_yaml(redacted(recipe))
    for text in (output.getvalue(), kept, json.dumps(flatten(redacted(recipe))), show_command("http://me:hush@host")):
        assert "hush" not in text
    assert "***" in kept
    assert redacted(redacted(recipe)) == redacted(recipe)
    check_same_run(recipe, redacted(recipe))


def test_nor_what_a_run_says_of_its_server(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    uri = "http://me:hush@127.0.0.1:9"
    with pytest.raises(UserError) as caught:
        recorded_run(tmp_path, uri=uri)._open_tracker()
    assert "http://***@127.0.0.1:9 does not answer (Connection refused)" in str(caught.value)
