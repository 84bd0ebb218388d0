import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.runs.recipe import Recipe, check_same_run
from doge.common.config_tree import flatten, from_dict, read_yaml, to_dict
from doge.common.errors import UserError
from jobs import pretrain
from jobs.command import RECIPES, find_recipe, main, recipe_names

ROOT = Path(__file__).parents[2]

PUBLISHED = {
    "Doge-20M": (8_000, 256, 8e-3),
    "Doge-60M": (16_000, 512, 6e-3),
    "Doge-160M": (24_000, 768, 4e-3),
    "Doge-320M": (32_000, 1_024, 2e-3),
}
MOE = {
    "Doge-MoE-20M": "Doge-20M",
    "Doge-MoE-80M": "Doge-60M",
    "Doge-MoE-220M": "Doge-160M",
    "Doge-MoE-500M": "Doge-320M",
}


@pytest.mark.parametrize("name", [*PUBLISHED, *MOE])
def test_the_model_recipes_hold_the_published_hyperparameters(name):
    recipe = read_yaml(Recipe, find_recipe(name))
    recipe.check()
    steps, batch, lr = PUBLISHED[MOE.get(name, name)]
    assert (recipe.training.max_steps, recipe.training.global_batch_size, recipe.optimizer.lr) == (steps, batch, lr)
    assert (recipe.lr_scheduler.warmup_steps, recipe.lr_scheduler.decay_steps) == (steps // 10, steps // 10)
    assert recipe.name == recipe.model.preset == name
    assert recipe.data.sequence_length == 2048
    assert recipe.data.held_out_sequences == 1000
    weights = {source: round(values.weight, 3) for source, values in recipe.data.sources.items()}
    assert weights == {"fineweb-edu-dedup": 0.7, "cosmopedia-v2": 0.2, "python-edu": 0.05, "finemath-4plus": 0.05}


def test_every_recipe_survives_being_written_and_read():
    for name in recipe_names():
        recipe = read_yaml(Recipe, find_recipe(name))
        recipe.check()
        assert from_dict(Recipe, to_dict(recipe)) == recipe


def test_a_recipe_in_a_folder_has_the_folders_name_and_help_lists_it(capsys, monkeypatch):
    assert "fast/tiny" in recipe_names()
    assert not [name for name in recipe_names() if "smollm" in name]  # what several recipes share is none itself
    assert find_recipe("fast/tiny") == RECIPES / "fast" / "tiny.yaml"
    with pytest.raises(UserError, match=r"no recipe fast/tini; the nearest is fast/tiny"):
        find_recipe("fast/tini")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--recipe", "fast/tiny", "--help"])
    with pytest.raises(SystemExit):
        main(pretrain.Pretrain, pretrain.run, pretrain.__doc__)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "tiny, fast/" in shown


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("fast/")])
def test_a_fast_recipe_changes_nothing_but_how_it_learns(name):
    fast, published = (read_yaml(Recipe, find_recipe(wanted)) for wanted in (name, name.removeprefix("fast/")))
    assert fast.name == f"fast-{published.name}"
    parts = ("model", "tokenizer", "data", "engine", "scaling", "tracking", "ledger")
    starts = {"initializer_range": None, "initializer_scale": None}
    for part in parts:
        one, other = (getattr(recipe, part) for recipe in (fast, published))
        assert (replace(one, **starts), part) == (replace(other, **starts), part) if part == "model" else one == other
    assert fast.training_sequences <= published.training_sequences


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimiser": {}}, "no key optimiser; the nearest is optimizer"),
        ({"optimizer": {"learning_rat": 1}}, "no key optimizer.learning_rat"),
        ({"data": {"sources": {"web": {"pth": "x", "weight": 1}}}}, "the nearest is data.sources.web.path"),
        ({"training": {"max_steps": "many"}}, "training.max_steps = 'many'"),
        ({"training": {"max_steps": 0}}, "training.max_steps must be at least 1, not 0"),
        ({"engine": {"zero_stage": 4}}, "engine.zero_stage = 4"),
        ({"training": [1]}, "training must hold keys and values"),
        ({"training": {"max_steps": True}}, "training.max_steps must be a number, not true"),
        ({"optimizer": {"embedding_lr": False}}, "optimizer.embedding_lr must be a number, not false"),
        (
            {"data": {"sources": {"a": {"path": "x", "weight": True}}}},
            "data.sources.a.weight must be a number, not true",
        ),
        ({"optimizer": {"betas": [0.9, True]}}, r"optimizer.betas.1 must be a number, not true"),
        ({"scaling": {"resources_per_worker": {"CPU": True}}}, "resources_per_worker.CPU must be a number, not true"),
        ({"data": {"sources": {"a": {"path": " ", "weight": 1}}}}, "A source's path is empty: give a file"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr must be positive and finite, not 0.0"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr must be positive and finite, not nan"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr must be positive and finite, not inf"),
        ({"optimizer": {"betas": [0.9, 1]}}, r"optimizer.betas must be at least 0 and below 1, not \(0.9, 1.0\)"),
        ({"optimizer": {"eps": 0}}, "optimizer.eps must be positive"),
        ({"optimizer": {"weight_decay": -0.1}}, "optimizer.weight_decay must be finite and not negative, not -0.1"),
        ({"optimizer": {"max_grad_norm": 0}}, "optimizer.max_grad_norm must be positive, not 0.0"),
        ({"optimizer": {"embedding_lr": 0}}, "optimizer.embedding_lr must be positive and finite, not 0.0"),
        ({"optimizer": {"vector_lr": float("inf")}}, "optimizer.vector_lr must be positive and finite, not inf"),
        ({"optimizer": {"embedding_weight_decay": -1}}, "optimizer.embedding_weight_decay must be finite and not neg"),
        ({"optimizer": {"base_width": 0}}, "optimizer.base_width must be at least 1, not 0"),
        ({"training": {"z_loss": -1e-4}}, "training.z_loss must be finite and not negative, not -0.0001"),
        ({"lr_scheduler": {"decay_shape": "cosine"}}, "lr_scheduler.decay_shape = 'cosine' is invalid.*1-sqrt"),
        ({"scaling": {"num_cpus_per_worker": -1}}, "scaling.num_cpus_per_worker must be finite and not negative"),
        ({"training": {"save_seconds": 0}}, "training.save_seconds must be above 0, or null for no bound, not 0"),
        ({"training": {"spike_factor": 1.0}}, "training.spike_factor must be above 1, not 1: it bounds the loss"),
        ({"scaling": {"resources_per_worker": {"GPU": 0.5}}}, "asks for 0.5 GPU, but a worker takes one whole GPU"),
        ({"tracking": {"experiment": " "}}, "tracking.experiment is empty"),
        ({"scaling": {"max_failures": -2}}, r"scaling.max_failures must be at least -1 \(no limit\), not -2"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(values, sentence):
    with pytest.raises(UserError, match=sentence):
        from_dict(Recipe, values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"training": {"global_batch_size": 2}, "scaling": {"num_workers": 3}}, r"\(2\) is smaller than .* \(3\)"),
        ({"data": {"sequence_length": 4096}}, r"4096\) is beyond the model's max_position_embeddings"),
        ({"tokenizer": {"vocab_size": 40_000}}, r"40000\) does not fit the model's vocab_size"),
        ({"model": {"preset": "Doge-21M"}}, "Doge-20M"),
        ({"engine": {"zero_stage": 0, "precision": "bf16"}}, "zero-stage 1"),
        ({"lr_scheduler": {"warmup_steps": 9000}}, "nor together exceed"),
        (
            {"training": {"on_spike": "skip"}, "engine": {"states": "partitioned"}},
            "training.on_spike = skip needs the whole state on every worker",
        ),
        (
            {"data": {"sources": {"a": {"path": "x", "weight": float("nan")}}}},
            "a.weight must be a positive number, not",
        ),
        ({"name": "a/b"}, "plain name"),
        ({"name": ".."}, "plain name"),
        ({"tracking": {"uri": "localhost:5000"}}, "without its protocol: write http://localhost:5000"),
        ({"tracking": {"uri": "/data/my runs"}}, "a directory, .* give sqlite:////data/my runs/mlflow.db, or http"),
        ({"tracking": {"uri": "file:///data/runs"}}, "a directory, .* give sqlite:////data/runs/mlflow.db, or http"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(values, sentence):
    with pytest.raises(UserError, match=sentence):
        from_dict(Recipe, values).check()


def test_a_run_goes_on_only_with_what_it_was_started_with():
    started = from_dict(Recipe, {})
    longer = {
        "training": {"max_steps": 9000, "micro_batch_size": 2},
        "scaling": {"num_workers": 5},
        "engine": {"zero_stage": 3},
    }
    check_same_run(from_dict(Recipe, longer), started)
    for other in ({"optimizer": {"lr": 1}}, {"model": {"preset": "Doge-60M"}}, {"training": {"global_batch_size": 9}}):
        with pytest.raises(UserError, match=next(iter(flatten_keys(other)))):
            check_same_run(from_dict(Recipe, other), started)


def flatten_keys(values):
    return (f"{outer}.{inner}" for outer, inners in values.items() for inner in inners)


def test_a_base_recipe_is_merged_key_by_key(tmp_path):
    (tmp_path / "base.yaml").write_text("training: {max_steps: 5000, save_steps: 7}\n")
    (tmp_path / "child.yaml").write_text("base: base.yaml\ntraining: {max_steps: 4000}\n")
    recipe = read_yaml(Recipe, tmp_path / "child.yaml")
    assert (recipe.training.max_steps, recipe.training.save_steps) == (4000, 7)
    assert flatten(recipe)["training.max_steps"] == 4000


def test_null_takes_a_mapping_of_the_base_out(tmp_path):
    sources = "{web: {path: w, weight: 1}, code: {path: c, weight: 1}}"
    (tmp_path / "base.yaml").write_text(f"data: {{sources: {sources}}}\ntokenizer: {{path: x}}\n")
    (tmp_path / "child.yaml").write_text(
        "base: base.yaml\ndata: {sources: {code: null, books: {path: b, weight: 2}}}\ntokenizer: {path: null}\n"
    )
    (tmp_path / "grandchild.yaml").write_text("base: child.yaml\ndata: {sources: {books: null}}\n")
    (tmp_path / "wrong.yaml").write_text("base: base.yaml\ndata: {sources: {cod: null}}\n")
    child = read_yaml(Recipe, tmp_path / "child.yaml")
    assert (list(child.data.sources), child.tokenizer.path) == (["web", "books"], None)
    assert list(read_yaml(Recipe, tmp_path / "grandchild.yaml").data.sources) == ["web"]
    with pytest.raises(UserError, match=r"data\.sources\.cod must hold keys and values, not None"):
        read_yaml(Recipe, tmp_path / "wrong.yaml")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"name: \xff\xfe", "is not UTF-8 text"),
        (b"name: [", "is not valid YAML"),
        (b"name: a\x00b", "is not valid YAML"),
        (b"name: 2026-99-99", "is not valid YAML"),
        (b"- 1", "must hold keys and values"),
        (b"base: 3", "base = 3 must be the name of a YAML file"),
        (b"base: .", "cannot be read .Is a directory."),
        (b"base: recipe.yaml", "leads back to a file"),
        (b"base: other.yaml", "leads back to a file"),
        (b"name: a\nseed: 1\nname: b", "the key name stands twice, in lines 1 and 3: keep one of them"),
        (b"training: {max_steps: 1, seed: 2, max_steps: 3}", r"the key training\.max_steps stands twice"),
        (b"'name': a\nname: b", "the key name stands twice"),
        (b"data: {sources: {web: {path: a}, web: {path: b}}}", r"the key data\.sources\.web stands twice"),
        (b"optimizer: {betas: [{x: 1, x: 2}]}", r"the key optimizer\.betas\.0\.x stands twice"),
        (b"a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}", r"the key b\.y stands twice"),
    ],
)
def test_a_recipe_file_that_cannot_be_read_is_one_sentence(content, sentence, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    (tmp_path / "other.yaml").write_text("base: recipe.yaml\n")
    with pytest.raises(UserError, match=sentence):
        read_yaml(Recipe, tmp_path / "recipe.yaml")


def test_merge_keys_and_aliases_are_no_doubled_keys(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "tokenizer: &t {vocab_size: 300}\n"
        "data:\n  sources:\n"
        "    web: &web {path: w, weight: 1}\n"
        "    code: &code {<<: *web, path: c}\n"
        "    books: {<<: [*code, *web], weight: 3}\n"
    )
    sources = read_yaml(Recipe, tmp_path / "recipe.yaml").data.sources
    assert {name: (source.path, source.weight) for name, source in sources.items()} == {
        "web": ("w", 1), "code": ("c", 1), "books": ("c", 3)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--recipe", "Doge-20"], "There is no recipe Doge-20; the nearest is Doge-20M"),
        (["--recipe", "nowhere.yaml"], "There is no file nowhere.yaml"),
        (["--optimizer.learning-rate", "1"], "There is no option --optimizer.learning-rate"),
        (["--from", "/nowhere/step-1"], "There is no checkpoint at /nowhere/step-1"),
    ],
)
def test_the_command_prints_one_sentence_and_fails(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--storage", str(tmp_path / "doge"), *arguments])
    with pytest.raises(SystemExit) as end:
        main(pretrain.Pretrain, pretrain.run, pretrain.__doc__)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}")
    assert not (tmp_path / "doge").exists()


def pretrain_process(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "jobs/pretrain.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_process_of_its_own_prints_nothing_but_the_sentence(tmp_path):
    result = pretrain_process("--storage", str(tmp_path / "doge"), "--recipe", "Doge-20")
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: There is no recipe Doge-20; the nearest is Doge-20M")


def test_help_shows_examples(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--help"])
    with pytest.raises(SystemExit) as end:
        main(pretrain.Pretrain, pretrain.run, pretrain.__doc__)
    assert end.value.code == 0
    assert "ray job submit --working-dir . -- python jobs/pretrain.py" in capsys.readouterr().out


def test_dry_run_starts_nothing(tmp_path, monkeypatch, capsys):
    arguments = ["--dry-run", "--recipe", "Doge-MoE-20M", "--storage", str(tmp_path / "d")]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    main(pretrain.Pretrain, pretrain.run, pretrain.__doc__)
    assert "15.8M parameters" in capsys.readouterr().out
    assert not (tmp_path / "d").exists()
