"""Next-token cross-entropy that computes the logits of a chunk of tokens at a time.

With a vocabulary of 32,768, the logits of 2,048 tokens take 268 MB in float32, more than everything else in the
smallest model. Here one chunk of tokens at a time is projected, its loss and its gradients with respect to the hidden
states and the weight are computed together, and its logits are dropped; the backward pass only scales those gradients.
On a GPU, Liger's kernels do the same and turn the logits into their gradient in place.
"""

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

IGNORE_INDEX = -100  # a label that does not count, as in torch and transformers
TOKEN_CHUNK = 256  # tokens whose logits exist at the same time
LIGER_CHUNK = 4096  # about the same on a GPU: with a small model, fewer tokens do not fill one

_log = logging.getLogger(__name__)


class LMHead(nn.Linear):
    """The output projection, which can also compute the loss of hidden states without returning logits.

    Both are computed inside this module's `forward`, so that hooks which gather a sharded weight (ZeRO-3, FSDP) fire.
    """

    def forward(
        self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None, z_loss: float = 0.0
    ) -> torch.Tensor:
        """(..., hidden_size) -> logits (..., vocab_size), or, given targets (...), the summed loss as float32."""
        if targets is None:
            return super().forward(hidden_states)
        return linear_cross_entropy(hidden_states.flatten(0, -2), self.weight, targets.flatten(), z_loss=z_loss)


def next_token_targets(labels: torch.Tensor) -> torch.Tensor:
    """Each token's target: labels (batch, seq), aligned with the tokens, shifted left by one; the last has none.

    In packed documents, the label of a document's first token must already be `IGNORE_INDEX`, because the token before
    it belongs to another document.
    """
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk: int | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The sum over tokens of `cross_entropy(hidden_states @ weight.T, targets)`, a float32 scalar.

    Args:
        hidden_states: (tokens, hidden_size).
        weight: (vocab_size, hidden_size), of the same dtype; under autocast, both are cast to its dtype.
        targets: (tokens,) int64; `IGNORE_INDEX` contributes neither loss nor gradient.
        chunk: Tokens whose logits (chunk, vocab_size) exist at the same time; by default as suits the device.
        z_loss: Adds so much times the square of each counted token's log-sum-exp of logits, which keeps them small.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden_states, weight, targets, chunk, z_loss, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, targets, chunk, z_loss, grad_enabled):
        hidden_needs_grad, weight_needs_grad = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        liger = _liger() if chunk is None and _suits_liger(hidden_states) else None
        if liger is not None:
            loss, *grads = _by_liger(
                liger, hidden_states, weight, targets, hidden_needs_grad, weight_needs_grad, z_loss
            )
        else:
            loss, *grads = _by_chunks(
                hidden_states, weight, targets, hidden_needs_grad, weight_needs_grad, chunk or TOKEN_CHUNK, z_loss
            )
        ctx.save_for_backward(*grads)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        hidden_grad, weight_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = _scaled(hidden_grad, grad_output, hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = _scaled(weight_grad, grad_output, ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None


def _scaled(grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`grad * factor`, rounded once: a factor such as 1 / tokens is never rounded to a half-precision dtype itself."""
    return (grad.to(torch.promote_types(grad.dtype, factor.dtype)) * factor).to(dtype)


def _by_chunks(
    hidden_states, weight, targets, hidden_needs_grad: bool, weight_needs_grad: bool, chunk: int, z_loss: float = 0.0
):
    """The loss, and the gradients that are needed, that of the weight in float32."""
    hidden_grad = torch.zeros_like(hidden_states) if hidden_needs_grad else None
    weight_grad = torch.zeros_like(weight, dtype=torch.float32) if weight_needs_grad else None
    loss = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
    counted = (targets != IGNORE_INDEX).nonzero().flatten()
    for tokens in counted.split(chunk):
        hidden, target = hidden_states[tokens], targets[tokens].unsqueeze(1)
        logits = hidden @ weight.T
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
        # The log-sum-exp comes from the likeliest token: its probability is at least 1 / vocab_size, its log exact.
        normalizer = logits.amax(-1, keepdim=True).float() - probabilities.amax(-1, keepdim=True).log()
        loss += (normalizer - logits.gather(1, target).float()).sum()
        if z_loss:
            loss += z_loss * normalizer.square().sum()
        if hidden_grad is None and weight_grad is None:
            continue
        if z_loss:  # the derivative of the log-sum-exp is the probability
            probabilities *= 1 + 2 * z_loss * normalizer
        probabilities.scatter_add_(1, target, probabilities.new_full((), -1.0).expand_as(target))
        logits_grad = probabilities.to(weight.dtype)
        if hidden_grad is not None:
            hidden_grad[tokens] = logits_grad @ weight
        if weight_grad is not None:
            weight_grad += logits_grad.T @ hidden
    return loss, hidden_grad, weight_grad


def _by_liger(forward, hidden_states, weight, targets, hidden_needs_grad: bool, weight_needs_grad: bool, z_loss: float):
    """`_by_chunks` with Liger's kernels; the weight's gradient is summed in float32 and has the weight's dtype."""
    # Liger chooses its chunks so that their logits have this many times as many elements as the hidden states.
    times = -(-weight.shape[0] * LIGER_CHUNK // hidden_states.numel())
    loss, _, _, _, hidden_grad, weight_grad, _ = forward(
        hidden_states, weight, targets, ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32,
        compute_gradients=hidden_needs_grad or weight_needs_grad, weight_requires_grad=weight_needs_grad,
        chunk_mem_const=times, lse_square_scale=z_loss,
    )  # fmt: skip
    return loss, hidden_grad if hidden_needs_grad else None, weight_grad


def _suits_liger(hidden_states: torch.Tensor) -> bool:
    # float16 could not hold the weight's gradient, a sum over all tokens.
    dtypes = (torch.bfloat16, torch.float32)
    return hidden_states.device.type == "cuda" and hidden_states.dtype in dtypes and hidden_states.numel() > 0


@functools.cache
def _liger() -> Callable[..., tuple[torch.Tensor, ...]] | None:
    """Liger's fused linear cross-entropy; None if it cannot be imported, which is logged."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward
    except ImportError as error:
        _log.warning("Liger's loss cannot be imported (%s): PyTorch computes the same, more slowly.", error)
        return None
    return fused_linear_cross_entropy_forward
