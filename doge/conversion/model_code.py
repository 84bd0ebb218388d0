"""The code of the model beside its weights, so that an MoE model opens where this project is not installed.

transformers loads such code with `trust_remote_code=True`, from files in one folder that import each other relatively.
These are copies of the model's own modules, in which nothing but the imports is different. Of the attention's backends
they have the one that computes every call; the others register operations, which a process can do only once. A dense
model needs no code: transformers has a Doge of its own.
"""

import ast
import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path

from transformers import DogeConfig

from doge.model.attention.backends.torch_sdpa import TorchSdpa
from doge.model.configuration import DogeMoeConfig, has_experts
from doge.model.modeling import DogeMoeForCausalLM

_PACKAGE = "doge"
_NOTE = "# A copy of {module}, for transformers' trust_remote_code; only its imports are different.\n"


def add_model_code(directory: str | Path, config: DogeConfig) -> None:
    """Make a saved MoE model open with `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`.

    Nothing is done for a dense model.

    Args:
        directory: A `save_pretrained` directory; the code and an entry `auto_map` in its config.json are added.
        config: The configuration of the model in it.
    """
    if not has_experts(config):
        return
    directory = Path(directory)
    for name, text in model_code().items():
        (directory / name).write_text(text)
    file = directory / "config.json"
    settings = json.loads(file.read_text())
    classes = {"AutoConfig": DogeMoeConfig, "AutoModelForCausalLM": DogeMoeForCausalLM}
    settings["auto_map"] = {auto: _reference(own) for auto, own in classes.items()}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def model_code() -> dict[str, str]:
    """The files of the MoE model's code, by name: its module, and every module that this imports."""
    modules = [DogeMoeForCausalLM.__module__, TorchSdpa.__module__]
    files = {}
    for module in modules:  # which grows
        text, imported = _copy(module)
        modules += [name for name in imported if name not in modules]
        files[f"{_flat(module)}.py"] = _NOTE.format(module=module) + text
    # transformers copies what a module imports in this form, and a backend is known once it is imported.
    files[f"{_flat(modules[0])}.py"] += f"\nfrom .{_flat(modules[1])} import TorchSdpa  # noqa: E402, F401\n"
    return files


def _copy(module: str) -> tuple[str, list[str]]:
    """A module's source with relative imports of our modules, and these modules' names.

    Statements that register a class with transformers are left out: the copy is known by its folder's config.json.
    """
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert isinstance(spec.loader, SourceFileLoader)
    source = spec.loader.get_source(module)
    assert source is not None
    lines, imported = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == _PACKAGE:
            imported.append(node.module)
            before, after = f"from {node.module} import", f"from .{_flat(node.module)} import"
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(before, after, 1)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _registers(node.value):
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[number - 1] = ""
    return "".join(lines), imported


def _registers(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == "register"


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _reference(model_class: type) -> str:
    return f"{_flat(model_class.__module__)}.{model_class.__name__}"
