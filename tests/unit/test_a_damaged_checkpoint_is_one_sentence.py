"""What is wrong with the files of a checkpoint is one sentence, before any weight is loaded where the files tell."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import logits_of, tiny_model, tokens

from doge.common.errors import UserError
from doge.conversion.load import load_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 52475232\n"


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def sentence(folder) -> str:
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def overwrite(content: bytes, name: str = "model.safetensors"):
    return lambda folder: (folder / name).write_bytes(content)


def cut(part: float):
    def apply(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])

    return apply


def rewrite(change):
    def apply(folder):
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return apply


def only_pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def before_the_norms(weights):
    """By heads, of which there are twice as many as key-value heads, and without norms of queries and keys."""
    return {
        name: torch.cat([w, w]) if name.endswith((".A", "dt_proj.weight")) else w
        for name, w in weights.items()
        if not name.endswith(("q_norm.weight", "k_norm.weight"))
    }


def before_transformers(weights):
    """The names of the code that was published beside the weights."""
    renamed = {
        "embed_tokens": "word_embed", "input_layernorm": "pre_layernorm", "mlp": "feed_forward",
        "model.norm": "model.final_layernorm", "post_attention_layernorm": "post_layernorm",
    }  # fmt: skip
    found = {}
    for name, weight in before_the_norms(weights).items():
        for new, old in renamed.items():
            name = name.replace(new, old)
        found[name] = weight
    return found


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (overwrite(POINTER), "git lfs pull"),
        (overwrite(POINTER, "config.json"), "git lfs pull"),
        (overwrite(b""), "damaged or cut off"),
        (overwrite(b"no weights at all"), "damaged or cut off"),
        (cut(0.001), "damaged or cut off"),
        (cut(0.5), "damaged or cut off"),
        (cut(0.999), "damaged or cut off"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
        (only_pickled, "pickled"),
        (overwrite(b"{", "config.json"), "not JSON"),
        (overwrite(b"\xff\xfe", "config.json"), "not JSON"),
        (overwrite(b"[1]", "config.json"), "no JSON object"),
        (overwrite(b"{}", "config.json"), "no model"),
        (overwrite(b'{"model_type": "doge", "hidden_size": "wide"}', "config.json"), "hidden_size"),
        (rewrite(before_the_norms), "before q_norm and k_norm"),
        (rewrite(before_transformers), "before q_norm and k_norm"),
        (rewrite(lambda weights: {**weights, "model.norm.weight": torch.ones(32)}), "model.norm.weight"),
    ],
)
def test_what_is_wrong_is_said(folder, damage, said):
    damage(folder)
    assert said in sentence(folder)


def test_a_shard_is_named_that_is_missing_or_damaged(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].write_bytes(POINTER)
    assert f"{shards[1]} is a Git LFS pointer" in sentence(sharded)
    shards[1].unlink()
    assert f"lacks {shards[1].name}" in sentence(sharded)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"weight_map": 3}'])
def test_a_damaged_index_is_named(sharded, content):
    overwrite(content, "model.safetensors.index.json")(sharded)
    assert "model.safetensors.index.json is damaged" in sentence(sharded)


def test_a_sharded_checkpoint_opens(sharded):
    assert torch.equal(logits_of(load_model(sharded), tokens(1, 20)), logits_of(tiny_model(), tokens(1, 20)))


def test_no_table_is_logged_beside_the_sentence(folder, caplog):
    rewrite(before_the_norms)(folder)
    with caplog.at_level(logging.WARNING):
        sentence(folder)
    assert not caplog.records


def test_the_configuration_may_be_wrong_instead(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 63}))
    with pytest.raises(UserError, match="hidden_size 63"):
        load_model(folder)
