"""Opening checkpoints as our models: dense and MoE, ours and transformers'."""

from pathlib import Path

import torch
from transformers import AutoConfig, DogeConfig
from transformers import DogeForCausalLM as TransformersDogeForCausalLM

from doge.common.errors import UserError
from doge.conversion.transformers_moe import convert_transformers_moe
from doge.model.configuration import DogeMoeConfig
from doge.model.modeling import DogeForCausalLM, DogeMoeForCausalLM


def load_model(path: str | Path, dtype: torch.dtype | str = "auto") -> DogeForCausalLM:
    """Open a checkpoint: a dense Doge, a Doge-MoE of ours, or one in transformers' MoE layout.

    Args:
        path: Directory or hub id.
        dtype: Dtype of the parameters; "auto" keeps the checkpoint's.

    Raises:
        UserError: There is no checkpoint, it is not a Doge model, or its weights do not fit its configuration.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"There is no model that can be opened at {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(config, DogeConfig):
        raise UserError(f"{path} holds a {config.model_type!r} model, not a Doge one ('doge' or 'doge_moe').")
    if isinstance(config, DogeMoeConfig):
        model_class = DogeMoeForCausalLM
    elif config.is_moe:
        model_class = TransformersDogeForCausalLM
    else:
        model_class = DogeForCausalLM
    try:
        model, report = model_class.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"The weights at {path} do not fit its config.json: {str(error).splitlines()[0]}") from error
    for kind in ("missing_keys", "unexpected_keys"):
        if report[kind]:
            problem = "lack" if kind == "missing_keys" else "hold an unknown"
            raise UserError(f"The weights at {path} {problem} {min(report[kind])!r}: this is not a whole Doge model.")
    return convert_transformers_moe(model) if model_class is TransformersDogeForCausalLM else model
