"""Experts: each token finds its best ones by itself, and every expert can be found."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model, tokens

from doge.model import experts as experts_module
from doge.model.configuration import ModelRecipe, expert_grid
from doge.model.experts import (
    DogeCDMoE,
    ExpertInput,
    ExpertOutput,
    gathers_rows,
    pop_expert_usage,
    retrieve_experts,
    track_expert_usage,
)
from doge.model.modeling import build_model


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_whatever_the_dtype(dtype):
    query, keys = torch.randn(50, 2, 2, 8).to(dtype), torch.randn(2, 12, 8).to(dtype)
    expected = retrieve_experts(query.float(), keys.float(), (4, 8), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = retrieve_experts(query, keys, (4, 8), 3)
    assert found[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


PATHS = pytest.mark.parametrize("gathers", [True, False], ids=["rows", "table"])


def use_path(monkeypatch, gathers: bool) -> None:
    monkeypatch.setattr(experts_module, "gathers_rows", lambda *_: gathers)


def experts_loss(hidden, weights, experts, down, up):
    """A scalar of all that the two modules compute, of dtype float64, and its gradient with respect to each input."""
    activations = torch.nn.functional.silu(down(hidden, experts)) * weights
    output = up(activations, experts)
    ramp = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    parameters = [down.weight, up.weight] if isinstance(down, ExpertInput) else [down.table, up.table]
    return output, torch.autograd.grad((output.double() * ramp).sum(), [hidden, weights, *parameters])


@PATHS
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_outputs_and_gradients_equal_those_of_gathered_rows_in_float64(monkeypatch, gathers, dtype, tolerance):
    use_path(monkeypatch, gathers)
    torch.manual_seed(0)
    down, up = ExpertInput(48, 32, dtype=dtype), ExpertOutput(48, 32, dtype=dtype)
    hidden = torch.randn(100, 32).to(dtype).requires_grad_()
    weights = torch.rand(100, 6).to(dtype).requires_grad_()
    experts = torch.randint(40, (100, 6)) + 4  # some have no token; two heads of a token may agree
    assert experts.sort().values.diff().eq(0).any()

    def rows(module):
        def product(other, experts):
            equation = "td,tkd->tk" if isinstance(module, ExpertInput) else "tk,tkd->td"
            return torch.einsum(equation, other, product.table[experts])

        product.table = module.weight.detach().double().requires_grad_()
        return product

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weights)]
    output, gradients = experts_loss(hidden, weights, experts, down, up)
    exact_output, exact_gradients = experts_loss(*exact, experts, rows(down), rows(up))
    for found, expected in zip((output, *gradients), (exact_output, *exact_gradients), strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_a_popular_expert_loses_no_token_to_rounding():
    down, up = ExpertInput(600, 8, dtype=torch.bfloat16), ExpertOutput(600, 8, dtype=torch.bfloat16)
    hidden, experts = torch.ones(2048, 8, dtype=torch.bfloat16), torch.full((2048, 2), 7)
    assert gathers_rows(experts, down.weight)
    down(hidden, experts).sum().backward()
    up(torch.ones(2048, 2, dtype=torch.bfloat16), experts).sum().backward()
    for module in (down, up):  # added one by one in bfloat16, ones end at 256
        assert module.weight.grad[7].eq(4096).all()
        assert module.weight.grad.sum() == 8 * 4096


def test_neither_the_chosen_rows_nor_all_scores_of_the_tokens_ever_exist():
    from allocations import Allocations

    layer = DogeCDMoE(tiny_config(moe=True, num_experts=2048))
    layer.apply(lambda module: [torch.nn.init.normal_(p) for p in module.parameters(recurse=False)])
    hidden = torch.randn(1, 400, 64, requires_grad=True)
    with Allocations() as allocations:
        layer(hidden).sum().backward()
    sizes = {shape: torch.Size(shape).numel() for shape, _ in allocations.results}
    del sizes[2048, 64]  # a gradient of the table
    assert max(sizes.values()) < 400 * 6 * 64  # tokens * k * d, less than tokens * num_experts


@pytest.mark.parametrize("preset", ["Doge-MoE-20M", "Doge-MoE-80M", "Doge-MoE-220M", "Doge-MoE-500M"])
def test_the_rows_of_a_preset_are_gathered_in_any_dtype(preset):
    config = ModelRecipe(preset).build()
    experts = torch.empty(4096, config.num_expert_heads * config.num_experts_per_tok, dtype=torch.int64, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        table = torch.empty(config.num_experts, config.hidden_size, dtype=dtype, device="meta")
        assert gathers_rows(experts, table)


def test_a_table_of_which_much_is_chosen_is_multiplied_whole_unless_few_tokens_come():
    table = torch.empty(32, 64)
    assert not gathers_rows(torch.empty(100, 6), table)
    assert not gathers_rows(torch.empty(8, 4), table)
    assert gathers_rows(torch.empty(7, 4), table)


@pytest.mark.slow
@PATHS
def test_a_compiled_layer_is_one_graph_and_equals_itself(monkeypatch, gathers):
    use_path(monkeypatch, gathers)
    layer, hidden = layer_and_tokens()
    track_expert_usage(layer)
    results = []
    for forward in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        inputs = hidden.clone().requires_grad_()
        output = forward(inputs)
        output.square().sum().backward()
        results.append([output, inputs.grad, *(p.grad.clone() for p in layer.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert layer.expert_counts.sum() == 2 * 80 * 6  # of both


def test_counting_breaks_no_graph_and_waits_for_no_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer, hidden = layer_and_tokens()
    track_expert_usage(layer)
    torch.compile(layer, fullgraph=True, backend="eager")(hidden)
    assert layer.expert_counts.sum() == 80 * 6
    assert "expert_counts" not in layer.state_dict()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # its tensors have no values that could be read
        layer(fake.from_tensor(hidden))


@PATHS
def test_autocast_gives_the_dtype_of_the_shared_expert(monkeypatch, gathers):
    use_path(monkeypatch, gathers)
    layer, hidden = layer_and_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for inputs in (hidden, hidden.bfloat16()):
            output = layer(inputs)
            output.float().sum().backward()
            assert output.dtype == torch.bfloat16
            assert (output - layer(hidden)).norm() < 0.05 * output.norm()


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
