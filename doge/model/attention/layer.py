"""The attention layer of a Doge model."""

import torch
from torch import nn
from transformers import DogeConfig
from transformers.models.doge.modeling_doge import DogeRMSNorm, apply_rotary_pos_emb

from doge.model.attention.cache import DogeCache
from doge.model.attention.dispatch import dynamic_mask_attention
from doge.model.attention.key_bias import key_bias
from doge.model.attention.window import KeyWindow
from doge.model.configuration import head_dim

PADDED_KEY_BIAS = -1e30  # finite, so that a query that sees nothing else gets no NaN


class DogeAttention(nn.Module):
    """Grouped-query dynamic mask attention with query and key norms and rotary positions.

    Parameters are named as in transformers' `DogeAttention`.
    """

    def __init__(self, config: DogeConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = head_dim(config)
        self.window = KeyWindow.of(config)
        self.attention_dropout = config.attention_dropout or 0.0
        hidden_size, kv_heads, bias = config.hidden_size, config.num_key_value_heads, config.attention_bias
        self.q_proj = nn.Linear(hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, bias=bias)
        self.A = nn.Parameter(torch.zeros(kv_heads))
        self.dt_proj = nn.Linear(kv_heads * self.head_dim, kv_heads, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden_size, bias=bias)
        self.q_norm = DogeRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = DogeRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        document_ends: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
        past_key_values: DogeCache | None = None,
    ) -> torch.Tensor:
        """(batch, seq, hidden_size) -> the same.

        Args:
            position_embeddings: cosines and sines, each (batch or 1, seq, head_dim).
            document_ends: See `dynamic_mask_attention`; ignored with a cache that already holds tokens.
            order: (batch or 1, seq) int64, each token's place in its row; negative at padding, which no query sees.
            past_key_values: Cache that the new keys and values are added to.
        """
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads_shape))
        key = self.k_norm(self.k_proj(hidden_states).view(heads_shape))
        value = self.v_proj(hidden_states)
        bias = key_bias(self.A, self.dt_proj(value))
        if order is not None:
            bias = bias.masked_fill((order < 0).unsqueeze(-1), PADDED_KEY_BIAS)
        value = value.view(heads_shape)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
        query, key, value, bias = (states.transpose(1, 2) for states in (query, key, value, bias))
        if past_key_values is not None and past_key_values.get_seq_length(self.layer_idx):
            output = past_key_values.attend(query, key, value, bias, order, self.layer_idx)
        else:
            dropout_p = self.attention_dropout if self.training else 0.0
            output = dynamic_mask_attention(
                query, key, value, bias,
                window=self.window, document_ends=document_ends, order=order, dropout_p=dropout_p,
            )  # fmt: skip
            if past_key_values is not None:
                past_key_values.fill(key, value, bias, order, self.layer_idx)
        return self.o_proj(output.flatten(2))
