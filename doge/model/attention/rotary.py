"""Rotary position embeddings, whose frequencies are float32 in a model of any dtype."""

import torch
from torch import nn
from transformers import DogeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.doge.modeling_doge import DogeRotaryEmbedding

_BY_LENGTH = ("dynamic", "longrope")  # rope types whose frequencies depend on the sequence's length


class RotaryEmbedding(nn.Module):
    """The cosines and sines of positions, for every `rope_type` of transformers.

    The frequencies, half a head's width of numbers, are computed in every forward, and are neither parameters nor
    buffers: rounded to bfloat16, as `model.to(torch.bfloat16)` rounds buffers, they would turn position 1,000 by whole
    radians. Nor does it matter whether the model was made on the meta device, or emptied. With a `rope_type` that
    depends on the length, they depend on that of this forward alone, not on those of earlier ones.

    Source: Su et al. 2021 (arXiv:2104.09864).
    """

    def __init__(self, config: DogeConfig):
        super().__init__()
        self.config = config

    @property
    def rope_type(self) -> str:
        return self.config.rope_parameters["rope_type"]

    def frequencies(self, length: int | None = None) -> tuple[torch.Tensor, float]:
        """The angles per position, (head_dim / 2,) float32 on the CPU, and the factor of all cosines and sines.

        Args:
            length: The number of positions; by default no more than the model was trained with.
        """
        with torch.device("cpu"):
            if self.rope_type == "default":
                return DogeRotaryEmbedding.compute_default_rope_parameters(self.config)
            return ROPE_INIT_FUNCTIONS[self.rope_type](self.config, torch.device("cpu"), seq_len=length)

    @torch.no_grad()
    def forward(self, states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each (batch or 1, seq, head_dim), in the dtype and on the device of ``states``.

        Args:
            position_ids: (batch or 1, seq).
        """
        length = int(position_ids.max()) + 1 if self.rope_type in _BY_LENGTH else None
        frequencies, factor = self.frequencies(length)
        angles = position_ids[..., None].float() * frequencies.to(states.device)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(states.dtype), (angles.sin() * factor).to(states.dtype)
