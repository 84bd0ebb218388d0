"""Dynamic Mask Attention: causal attention in which every key carries a bias, and queries keep the best-biased keys.

The score of query i and key j is `q_i . k_j / sqrt(head_dim) + m_j`, with one bias `m_j` per key and key-value head,
the same for every query; beyond `keep_window_size` W keys, query i attends only to the W largest `m_j` among `j <= i`.
Since `m_j` does not depend on the query, two facts make this cheap, and both are exact:

* The bias folds into the key as a further channel, matched by a 1 in the query, so stock causal attention computes it
  in memory linear in the length, gradient included.
* A key once pushed out of the window never returns (the window of a later query holds only larger biases), so each
  key is seen by one interval of queries, `j <= i < expiry_j`.

Ties: of equal biases the later key is kept. They are common: in the first layer, equal tokens have equal biases, and
a new model's are all 1. transformers leaves the choice to `topk`, whose order among equals is unspecified.

Source of the method: the Doge architecture of the SmallDoge team, as in transformers' `models/doge`.
"""

import heapq
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DogeConfig
from transformers.models.doge.modeling_doge import DogeRMSNorm, apply_rotary_pos_emb

from doge.configuration import head_dim

# Stands for minus infinity on padded keys: finite, so that no NaN arises where a padded query sees nothing else.
PADDED_KEY_BIAS = -1e30
QUERY_CHUNK = 512  # queries masked at a time beyond the window: memory is QUERY_CHUNK x keys, not queries x keys


def dynamic_mask_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    *,
    window: int,
    documents: list[int] | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Causal dynamic mask attention over whole sequences, each document seeing only itself.

    Args:
        query: (batch, heads, seq, head_dim), rotated.
        key, value: (batch, kv_heads, seq, head_dim), the key rotated; heads is a multiple of kv_heads.
        bias: (batch, kv_heads, seq), float32, the `m_j` of each key.
        window: `keep_window_size`, in keys; every document has a window of its own.
        documents: lengths in tokens of consecutive documents, over the rows laid end to end (summing to batch * seq),
            none crossing a row's end; `None` where each row is one document.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (batch, seq, heads, head_dim), scaled by head_dim ** -0.5, as transformers' attention functions return it.
    """
    batch, heads, seq, head_dim = query.shape
    options = {"head_dim": head_dim, "window": window, "dropout_p": dropout_p}
    query, key, value = extend_query(query), fold_bias(key, bias), pad_channels(value)
    if documents is None:
        output = attend_folded(query, key, value, **options)
    else:
        # Token-major, (1, batch * seq, heads, channels): one split and one concatenation, whose backward is as cheap.
        streams = [x.transpose(1, 2).reshape(1, batch * seq, x.shape[1], -1) for x in (query, key, value)]
        streams = [stream.transpose(1, 2).split(documents, dim=2) for stream in streams]
        output = torch.cat([attend_folded(q, k, v, **options) for q, k, v in zip(*streams, strict=True)], dim=1)
    return output.reshape(batch, seq, heads, -1)[..., :head_dim]


def fold_bias(key: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The key with its bias in further channels: (..., head_dim) -> (..., head_dim + 2, rounded up to 8).

    The bias is held as the sum of two numbers of the key's dtype, so that bfloat16 keeps 16 bits of it, and times
    sqrt(head_dim), by which attention divides again.
    """
    bias = (bias * key.shape[-1] ** 0.5).unsqueeze(-1)
    high = bias.to(key.dtype)
    low = (bias - high).detach().to(key.dtype)  # all of the gradient goes through `high`
    padding = key.new_zeros(()).expand(*key.shape[:-1], _num_extra_channels(key.shape[-1]) - 2)
    return torch.cat([key, high, low, padding], dim=-1)


def folded_bias(key: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The bias of folded keys, times sqrt(head_dim): (..., channels) -> (...), float32."""
    return key[..., head_dim].float() + key[..., head_dim + 1].float()


def extend_query(query: torch.Tensor) -> torch.Tensor:
    """The query with ones against the two bias channels of a folded key, zeros against the rest."""
    extra = query.new_zeros(_num_extra_channels(query.shape[-1]))
    extra[:2] = 1
    return torch.cat([query, extra.expand(*query.shape[:-1], -1)], dim=-1)


def pad_channels(states: torch.Tensor) -> torch.Tensor:
    """The value with zeros up to the width of a folded key: flash attention wants equal widths."""
    return F.pad(states, (0, _num_extra_channels(states.shape[-1])))


def _num_extra_channels(head_dim: int) -> int:
    """Two for the bias, and as many as bring the width to a multiple of 8, which fused attention kernels ask for."""
    return 2 + (-head_dim - 2) % 8


def attend_folded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    head_dim: int,
    window: int,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Attention of the last `queries` tokens of one document to all of its tokens so far.

    Args:
        query: (batch, heads, queries, channels), from `extend_query`.
        key, value: (batch, kv_heads, keys, channels), from `fold_bias` and `pad_channels`; keys >= queries.

    Returns:
        (batch, queries, heads, channels), of which the first head_dim channels count.
    """
    queries, keys = query.shape[2], key.shape[2]
    options = {"scale": head_dim**-0.5, "dropout_p": dropout_p, "enable_gqa": query.shape[1] != key.shape[1]}
    if keys <= window and queries in (1, keys):
        output = F.scaled_dot_product_attention(query, key, value, is_causal=queries > 1, **options)
    elif queries == 1:
        visible = kept_keys(folded_bias(key, head_dim), window).unsqueeze(2)
        output = _masked_attention(query, key, value, visible, options)
    else:
        expiry = key_expiry(folded_bias(key, head_dim), window) if keys > window else None
        chunks = []
        for start in range(0, queries, QUERY_CHUNK):
            inputs = (
                query[:, :, start : start + QUERY_CHUNK],
                key,
                value,
                expiry,
                keys - queries + start,
                options,
            )
            if torch.is_grad_enabled():  # otherwise every chunk's mask would be kept for the backward pass
                chunks.append(checkpoint(_attend_interval, *inputs, use_reentrant=False))
            else:
                chunks.append(_attend_interval(*inputs))
        output = torch.cat(chunks, dim=2)
    return output.transpose(1, 2)


def _attend_interval(query, key, value, expiry, first, options):
    """Attention of queries `first`, `first + 1`, ... to the keys with `j <= i < expiry_j` (`None`: no expiry)."""
    stop = first + query.shape[2]
    i = torch.arange(first, stop, device=query.device)[:, None]
    visible = (torch.arange(stop, device=query.device) <= i)[None, None]
    if expiry is not None:
        visible = visible & (i < expiry[:, :, None, :stop])
    return _masked_attention(query, key[:, :, :stop], value[:, :, :stop], visible, options)


def _masked_attention(query, key, value, visible, options):
    """Attention under a boolean mask (batch or 1, kv_heads or 1, queries, keys), true where a key is seen."""
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, **options)


