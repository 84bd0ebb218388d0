"""The models that the decoding benchmarks run: the same random weights as ours and as transformers'."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(preset: str, dtype: torch.dtype):
    """The same weights as our model and as transformers' (`attn_implementation="sdpa"`)."""
    from transformers import DogeForCausalLM

    from doge.model.configuration import ModelRecipe
    from doge.model.modeling import build_model

    torch.manual_seed(0)
    ours = build_model(ModelRecipe(preset).build())
    with torch.no_grad():  # a new model would repeat one token for ever, and all keys would have one bias
        for name, parameter in ours.named_parameters():
            if name.endswith(".A") or "dt_proj" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.ndim == 2:
                parameter.mul_(3)
    config = ModelRecipe(preset).build()
    config._attn_implementation = "sdpa"
    theirs = DogeForCausalLM(config)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype).eval(), theirs.to(dtype).eval()
