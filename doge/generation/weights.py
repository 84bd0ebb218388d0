"""The parameters of a layer in the form that decoding reads."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from doge.generation.int8 import Int8
from doge.model.experts import DogeCDMoE
from doge.model.modeling import DogeDecoderLayer


class LayerWeights(NamedTuple):
    """The parameters of a layer; matrices that read the same states are concatenated.

    Args:
        qkv: ((heads + 2 * kv_heads) * head_dim, hidden_size).
        gate_up: (2 * intermediate_size, hidden_size); None, like `down`, if the layer has experts.
        experts: The layer's expert module, or None.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor | Int8
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    A: torch.Tensor
    dt: torch.Tensor
    o: torch.Tensor | Int8
    input_residual: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor | Int8 | None
    down: torch.Tensor | Int8 | None
    post_residual: torch.Tensor
    experts: nn.Module | None

    @staticmethod
    def of(layer: DogeDecoderLayer, int8: bool = False) -> "LayerWeights":
        """The weights of a layer; with ``int8`` its matrices are quantized, except those of experts."""
        attention, mlp = layer.self_attn, layer.mlp
        has_experts = isinstance(mlp, DogeCDMoE)
        convert: Callable[[torch.Tensor], torch.Tensor | Int8] = Int8.of if int8 else torch.Tensor.detach
        return LayerWeights(
            input_norm=layer.input_layernorm.weight,
            qkv=convert(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])),
            q_norm=attention.q_norm.weight,
            k_norm=attention.k_norm.weight,
            A=attention.A,
            dt=attention.dt_proj.weight,
            o=convert(attention.o_proj.weight),
            input_residual=layer.input_residual,
            post_norm=layer.post_attention_layernorm.weight,
            gate_up=None if has_experts else convert(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
            down=None if has_experts else convert(mlp.down_proj.weight),
            post_residual=layer.post_attention_residual,
            experts=mlp if has_experts else None,
        )
