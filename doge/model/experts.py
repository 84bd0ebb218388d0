"""Cross-Domain Mixture of Experts: a shared SwiGLU expert plus single-neuron experts retrieved by product keys.

For every token and expert head, a query of size r is split into two halves. The halves are scored against the n1 and
n2 keys of the two sides of a grid, whose cells are the experts; the score of expert (i, j) is the sum of its two keys'
scores. The best k pairs lie among the best k keys of each side, so only k x k sums are computed, never n1 x n2. The
retrieved experts add `sum softmax(score) * silu(x . down_embed) * up_embed` to the shared expert's output.

Sources: product keys, Lample et al. 2019 (arXiv:1907.05242); single-neuron experts, He 2024 (arXiv:2407.04153); the
combination with a shared expert, the Doge architecture of the SmallDoge team. Routing looks at one token at a time: no
token's experts depend on another token.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from doge.model.configuration import DogeMoeConfig, expert_grid

OPERATIONS_PER_BYTE = 16  # operations in the time that gathering a byte takes; see `gathers_rows`
_SUM_MODE = 0  # of torch's embedding-bag kernels


def retrieve_experts(
    query: torch.Tensor, keys: torch.Tensor, grid: tuple[int, int], top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the best `top_k` experts of every token and expert head.

    Args:
        query: (tokens, heads, 2, r / 2).
        keys: (heads, n1 + n2, r / 2), the first side's keys before the second side's.
        grid: (n1, n2); expert e stands in row e // n2 and column e % n2.

    Returns:
        Scores (float32) and expert numbers (int64), both (tokens, heads, top_k), best first.
    """
    # In float32: rounding the scores would let the kind of matmul decide which experts a token gets.
    row_query, column_query = query.float().unbind(dim=2)
    row_keys, column_keys = keys.float().split(grid, dim=1)
    with torch.autocast(query.device.type, enabled=False):
        row_scores, rows = torch.einsum("thr,hnr->thn", row_query, row_keys).topk(min(top_k, grid[0]))
        column_scores, columns = torch.einsum("thr,hnr->thn", column_query, column_keys).topk(min(top_k, grid[1]))
    pair_scores = (row_scores.unsqueeze(-1) + column_scores.unsqueeze(-2)).flatten(-2)
    pair_experts = (rows.unsqueeze(-1) * grid[1] + columns.unsqueeze(-2)).flatten(-2)
    scores, best = pair_scores.topk(top_k)
    return scores, pair_experts.gather(-1, best)


