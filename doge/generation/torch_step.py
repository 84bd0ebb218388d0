"""The decoding step in PyTorch, for any device, compiled with torch.compile if that works."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers.models.doge.modeling_doge import apply_rotary_pos_emb

from doge.generation.int8 import Int8
from doge.generation.prefill import Prompt, prefill
from doge.generation.weights import LayerWeights
from doge.model.attention.cache import Slots, attend_slots, insert_key
from doge.model.attention.key_bias import key_bias
from doge.model.attention.window import KeyWindow
from doge.model.compilation import can_compile
from doge.model.modeling import DogeForCausalLM

LAYERS_PER_GRAPH = 8  # compiling takes time in proportion to them, calling a graph takes 0.1 ms


class TorchStep:
    """Computes one token for every row, as the model does, with the matrices joined that read the same states.

    Args:
        model: The model to decode with.
        layers: Its layers' weights.
        embedding, head: (vocab_size, hidden_size).
        compile: Use torch.compile if this machine can. It compiles at the first token, separately for one row and for
            several, and takes half a minute, or a few seconds with torch's cache.
    """

    def __init__(
        self,
        model: DogeForCausalLM,
        layers: list[LayerWeights],
        embedding: torch.Tensor | Int8,
        head: torch.Tensor | Int8,
        compile: bool = True,
    ):
        self._read_by, self._model, self._embedding, self._head = model, model.model, embedding, head
        self._chunks = [layers[start : start + LAYERS_PER_GRAPH] for start in range(0, len(layers), LAYERS_PER_GRAPH)]
        self._window, self._eps = KeyWindow.of(model.config), model.config.rms_norm_eps
        self._compiles = compile and can_compile(model.device.type)
        functions = (_run_layers, _end)
        self._functions = [torch.compile(each) for each in functions] if self._compiles else functions

    def __call__(self, tokens: torch.Tensor, lengths: torch.Tensor, slots: list[Slots], greedy: bool) -> torch.Tensor:
        """Compute one step; the keys of ``tokens`` are inserted into ``slots`` in place.

        Args:
            tokens: (rows,) int64, the newest token of each row.
            lengths: (rows,) int64, the number of tokens before it.
            slots: The slots of every layer.
            greedy: Whether to choose the likeliest tokens.

        Returns:
            The next tokens, (rows,) int64, if ``greedy``, otherwise their logits, (rows, vocab_size).
        """
        if self._compiles:
            for states in itertools.chain(*slots):
                torch._dynamo.maybe_mark_dynamic(states, 2)
        run_layers, end = self._functions
        states = _embed(tokens, self._embedding, self._model.norm.weight.dtype)
        cos, sin = self._model.rotary_emb(states, position_ids=lengths[:, None])
        fuses = self._compiles and len(tokens) == 1 and states.device.type == "cpu" and states.dtype == torch.float32
        for number, chunk in enumerate(self._chunks):
            own = slots[number * LAYERS_PER_GRAPH :][: len(chunk)]
            states = run_layers(states, lengths, cos, sin, chunk, own, self._window, self._eps, fuses)
        return end(states, self._model.norm.weight, self._head, self._eps, greedy, fuses)

    def prefill(self, prompts: Sequence[Prompt], slots: int) -> tuple[torch.Tensor, list[Slots]]:
        """See `doge.generation.prefill.prefill`."""
        return prefill(self._read_by, prompts, slots)


def _linear(states: torch.Tensor, weight: torch.Tensor | Int8, fuses: bool) -> torch.Tensor:
    """`F.linear`; with ``fuses``, for one row, as a sum that torch.compile turns into a loop.

    On a CPU, MKL's product of one row with a 32,768 x 256 matrix reads float32 at half of the memory's speed, and the
    generated loop at four fifths of it; for bfloat16 it is the other way round.
    """
    if isinstance(weight, Int8):
        return F.linear(states, weight.data.to(states.dtype)) * weight.scale.to(states.dtype)
    return (weight * states).sum(-1)[None] if fuses else F.linear(states, weight)


def _embed(tokens, embedding, dtype):
    if isinstance(embedding, Int8):
        return F.embedding(tokens, embedding.data).to(dtype) * embedding.scale[tokens, None].to(dtype)
    return F.embedding(tokens, embedding)


def _run_layers(states, lengths, cos, sin, layers: list[LayerWeights], slots: list[Slots], window, eps, fuses):
    for weights, own in zip(layers, slots, strict=True):
        states = _layer(states, weights, own, cos, sin, lengths, window, eps, fuses)
    return states


def _end(states, norm, head, eps, greedy, fuses):
    logits = _linear(_rms_norm(states, norm, eps), head, fuses)
    return logits.argmax(-1) if greedy else logits


def _layer(states, weights: LayerWeights, slots: Slots, cos, sin, lengths, window, eps, fuses):
    rows, head_dim, kv_heads = len(states), weights.q_norm.shape[0], weights.A.shape[0]
    joined = _linear(_rms_norm(states, weights.input_norm, eps), weights.qkv, fuses).view(rows, 1, -1, head_dim)
    query, key, value = joined.split([joined.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    bias = key_bias(weights.A, F.linear(value.flatten(2), weights.dt))
    query, key = _rms_norm(query, weights.q_norm, eps), _rms_norm(key, weights.k_norm, eps)
    query, key = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)
    query, key, value, bias = (part.transpose(1, 2) for part in (query, key, value, bias))
    order = lengths[:, None, None].expand(-1, kv_heads, 1)
    insert_key(*slots, key, value, bias, order, window)
    mixed = _linear(attend_slots(query, *slots[:3]).flatten(1), weights.o, fuses)
    states = torch.addcmul(mixed, weights.input_residual, states)
    transformed = _rms_norm(states, weights.post_norm, eps)
    if weights.experts is not None:
        transformed = weights.experts(transformed)
    else:
        assert weights.gate_up is not None
        assert weights.down is not None
        gate, up = _linear(transformed, weights.gate_up, fuses).chunk(2, dim=-1)
        transformed = _linear(F.silu(gate) * up, weights.down, fuses)
    return torch.addcmul(transformed, weights.post_residual, states)


def _rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = states.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(states.dtype)
