"""An MoE model opens in a process that does not have this project, by the code beside its weights."""

import json
import os
import subprocess
import sys

import pytest
import tokenizers
import torch
from tiny_models import logits_of, tiny_model, tokens
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from doge.common.storage import Storage
from doge.conversion.export import export_model
from doge.conversion.load import load_model
from doge.conversion.model_code import add_model_code, model_code
from doge.model.modeling import DogeMoeForCausalLM
from doge.training.state.train_state import TrainState

ELSEWHERE = """
import sys
sys.modules["doge"] = None  # importing it, or anything below it, fails
import torch
from transformers import AutoModelForCausalLM

folder, again = sys.argv[1:]
input_ids = torch.load(f"{folder}/input_ids.pt")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
model.save_pretrained(again)
reopened = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
with torch.no_grad():
    logits = [m(input_ids).logits for m in (model, reopened)]
generated = model.generate(input_ids, max_new_tokens=8, do_sample=False)
torch.save((*logits, generated), f"{folder}/found.pt")
"""


def exported(folder, moe=True):
    model = tiny_model(moe, window=16)
    model.save_pretrained(folder)
    add_model_code(folder, model.config)
    return model


@pytest.mark.slow
def test_it_opens_where_the_project_is_not_installed(tmp_path):
    model = exported(tmp_path / "made")
    input_ids = tokens(2, 40)
    torch.save(input_ids, tmp_path / "made" / "input_ids.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "made"), str(tmp_path / "again")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    logits, reopened, generated = torch.load(tmp_path / "made" / "found.pt")
    torch.testing.assert_close(logits, logits_of(model, input_ids), atol=1e-5, rtol=0)
    assert torch.equal(reopened, logits)
    assert torch.equal(generated, model.generate(input_ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "MoE"])
def test_the_export_of_a_training_has_the_code_if_it_has_experts(tmp_path, moe):
    model = tiny_model(moe)
    words = tokenizers.models.WordLevel({"<begin>": 0, "<end>": 1, "<pad>": 2, "word": 3}, unk_token="word")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), bos_token="<begin>", eos_token="<end>", pad_token="<pad>"
    )
    state = TrainState(1, dict(model.named_parameters()), {})
    export_model(state, model.config, tokenizer, Storage(str(tmp_path)), "model")
    assert ("auto_map" in json.loads((tmp_path / "model" / "config.json").read_text())) == moe
    assert {path.name for path in (tmp_path / "model").glob("*.py")} == (set(model_code()) if moe else set())


def test_where_the_project_is_there_its_own_classes_open_it(tmp_path):
    exported(tmp_path)
    for opened in (load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)):
        assert type(opened) is DogeMoeForCausalLM


def test_a_copy_that_is_saved_without_the_code_names_none(tmp_path):
    exported(tmp_path / "made")
    load_model(tmp_path / "made").save_pretrained(tmp_path / "copy")
    assert "auto_map" not in json.loads((tmp_path / "copy" / "config.json").read_text())


def test_a_dense_model_needs_no_code(tmp_path):
    exported(tmp_path, moe=False)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_the_code_imports_nothing_of_the_project_and_registers_nothing():
    for name, text in model_code().items():
        compile(text, name, "exec")
        assert "from doge" not in text, name
        assert "import doge" not in text, name
        assert "AutoConfig.register(" not in text, name
