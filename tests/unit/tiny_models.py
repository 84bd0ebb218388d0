"""Tiny models for the tests, with weights far enough from their start that every term of the model counts."""

import torch

from doge.model.configuration import ModelRecipe
from doge.model.modeling import DogeForCausalLM, build_model

VOCAB_SIZE = 128


def tiny_config(moe: bool = False, window: int = 2048, **changes):
    """Two layers of width 64, four heads over two key-value heads; with `moe`, 32 experts."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "keep_window_size": window,
    }
    if moe:
        fields |= {"num_experts": 32, "num_expert_heads": 2, "num_experts_per_tok": 3, "expert_retrieval_size": 16}
    return ModelRecipe("Doge-MoE-20M" if moe else "Doge-20M", **(fields | changes)).build()


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Moves every parameter away from its initial value, reproducibly; biases of keys spread widely."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if name.endswith(".A") or "dt_proj" in name else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def tiny_model(moe: bool = False, window: int = 2048, dtype=torch.float32, **changes) -> DogeForCausalLM:
    torch.manual_seed(0)
    return shake(build_model(tiny_config(moe, window, **changes))).to(dtype).eval()


def tokens(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    """(batch, seq) token ids, no special ones, none twice in a row: equal tokens would tie for the window."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCAB_SIZE - 3, generator=generator)[:seq] + 3 for _ in range(batch)])


def logits_of(model: DogeForCausalLM, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
    """(batch, seq, vocab_size) float32 logits, without gradient."""
    with torch.no_grad():
        return model(input_ids, **inputs).logits.float()


def logits_in_pieces(model: DogeForCausalLM, input_ids: torch.Tensor, sizes: list[int], **inputs) -> torch.Tensor:
    """The same logits, computed over a cache in pieces of the given sizes; an attention_mask grows along."""
    cache, start, pieces = None, 0, []
    mask = inputs.pop("attention_mask", None)
    for size in sizes:
        piece_mask = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        with torch.no_grad():
            output = model(
                input_ids[:, start : start + size], past_key_values=cache, use_cache=True, **piece_mask, **inputs
            )
        cache, start = output.past_key_values, start + size
        pieces.append(output.logits.float())
    assert start == input_ids.shape[1]
    return torch.cat(pieces, dim=1)
