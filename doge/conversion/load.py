"""Opens checkpoints as our models (dense and MoE, ours and transformers'), and grows dense models into MoE ones."""

import math
from pathlib import Path

import torch
from transformers import AutoConfig, DogeConfig
from transformers import DogeForCausalLM as TransformersDogeForCausalLM

from doge.common.errors import UserError
from doge.model.configuration import DogeMoeConfig, check_config
from doge.model.experts import DogeCDMoE
from doge.model.modeling import DogeForCausalLM, DogeMoeForCausalLM, build_model

_EXPERT_PARAMETERS = ("queries.weight", "keys", "down_embed.weight", "up_embed.weight")


def load_model(path: str | Path, dtype: torch.dtype | str = "auto") -> DogeForCausalLM:
    """Opens a checkpoint folder (or hub name): a dense Doge, a Doge-MoE of ours, or one in transformers' MoE layout.

    Args:
        dtype: of the parameters; "auto" keeps the checkpoint's.

    Raises:
        UserError: there is no checkpoint there, or it is not a Doge model, or its weights do not fit its configuration.
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


def convert_transformers_moe(model: TransformersDogeForCausalLM) -> DogeMoeForCausalLM:
    """Our model with the function that transformers' MoE layer intends for each token.

    There, a token's two vectors of n = floor(sqrt(num_experts)) router logits are added pairwise and the best
    num_experts_per_tok of the n x n sums are softmaxed; for more than one token the published code mixes the logits of
    different tokens, which is not reproduced here. Its router becomes our queries, n channels a half, with unit vectors
    as keys: the scores are the same numbers. Experts from n * n on, which no router logit reaches, are dropped.

    Raises:
        UserError: the model is dense.
    """
    if not model.config.is_moe:
        raise UserError("This model is dense (is_moe is False): use add_experts to make an MoE model of it.")
    side = math.isqrt(model.config.num_experts)
    config = _moe_config(
        model.config,
        num_experts=side * side,
        num_expert_heads=1,
        num_experts_per_tok=model.config.num_experts_per_tok,
        expert_retrieval_size=2 * side,
    )
    state = model.state_dict()
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp."
        router = state.pop(prefix + "router_gate.weight")
        state[prefix + "queries.weight"] = router
        state[prefix + "keys"] = torch.eye(side, dtype=router.dtype, device=router.device).repeat(2, 1).unsqueeze(0)
        for name in ("down_embed.weight", "up_embed.weight"):
            state[prefix + name] = state[prefix + name][: side * side]
    converted = build_model(config).to(model.dtype).to(model.device)
    converted.load_state_dict(state)
    return converted.train(model.training)


def add_experts(
    model: DogeForCausalLM,
    *,
    num_experts: int,
    num_expert_heads: int,
    num_experts_per_tok: int,
    expert_retrieval_size: int = 256,
) -> DogeMoeForCausalLM:
    """An MoE model that computes what a dense one does: experts are added whose outputs (`up_embed`) are zero.

    The router and the experts' inputs are drawn from torch's global generator. Train `expert_parameter_names` alone
    for a while first, so that the experts learn before the rest moves.

    Args:
        model: a dense Doge, ours or transformers'; it is left as it is, and no memory is shared with it.

    Raises:
        UserError: the model has experts already, or the numbers do not fit together.
    """
    if model.config.is_moe:
        raise UserError("This model is an MoE model already: add_experts needs a dense one.")
    config = _moe_config(
        model.config,
        num_experts=num_experts,
        num_expert_heads=num_expert_heads,
        num_experts_per_tok=num_experts_per_tok,
        expert_retrieval_size=expert_retrieval_size,
    )
    grown = build_model(config).to(model.dtype).to(model.device)
    grown.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for module in grown.modules():
            if isinstance(module, DogeCDMoE):
                module.up_embed.weight.zero_()
    return grown.train(model.training)


def expert_parameter_names(model: torch.nn.Module) -> list[str]:
    """Names of the router's and the retrieved experts' parameters: those trained in the warm-up of `add_experts`."""
    return [
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, DogeCDMoE)
        for name in _EXPERT_PARAMETERS
    ]


def _moe_config(config: DogeConfig, **expert_fields: int) -> DogeMoeConfig:
    """The MoE configuration with a dense model's fields and the given ones, checked."""
    settings = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "is_moe"):
        settings.pop(name, None)
    moe_config = DogeMoeConfig(**{**settings, **expert_fields, "router_aux_loss_coef": 0.0})
    check_config(moe_config)
    return moe_config
