"""Experts: each token finds its best ones by itself, and every expert can be found."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model, tokens

from doge.configuration import expert_grid
from doge.experts import DogeCDMoE, pop_expert_usage, retrieve_experts, track_expert_usage
from doge.modeling import build_model


@pytest.mark.parametrize("num_experts", [12, 32, 512])
@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_retrieval_equals_the_best_of_all_pairs(num_experts, top_k):
    grid = expert_grid(num_experts)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(50, 2, 2, 8, generator=generator)
    keys = torch.randn(2, sum(grid), 8, generator=generator)
    scores, experts = retrieve_experts(query, keys, grid, top_k)
    rows = torch.einsum("thr,hnr->thn", query[:, :, 0], keys[:, : grid[0]])
    columns = torch.einsum("thr,hnr->thn", query[:, :, 1], keys[:, grid[0] :])
    best = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(-2).topk(top_k)
    torch.testing.assert_close(scores, best.values)
    assert torch.equal(experts, best.indices)


@pytest.mark.parametrize("num_experts", [12, 512, 1536])
def test_every_expert_is_reachable(num_experts):
    rows, columns = expert_grid(num_experts)
    keys = torch.randn(1, rows + columns, 64, generator=torch.Generator().manual_seed(0))
    keys = torch.nn.functional.normalize(keys, dim=-1)  # a key is then the best match of itself
    pairs = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    query = torch.stack([keys[0, pairs[:, 0]], keys[0, rows + pairs[:, 1]]], dim=1).unsqueeze(1)
    _, experts = retrieve_experts(query, keys, (rows, columns), 1)
    assert torch.equal(experts.flatten(), torch.arange(num_experts))


def test_only_candidates_are_scored():
    from allocations import Allocations

    with Allocations() as allocations:
        retrieve_experts(torch.randn(5, 2, 2, 8), torch.randn(2, 32 + 64, 8), (32, 64), 4)
    assert max(shape[-1] for shape, _ in allocations.results if shape) <= 96


def layer_and_tokens(dtype=torch.float32):
    layer = tiny_model(moe=True, dtype=dtype).model.layers[0].mlp
    return layer, torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_layer_equals_its_definition():
    layer, hidden = layer_and_tokens()
    rows = layer.grid[0]
    expected = []
    for x in hidden.flatten(0, 1):
        output = layer.down_proj(torch.nn.functional.silu(layer.gate_proj(x)) * layer.up_proj(x))
        for head, query in enumerate(layer.queries(x).view(layer.num_expert_heads, 2, -1)):
            scores = (layer.keys[head, :rows] @ query[0]).unsqueeze(1) + layer.keys[head, rows:] @ query[1]
            best = scores.flatten().topk(layer.top_k)
            for weight, expert in zip(best.values.softmax(0), best.indices, strict=True):
                activation = torch.nn.functional.silu(x @ layer.down_embed.weight[expert])
                output = output + weight * activation * layer.up_embed.weight[expert]
        expected.append(output)
    torch.testing.assert_close(layer(hidden).flatten(0, 1), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_routing_is_the_same_for_a_token_alone_and_in_a_batch():
    layer, hidden = layer_and_tokens()
    together = layer(hidden)
    for row in range(2):
        for position in range(0, 40, 7):
            alone = layer(hidden[row : row + 1, position : position + 1])
            torch.testing.assert_close(alone[0, 0], together[row, position], atol=1e-5, rtol=1e-4)


def test_one_token_alone_gathers_rows_and_gets_the_same_gradient():
    layer, hidden = layer_and_tokens()
    token = hidden[0, 0].view(1, 1, -1)
    gradients = []
    for copies in (1, 20):  # six rows against a table of 32, and 120 rows
        layer.zero_grad()
        layer(token.expand(copies, -1, -1)).sum().div(copies).backward()
        gradients.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_new_model_spreads_its_tokens():
    torch.manual_seed(0)
    model = build_model(tiny_config(moe=True))
    track_expert_usage(model)
    model(tokens(4, 100))
    for layer in pop_expert_usage(model):
        assert layer["usage"] > 0.5
        assert layer["load_entropy"] > 0.7


def test_usage_counts_every_choice_and_starts_again():
    model = tiny_model(moe=True)
    layers = [module for module in model.modules() if isinstance(module, DogeCDMoE)]
    model(tokens(1, 10))
    assert all(layer.expert_counts is None for layer in layers)  # off by default
    assert pop_expert_usage(model) == []
    track_expert_usage(model)
    model(tokens(2, 10))
    assert [layer.expert_counts.sum().item() for layer in layers] == [2 * 10 * 2 * 3] * 2
    layers[0].expert_counts.zero_()[5] = 8
    layers[1].expert_counts.fill_(3)
    assert pop_expert_usage(model) == [
        {"usage": 1 / 32, "load_entropy": pytest.approx(0), "max_load": pytest.approx(32)},
        {"usage": 1, "load_entropy": pytest.approx(1), "max_load": pytest.approx(1)},
    ]
    assert pop_expert_usage(model) == []
