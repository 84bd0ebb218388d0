"""All that a run does with a layer is few graphs; what PyTorch computes uncompiled all the same is counted and said."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_config, tiny_model

from cluster.workloads.telemetry import Telemetry
from doge.model import compilation
from doge.model.attention.backends import registry, triton_attention
from doge.model.experts import pop_expert_usage, track_expert_usage
from doge.model.modeling import DogeDecoderLayer
from doge.training.step_result import StepResult

LENGTH = 24


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """The graphs that are compiled meanwhile, by a compiler that runs them as they are."""
    from torch._dynamo.backends.registry import set_default_backend
    from torch._dynamo.utils import counters

    found = []

    def compiler(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    compilation._told.clear()
    monkeypatch.setattr(compilation, "can_compile", lambda device: True)
    set_default_backend(compiler)
    yield found
    set_default_backend(None)
    counters.clear()
    torch._dynamo.reset()


def one_pass(model, rows=1, length=LENGTH, packed=False):
    """Forward, and backward where gradients are wanted."""
    row = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(rows))
    positions = torch.arange(length).expand(rows, -1)
    loss = model(row, labels=row, position_ids=positions % 10 if packed else positions, use_cache=False).loss
    if torch.is_grad_enabled():
        loss.backward()


def do_all_of_a_run(model):
    """The probe's passes, steps of packed and of whole rows, empty micro-batches, evaluations, another length."""
    model.train()
    for rows in (1, 2, 4, 3):
        one_pass(model, rows)
    for packed in (True, False):
        for rows in (4, 3, 1):
            one_pass(model.train(), rows, packed=packed)
        one_pass(model, 1, 2)
        with torch.no_grad():
            for rows in (1, 4, 3):
                one_pass(model.eval(), rows, packed=packed)
            one_pass(model, 1, 2)
    for rows in (1, 3):
        one_pass(model.train(), rows, 16)


@pytest.mark.slow
def test_all_that_a_run_does_is_few_graphs(graphs):
    model = tiny_model(num_hidden_layers=2)
    assert compilation.compile_layers(model)
    do_all_of_a_run(model)
    assert 0 < len(graphs) <= 12  # of all layers: one row or more, packed or not, with gradients or not, two lengths
    assert not compilation.graph_breaks()
    assert compilation.tell_graph_breaks() is None


@pytest.mark.slow
def test_layers_of_experts_that_are_counted_are_few_graphs_too(graphs):
    model = tiny_model(moe=True, window=8, num_hidden_layers=2)
    assert compilation.compile_layers(model)
    track_expert_usage(model)
    for rows in (2, 3):
        one_pass(model, rows, packed=True)
    with torch.no_grad():
        one_pass(model, 2, packed=True)
    assert 0 < len(graphs) <= 3
    assert not compilation.graph_breaks()
    assert len(pop_expert_usage(model)) == 2


def test_more_variants_than_the_limit_are_counted_and_said_once(graphs, monkeypatch):
    monkeypatch.setattr(compilation, "RECOMPILE_LIMIT", 1)
    model = tiny_model(num_hidden_layers=2)
    compilation.compile_layers(model)
    one_pass(model)
    assert compilation.tell_graph_breaks() is None
    one_pass(model, packed=True)
    assert len(graphs) == 1
    assert compilation.graph_breaks() == {"Dynamo recompile limit exceeded": 1}
    sentence = (
        "torch.compile left 1 part of the layers to PyTorch, which is slower: Dynamo recompile limit exceeded (1)."
    )
    assert compilation.tell_graph_breaks() == sentence
    one_pass(model, packed=True)
    assert compilation.tell_graph_breaks() is None


def test_a_place_that_no_graph_can_hold_is_counted(graphs):
    """The attention with dropout reads the lengths of documents back from the device."""
    model = tiny_model(num_hidden_layers=1).train()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    compilation.compile_layers(model)
    one_pass(model, packed=True)
    assert len(graphs) > 1
    assert "Dynamic shape operator" in compilation.graph_breaks()
    assert "Dynamic shape operator" in compilation.tell_graph_breaks()


def test_a_worker_says_it_once_and_every_step_counts_it():
    from torch._dynamo.utils import counters

    posted = []
    counters["graph_break"]["A reason.\n  Its explanation."] = 2
    engine = SimpleNamespace(
        module=torch.nn.Module(), device=torch.device("cpu"), rank=1, world_size=2, step_count=1, compiled=True
    )
    settings = SimpleNamespace(peak_tflops=None, logging_steps=1)
    phase = SimpleNamespace(units_per_step=1, unit_tokens=1, unit_flops=None, optimizer=SimpleNamespace(lr=1.0))
    reporter = SimpleNamespace(post=posted.append)
    for membership in (1, 2):
        telemetry = Telemetry(reporter, settings, phase, engine, membership)
        made = telemetry.step(StepResult(1.0, 1.0, 1.0), 1.0, 1.0, 0.0, 1)
        assert made.metrics["graph_breaks"] == 2
    (message,) = posted
    assert message.text == (
        "Worker 1: torch.compile left 2 parts of the layers to PyTorch, which is slower: A reason. (2)."
    )


@pytest.mark.skipif(triton_attention.triton is None, reason="needs triton")
@pytest.mark.parametrize(
    ("window", "operations"), [(2048, ["triton_attention"]), (8, ["key_lifetimes", "triton_attention"])]
)
def test_with_the_kernels_of_a_gpu_a_layer_is_one_graph(graphs, monkeypatch, window, operations):
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernels = registry.BACKENDS["triton"]
    monkeypatch.setattr(registry, "BACKENDS", {"triton": kernels})
    monkeypatch.setattr(type(kernels), "device_types", ("cpu",))
    monkeypatch.setattr(type(kernels), "unsupported_reason", lambda *_: None)
    with FakeTensorMode():  # nothing is computed, so the kernels are not run
        layer = torch.compile(DogeDecoderLayer(tiny_config(window=window), 0), fullgraph=True)
        hidden = torch.empty(2, LENGTH, 64, requires_grad=True)
        angles = torch.empty(1, LENGTH, 16)
        layer(
            hidden, position_embeddings=(angles, angles), document_ends=torch.full((2, LENGTH), LENGTH)
        ).sum().backward()
        assert hidden.grad.shape == hidden.shape
    (graph,) = graphs
    targets = [str(node.target).split(".") for node in graph.graph.nodes]
    assert [name for library, name, *_ in (each for each in targets if each[0] == "doge")] == operations


def test_graphs_on_disk_are_of_this_code_alone(tmp_path):
    """PyTorch's own key names our operators, but does not see that another version of one returns something else."""
    tags = []
    for number, source in enumerate(("one = 1", "one = 2")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "module.py").write_text(source)
        tags.append(compilation.source_tag(folder))
    assert tags[0] != tags[1]
    compilation.compile_layers(tiny_model())
    assert torch.compiler.config.cache_key_tag == compilation.source_tag(Path(compilation.__file__).parent)
