"""Opening checkpoints as our models: dense and MoE, ours and transformers'."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, DogeConfig
from transformers import DogeForCausalLM as TransformersDogeForCausalLM

from doge.common.errors import UserError
from doge.common.git_lfs import refuse_pointer
from doge.common.words import listed
from doge.conversion.transformers_moe import convert_transformers_moe
from doge.model.configuration import has_experts
from doge.model.modeling import DogeForCausalLM, DogeMoeForCausalLM

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_model(path: str | Path, dtype: torch.dtype | str = "auto") -> DogeForCausalLM:
    """Open a checkpoint: a dense Doge, a Doge-MoE of ours, or one in transformers' MoE layout.

    Args:
        path: Directory or hub id.
        dtype: Dtype of the parameters; "auto" keeps the checkpoint's.

    Raises:
        UserError: There is no checkpoint, it is not a Doge model, its files are damaged, or its weights do not fit its
            configuration.
    """
    if Path(path).is_dir():
        _check_config_file(Path(path) / "config.json")
    config = _config(path)
    if Path(path).is_dir():
        _check_weight_files(Path(path))
    if has_experts(config):
        model_class = DogeMoeForCausalLM
    elif config.is_moe:
        model_class = TransformersDogeForCausalLM
    else:
        model_class = DogeForCausalLM
    try:
        with _without_load_report():
            model, report = model_class.from_pretrained(
                path, config=config, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"The weights at {path} cannot be loaded: {_first_line(error)}") from error
    _check_complete(path, report, config.num_hidden_layers)
    return convert_transformers_moe(model) if model_class is TransformersDogeForCausalLM else model


def _config(path: str | Path) -> DogeConfig:
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # OSError, ValueError, or an error of any kind about a field's type or value
        raise UserError(f"There is no model that can be opened at {path}: {_first_line(error)}") from error
    if not isinstance(config, DogeConfig):
        raise UserError(f"{path} holds a {config.model_type!r} model, not a Doge one ('doge' or 'doge_moe').")
    # Code that an export carries stays with the export: a copy that is saved from here has none.
    config.__dict__.pop("auto_map", None)
    return config


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_weight_files(folder: Path) -> None:
    """Raise UserError if a weight file is missing, a Git LFS pointer or damaged, as far as its header tells."""
    names = {_WEIGHTS}
    if (folder / _INDEX).is_file() and not (folder / _WEIGHTS).is_file():
        names = _shards(folder / _INDEX)
    missing = sorted(name for name in names if not (folder / name).is_file())
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    if missing == [_WEIGHTS] and pickled:
        raise UserError(
            f"The weights at {folder} are pickled ({pickled[0]}), and unpickling may run any code: open them where you "
            "trust them, and save them with save_pretrained, which writes model.safetensors."
        )
    if missing:
        raise UserError(f"The checkpoint at {folder} is not whole: it lacks {listed(missing)}.")
    for name in sorted(names):
        refuse_pointer(folder / name)
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"The file {folder / name} is damaged or cut off ({error}): copy it again.") from error


def _shards(index: Path) -> set[str]:
    """The names of the weight files that an index lists."""
    refuse_pointer(index)
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({type(error).__name__}: {error}): copy the file again.") from error


def _check_config_file(file: Path) -> None:
    if not file.is_file():
        return  # which transformers says
    refuse_pointer(file)
    try:
        fields = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): copy the file again.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} holds no JSON object: it is not the configuration of a model.")


def _check_complete(path: str | Path, report: dict[str, set], layers: int) -> None:
    """Raise UserError unless the checkpoint had every weight of the model in its shape, and no other."""
    missing = report["missing_keys"]
    attentions = [f"model.layers.{layer}.self_attn" for layer in range(layers)]
    if {f"{name}.{norm}.weight" for name in attentions for norm in ("q_norm", "k_norm")} <= missing:
        raise UserError(
            f"The weights at {path} are in the layout of Doge before q_norm and k_norm, whose queries and keys are not "
            "normalised: no Doge of today computes what they do, so open them with the code they were published with."
        )
    for kind in ("missing_keys", "unexpected_keys"):
        if report[kind]:
            problem = "lack" if kind == "missing_keys" else "hold an unknown"
            raise UserError(f"The weights at {path} {problem} {min(report[kind])!r}: this is not a whole Doge model.")
    if report["mismatched_keys"]:
        name, found, expected = min(report["mismatched_keys"])
        raise UserError(
            f"The weights at {path} do not fit its config.json: {name!r} has the shape {tuple(found)}, and the "
            f"configuration says {tuple(expected)}."
        )


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from logging a table of what `_check_complete` says in a sentence."""
    log = logging.getLogger("transformers.modeling_utils")

    def drop(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(drop)
    try:
        yield
    finally:
        log.removeFilter(drop)