class ExpertInput(nn.Embedding):
    """One input vector per expert: `weight` (num_experts, hidden_size)."""

    def forward(self, hidden: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Dot products of (tokens, hidden_size) with the vectors of experts (tokens, k) -> (tokens, k)."""
        if gathers_rows(experts, self.weight):
            return _GatherDot.apply(hidden.to(self.weight.dtype), experts, self.weight)
        return F.linear(hidden, self.weight).gather(1, experts)


class ExpertOutput(nn.Embedding):
    """One output vector per expert, `weight` (num_experts, hidden_size)."""

    def forward(self, activations: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Sums of the vectors of experts (tokens, k) weighted by activations (tokens, k) -> (tokens, hidden_size)."""
        if gathers_rows(experts, self.weight):
            return _WeightedSum.apply(activations.to(self.weight.dtype), experts, self.weight)
        dense = activations.new_zeros(len(activations), len(self.weight)).scatter_add(1, experts, activations)
        return dense @ self.weight


def gathers_rows(experts: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether to read the rows of experts (tokens, k) one by one, instead of multiplying by the whole table.

    For a token, a matmul with the table (num_experts, d) takes 2 * num_experts * d operations, and gathering reads
    k * d * itemsize bytes, mostly from a cache. Every preset gathers, in any dtype. A matmul is faster if a large part
    of the table is chosen, except for a few tokens, which read less than the whole table.
    """
    operations, gathered_bytes = 2 * len(weight), experts.shape[1] * weight.element_size()
    return operations > OPERATIONS_PER_BYTE * gathered_bytes or experts.numel() < len(weight)


# Gathering needs three products, and the derivatives of each are the other two. All of them run in kernels that read a
# row of the table, use it and drop it: no tensor of size tokens * k * d exists, forward or backward.


class _GatherDot(torch.autograd.Function):
    """`out[t, k] = hidden[t] . table[experts[t, k]]`."""

    @staticmethod
    def forward(ctx, hidden, experts, table):
        ctx.save_for_backward(hidden, experts, table)
        return _gather_dot(hidden, experts, table)

    @staticmethod
    def backward(ctx, grad):
        hidden, experts, table = ctx.saved_tensors
        hidden_grad = _weighted_sum(grad, experts, table) if ctx.needs_input_grad[0] else None
        table_grad = _sum_by_expert(grad, experts, hidden, len(table)) if ctx.needs_input_grad[2] else None
        return hidden_grad, None, table_grad


class _WeightedSum(torch.autograd.Function):
    """`out[t] = sum over k of weights[t, k] * table[experts[t, k]]`."""

    @staticmethod
    def forward(ctx, weights, experts, table):
        ctx.save_for_backward(weights, experts, table)
        return _weighted_sum(weights, experts, table)

    @staticmethod
    def backward(ctx, grad):
        weights, experts, table = ctx.saved_tensors
        weights_grad = _gather_dot(grad, experts, table) if ctx.needs_input_grad[0] else None
        table_grad = _sum_by_expert(weights, experts, grad, len(table)) if ctx.needs_input_grad[2] else None
        return weights_grad, None, table_grad


def _gather_dot(hidden: torch.Tensor, experts: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(tokens, d), (tokens, k), (num_experts, d) -> (tokens, k)."""
    # torch's kernel for this product is named after the one place where torch itself uses it.
    bag_of = torch.arange(len(experts), device=experts.device)
    offsets, bag_of = bag_of * experts.shape[1], bag_of.repeat_interleave(experts.shape[1])
    dot = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return dot(hidden, table, experts.flatten(), offsets, bag_of, _SUM_MODE).view_as(experts)


def _weighted_sum(weights: torch.Tensor, experts: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(tokens, k), (tokens, k), (num_experts, d) -> (tokens, d)."""
    return F.embedding_bag(experts, table, mode="sum", per_sample_weights=weights)


def _sum_by_expert(weights: torch.Tensor, experts: torch.Tensor, rows: torch.Tensor, num_experts: int) -> torch.Tensor:
    """`out[e] = sum over (t, k) with experts[t, k] = e of weights[t, k] * rows[t]`.

    The choices are sorted by expert, so that each expert's are summed at once and in a fixed order: without atomics,
    and in float32 for every dtype (bfloat16 would lose most of the thousands of terms of a popular expert).

    (tokens, k), (tokens, k), (tokens, d) -> (num_experts, d).
    """
    experts, order = experts.flatten().sort(stable=True)
    first = torch.searchsorted(experts, torch.arange(num_experts, device=experts.device))
    tokens = order // weights.shape[1]
    return F.embedding_bag(tokens, rows, first, mode="sum", per_sample_weights=weights.flatten()[order])


class DogeCDMoE(nn.Module):
    """Shared expert plus retrieved experts; see the module's docstring.

    Parameters: `gate_proj`, `up_proj`, `down_proj` of the shared expert, as in a dense layer; `queries.weight`
    (num_expert_heads * r, hidden_size); `keys` (num_expert_heads, n1 + n2, r / 2); `down_embed.weight` and
    `up_embed.weight` (num_experts, hidden_size), where down reads and up writes, as in transformers. The model that the
    layer belongs to initialises them.
    """

    def __init__(self, config: DogeMoeConfig):
        super().__init__()
        hidden_size, self.num_experts = config.hidden_size, config.num_experts
        self.num_expert_heads, self.top_k = config.num_expert_heads, config.num_experts_per_tok
        self.grid = expert_grid(config.num_experts)
        self.act_fn = ACT2FN[config.hidden_act]
        self.gate_proj = nn.Linear(hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, hidden_size, bias=config.mlp_bias)
        half = config.expert_retrieval_size // 2
        self.queries = nn.Linear(hidden_size, self.num_expert_heads * 2 * half, bias=False)
        self.keys = nn.Parameter(torch.empty(self.num_expert_heads, sum(self.grid), half))
        self.down_embed = ExpertInput(self.num_experts, hidden_size)
        self.up_embed = ExpertOutput(self.num_experts, hidden_size)
        self.expert_counts: torch.Tensor | None  # (num_experts,) int64 while usage is being tracked
        self.register_buffer("expert_counts", None, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden_size) -> the same."""
        shared = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        tokens = hidden_states.flatten(0, -2)
        query = self.queries(tokens).view(len(tokens), self.num_expert_heads, 2, -1)
        scores, experts = retrieve_experts(query, self.keys, self.grid, self.top_k)
        weights = scores.softmax(dim=-1).to(tokens.dtype).flatten(1)
        experts = experts.flatten(1)
        if self.expert_counts is not None:
            chosen = experts.flatten()
            self.expert_counts.index_add_(0, chosen, torch.ones_like(chosen))
        activations = self.act_fn(self.down_embed(tokens, experts)) * weights
        return shared + self.up_embed(activations, experts).view_as(shared).to(shared.dtype)


def track_expert_usage(model: nn.Module) -> None:
    """Start counting the tokens that each expert gets in later forwards, on the model's device; off by default.

    Nothing waits for the device before `pop_expert_usage`, and a compiled layer stays one graph.
    """
    for layer in _expert_layers(model):
        layer.expert_counts = torch.zeros(layer.num_experts, dtype=torch.int64, device=layer.down_embed.weight.device)


def pop_expert_usage(model: nn.Module) -> list[dict[str, float]]:
    """Return the usage of experts since the last call, one entry per MoE layer, and reset the counts.

    The counts of all layers are read from the device at once.

    Returns:
        For each layer `usage`, the share of experts that got a token; `load_entropy`, the entropy of the load over
        experts divided by its maximum, 1 for an even load; `max_load`, the load of the busiest expert in multiples of
        the mean. A layer that is not tracked, or saw no token, is left out.
    """
    tracked = [layer.expert_counts for layer in _expert_layers(model) if layer.expert_counts is not None]
    if not tracked:
        return []
    loads = torch.stack(tracked).cpu().double()
    for counts in tracked:
        counts.zero_()
    usage = []
    for load in loads[loads.any(dim=1)]:
        load = load / load.sum()
        entropy = -torch.xlogy(load, load).sum() / math.log(len(load))
        usage.append(
            {
                "usage": (load > 0).double().mean().item(),
                "load_entropy": entropy.item(),
                "max_load": load.max().item() * len(load),
            }
        )
    return usage


def _expert_layers(model: nn.Module) -> list[DogeCDMoE]:
    return [module for module in model.modules() if isinstance(module, DogeCDMoE)]
