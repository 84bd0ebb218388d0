"""Converting a model in transformers' MoE layout into a Doge-MoE of ours."""

import math

import torch
from transformers import DogeForCausalLM as TransformersDogeForCausalLM

from doge.common.errors import UserError
from doge.conversion.grow_experts import moe_config
from doge.model.modeling import DogeMoeForCausalLM, build_model


def convert_transformers_moe(model: TransformersDogeForCausalLM) -> DogeMoeForCausalLM:
    """Convert to a model of ours that computes what transformers' MoE layer intends for each token.

    There, a token's two vectors of n = floor(sqrt(num_experts)) router logits are added pairwise, and the best
    num_experts_per_tok of the n x n sums are softmaxed. With more than one token, the published code mixes the logits
    of different tokens, which is not reproduced here. Its router becomes our queries, with n channels in each half, and
    our keys are unit vectors, so that the scores are the same numbers. Experts from n * n on, which no router logit
    reaches, are dropped.

    Raises:
        UserError: The model is dense.
    """
    if not model.config.is_moe:
        raise UserError("This model is dense (is_moe is False): use add_experts to make an MoE model of it.")
    side = math.isqrt(model.config.num_experts)
    config = moe_config(
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
