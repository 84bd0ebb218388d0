"""Growing a dense model into an MoE model that computes the same function."""

import torch
from transformers import DogeConfig

from doge.common.errors import UserError
from doge.model.configuration import DogeMoeConfig, check_config
from doge.model.experts import DogeCDMoE
from doge.model.modeling import DogeForCausalLM, DogeMoeForCausalLM, build_model

_EXPERT_PARAMETERS = ("queries.weight", "keys", "down_embed.weight", "up_embed.weight")


def add_experts(
    model: DogeForCausalLM,
    *,
    num_experts: int,
    num_expert_heads: int,
    num_experts_per_tok: int,
    expert_retrieval_size: int = 256,
) -> DogeMoeForCausalLM:
    """Build an MoE model that computes the same as a dense one: the outputs (`up_embed`) of its experts are zero.

    The router and the experts' inputs are drawn from torch's global generator. Train only `expert_parameter_names` for
    a while first, so that the experts learn before the other weights change.

    Args:
        model: A dense Doge, ours or transformers'; it does not change, and the result shares no memory with it.
        num_experts, num_expert_heads, num_experts_per_tok, expert_retrieval_size: See `DogeMoeConfig`.

    Raises:
        UserError: The model already has experts, or the numbers do not fit together.
    """
    if model.config.is_moe:
        raise UserError("This model is already an MoE model: add_experts needs a dense one.")
    config = moe_config(
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
    """Names of the parameters of the router and the retrieved experts, which are trained first after `add_experts`."""
    return [
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, DogeCDMoE)
        for name in _EXPERT_PARAMETERS
    ]


def moe_config(config: DogeConfig, **expert_fields: int) -> DogeMoeConfig:
    """The checked MoE configuration with another model's fields, except for the given ones.

    Raises UserError if the fields do not fit together.
    """
    settings = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "is_moe"):
        settings.pop(name, None)
    moe_config = DogeMoeConfig(**{**settings, **expert_fields, "router_aux_loss_coef": 0.0})
    check_config(moe_config)
    return moe_config
