"""``import doge`` is cheap, and decoding starts without DeepSpeed, the training or Ray."""

import subprocess
import sys

import pytest

import doge


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh process has imported after ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_no_library():
    assert not modules_after("import doge; dir(doge)") & {"torch", "transformers", "numpy"}


@pytest.mark.slow
def test_decoding_imports_no_training(tmp_path):
    code = (
        "import doge\n"
        "from doge.model.configuration import ModelRecipe\n"
        "from doge.model.modeling import build_model\n"
        "config = ModelRecipe(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1).build()\n"
        f"build_model(config).save_pretrained({str(tmp_path)!r})\n"
        f"decoder = doge.Decoder(doge.load_model({str(tmp_path)!r}), compile=False)\n"
        "assert len(decoder.generate([[1, 2, 3]], 2, eos_token_id=-1)[0]) == 2\n"
    )
    found = modules_after(code)
    assert "doge.generation.decoder" in found
    assert not {
        name for name in found if name.split(".")[0] in ("deepspeed", "ray") or name.startswith("doge.training")
    }


def test_the_package_names_what_it_offers():
    assert {"Decoder", "load_model"} <= set(dir(doge))
    with pytest.raises(AttributeError, match="has no attribute 'decoder_'"):
        _ = doge.decoder_
