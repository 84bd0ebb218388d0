"""torch.compile where this machine can, once for all layers of a model; its cache on disk is torch's own."""

import functools
import logging

import torch

from doge.model.modeling import DogeForCausalLM

_log = logging.getLogger(__name__)


def compile_layers(model: torch.nn.Module) -> bool:
    """Compile the model's layers in place: one graph serves them all, and the state dict stays as it is.

    Returns:
        Whether it was done; where it cannot be, or the model is no Doge, all runs as it is, with the same results.
    """
    if not isinstance(model, DogeForCausalLM) or not can_compile(model.device.type):
        return False
    for layer in model.model.layers:
        layer.compile()
    return True


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works here; says once why it does not, as without a C++ compiler or Triton."""
    try:
        torch.compile(_trial)(torch.ones(8, device=device_type))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        _log.warning("torch.compile does not work here (%s): the same is computed more slowly without.", reason)
        return False
    return True


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + x.cos()
