"""torch.compile for a model's layers, where this machine can compile."""

import functools
import hashlib
import logging
from collections import Counter
from pathlib import Path

import torch

from doge.common.words import count
from doge.model.modeling import DogeForCausalLM

_log = logging.getLogger(__name__)
_events: list[object] = []  # of compilations, in this process
_told: set[str] = set()  # the reasons of graph breaks that were told

# Graphs of a layer, beyond which PyTorch computes it uncompiled; torch's own 8 are too few. A run has about ten: with
# documents or without, with gradients or without, of one row or more, of a length that differs.
RECOMPILE_LIMIT = 32


def compile_layers(model: torch.nn.Module) -> bool:
    """Compile the model's layers in place: a graph serves all of them, and the state dict does not change.

    `graph_breaks` counts what of them was not compiled.

    Returns:
        Whether the layers were compiled. If this machine cannot compile, or
        the model is no Doge, the model runs as it is, with the same results.
    """
    if not isinstance(model, DogeForCausalLM) or not can_compile(model.device.type):
        return False
    _watch()
    torch.compiler.config.cache_key_tag = source_tag(Path(__file__).parent)
    for layer in model.model.layers:
        layer.compile(recompile_limit=RECOMPILE_LIMIT)
    return True


def compilation_progress() -> int:
    """Grows whenever code begins or ends to be compiled; may be asked from any thread."""
    return len(_events)


def graph_breaks() -> Counter[str]:
    """How often this process computed uncompiled what was to be compiled, by reason: one for each place in the code.

    A graph ends at an operation that torch.compile cannot trace; PyTorch computes it, and another graph begins. Of a
    function that has more variants than `RECOMPILE_LIMIT`, or cannot be resumed there, it computes all.
    """
    from torch._dynamo.utils import counters

    found: Counter[str] = Counter()
    kinds = ["graph_break"]
    if counters["frames"]["ok"] < counters["frames"]["total"]:  # else all of it was traced in the end
        kinds.append("unimplemented")
    for kind in kinds:
        for message, number in counters[kind].items():
            found[message.splitlines()[0]] += number
    return found


def tell_graph_breaks() -> str | None:
    """A sentence on all graph breaks if there are any for reasons that were not told before in this process."""
    found = graph_breaks()
    if found.keys() <= _told:
        return None
    _told.update(found)
    reasons = "; ".join(f"{reason} ({number})" for reason, number in found.items())
    return f"torch.compile left {count(found.total(), 'part')} of the layers to PyTorch, which is slower: {reasons}."


@functools.cache
def source_tag(folder: Path) -> str:
    """A hash of all Python sources below ``folder``.

    PyTorch keeps compiled graphs on disk. Their key has the names of our operators in it, but not what these return: a
    graph that is kept from an earlier version of this package would fail.
    """
    sources = (path.read_bytes() for path in sorted(folder.rglob("*.py")))
    return hashlib.sha256(b"".join(hashlib.sha256(source).digest() for source in sources)).hexdigest()[:16]


@functools.cache
def _watch() -> None:
    from torch._dynamo import callback

    callback.on_compile_start(_events.append)
    callback.on_compile_end(_events.append)


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works here. Logs once why it does not, such as a missing C++ compiler or Triton."""
    try:
        torch.compile(_trial)(torch.ones(8, device=device_type))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        _log.warning(
            "torch.compile does not work here (%s): PyTorch computes the same without it, more slowly.", reason
        )
        return False
    return True


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + x.cos()
