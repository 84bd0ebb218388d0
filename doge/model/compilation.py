"""torch.compile for a model's layers, where this machine can compile."""

import functools
import logging

import torch

from doge.model.modeling import DogeForCausalLM

_log = logging.getLogger(__name__)
_events: list[object] = []  # of compilations, in this process


def compile_layers(model: torch.nn.Module) -> bool:
    """Compile the model's layers in place: one graph serves all of them, and the state dict does not change.

    Returns:
        Whether the layers were compiled. If this machine cannot compile, or
        the model is no Doge, the model runs as it is, with the same results.
    """
    if not isinstance(model, DogeForCausalLM) or not can_compile(model.device.type):
        return False
    _watch()
    for layer in model.model.layers:
        layer.compile()
    return True


def compilation_progress() -> int:
    """Grows whenever code begins or ends to be compiled; may be asked from any thread."""
    return len(_events)


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