def key_expiry(bias: torch.Tensor, window: int) -> torch.Tensor:
    """The first query that no longer sees each key.

    One pass over the keys with a min-heap of the current window, O(seq log window) for each row and head.

    Args:
        bias: (..., seq), compared only; of equal biases the later key is kept.
        window: keys that a query keeps.

    Returns:
        (..., seq) int64; seq where the key is never pushed out, and j itself where key j never enters the window.
    """
    seq = bias.shape[-1]
    rows = bias.detach().reshape(-1, seq).tolist()
    expiry = []
    for row in rows:
        entries = [(value, j) for j, value in enumerate(row)]
        expiries = [seq] * seq
        heap = entries[:window]
        heapq.heapify(heap)
        for i in range(window, seq):
            _, evicted = heapq.heappushpop(heap, entries[i])
            expiries[evicted] = i
        expiry.append(expiries)
    return torch.tensor(expiry, device=bias.device).reshape(bias.shape)


def kept_keys(bias: torch.Tensor, window: int) -> torch.Tensor:
    """Which keys the newest query sees: (..., seq) bool with the `window` largest biases true, later keys first."""
    order = bias.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :window]
    return torch.zeros_like(bias, dtype=torch.bool).scatter(-1, bias.shape[-1] - 1 - order, True)


def document_lengths(position_ids: torch.Tensor, batch: int) -> list[int] | None:
    """Lengths of packed documents, over the rows laid end to end; `None` where each row is one document.

    A document starts wherever a position does not follow the one before it (transformers' packing convention).
    Reads the positions back from the device, so call it once per forward.

    Args:
        position_ids: (batch or 1, seq).
    """
    restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not restarts.any():
        return None
    starts = F.pad(restarts, (1, 0), value=True).expand(batch, -1).flatten().nonzero().flatten()
    bounds = [*starts.tolist(), batch * position_ids.shape[1]]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


class DogeAttention(nn.Module):
    """Grouped-query dynamic mask attention with query and key norms and rotary positions.

    Parameters are named as in transformers' `DogeAttention`. A cache holds folded keys and padded values, so a key's
    bias, and the fact that a key is padding, travel with it: beam reordering moves them, and nothing is recomputed.
    """

    def __init__(self, config: DogeConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = head_dim(config)
        self.keep_window_size = config.keep_window_size
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
        documents: list[int] | None = None,
        padding: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """(batch, seq, hidden_size) -> the same.

        Args:
            position_embeddings: cosines and sines, each (batch or 1, seq, head_dim).
            documents: see `dynamic_mask_attention`; ignored with a cache that already holds tokens.
            padding: (batch, seq) bool, true at tokens that no query may attend to.
            past_key_values: transformers' cache; the new keys and values are added to it.
        """
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads_shape))
        key = self.k_norm(self.k_proj(hidden_states).view(heads_shape))
        value = self.v_proj(hidden_states)
        # In float32: rounding the exponent to bfloat16 would move the bias, and with it the order of the keys.
        bias = torch.exp(self.A.float() * F.softplus(self.dt_proj(value).float()))
        if padding is not None:
            bias = bias.masked_fill(padding.unsqueeze(-1), PADDED_KEY_BIAS)
        value = value.view(heads_shape)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
        options = {"window": self.keep_window_size, "dropout_p": self.attention_dropout if self.training else 0.0}

        query, key, value, bias = (states.transpose(1, 2) for states in (query, key, value, bias))
        continues = past_key_values is not None and past_key_values.get_seq_length(self.layer_idx) > 0
        if past_key_values is not None:
            cached = past_key_values.update(fold_bias(key, bias), pad_channels(value), self.layer_idx)
        if continues:
            output = attend_folded(extend_query(query), *cached, head_dim=self.head_dim, **options)[
                ..., : self.head_dim
            ]
        else:
            output = dynamic_mask_attention(query, key, value, bias, documents=documents, **options)
        return self.o_proj(output.flatten(2))
