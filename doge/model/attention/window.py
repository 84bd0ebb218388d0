"""Which keys a query sees: the W largest biases so far, as one interval of queries per key."""

from dataclasses import dataclass

import torch
from transformers import DogeConfig

BLOCK = 128  # queries processed together: a larger block is more work in fewer operations


@dataclass(frozen=True)
class KeyWindow:
    """How many keys a query sees, and which of them whatever their bias.

    Args:
        size: `keep_window_size`, the number of keys that a query sees at most.
        num_sinks: Places in the window that are reserved for the first keys of a document.
        num_local: Places in the window that are reserved for the last keys, the query's own included; with 1, every
            query sees itself.
    """

    size: int
    num_sinks: int = 0
    num_local: int = 0

    @staticmethod
    def of(config: DogeConfig) -> "KeyWindow":
        """The window of a configuration."""
        sinks, local = (getattr(config, name, 0) for name in ("num_sink_keys", "num_local_keys"))
        return KeyWindow(config.keep_window_size, sinks, local)

    def ranking(self, bias: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """The biases by which keys compete; those of sinks are infinite.

        Args:
            bias: (..., seq).
            order: (..., seq) int64, the place of each key in its document; negative at padding before it.
        """
        return bias.masked_fill((order >= 0) & (order < self.num_sinks), torch.inf) if self.num_sinks else bias


def key_expiry(
    bias: torch.Tensor,
    window: KeyWindow,
    order: torch.Tensor | None = None,
    document_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first query that no longer sees each key; among equal biases the later key is kept.

    A key is seen as long as fewer than W of the keys so far are larger. At the start of a block of n queries W keys are
    alive; the n smallest of these and the block's own keys are pushed out during the block, each by the arrival that
    makes W keys larger than it. That takes one sort and one n x n comparison per block, for all rows and heads at once:
    O(seq (W log W / n + n)) operations, none of which waits for a device.

    Keys compete only from the age `num_local` on, and for the places that are not reserved for local keys.

    Args:
        bias: (..., seq), only compared.
        window: Its size may be larger than seq.
        order: (..., seq), see `KeyWindow.ranking`; by default 0, 1, 2, ...
        document_starts: (..., seq) int64, where in its row each token's document begins. Then a key's expiry is right
            where it comes before the end of the key's document.

    Returns:
        (..., seq) int64; seq if the key is never pushed out, and j itself if key j never enters the window.
    """
    seq = bias.shape[-1]
    expiry = torch.full(bias.shape, seq, device=bias.device)
    if seq <= window.size:
        return expiry
    order = torch.arange(seq, device=bias.device) if order is None else order
    ranking = window.ranking(bias.detach(), order).reshape(-1, seq)
    places = window.size - window.num_local
    rank = torch.empty_like(ranking, dtype=torch.int64)
    rank.scatter_(1, ranking.sort(dim=1, stable=True).indices, torch.arange(seq, device=bias.device).expand_as(rank))
    if document_starts is not None:  # later documents outrank a key, which has ended when they come
        rank += document_starts.expand(bias.shape).reshape(-1, seq) * seq
    flat = expiry.view(-1, seq)
    index = torch.arange(seq, device=bias.device).expand_as(rank)
    kept_rank, kept = rank[:, :places], index[:, :places]
    for start in range(places, seq, BLOCK):
        arriving = rank[:, start : start + BLOCK]
        number = arriving.shape[1]
        union, by_rank = torch.cat([kept_rank, arriving], dim=1).sort(dim=1)
        keys = torch.cat([kept, index[:, start : start + number]], dim=1).gather(1, by_rank)
        larger = arriving[:, None] > union[:, :number, None]  # (rows, going, arriving)
        among_kept = torch.arange(places + number - 1, places - 1, -1, device=bias.device) - larger.sum(-1)
        so_far = larger.cumsum(-1) + among_kept[..., None]
        gone = start + (so_far < places).sum(-1)
        flat.scatter_(1, keys[:, :number], torch.maximum(gone, keys[:, :number]))
        kept_rank, kept = union[:, number:], keys[:, number:]
    return (expiry + window.num_local).clamp(max=seq) if window.num_local else expiry


def lifetimes(
    bias: torch.Tensor, window: KeyWindow, document_ends: torch.Tensor | None, order: torch.Tensor | None = None
) -> torch.Tensor | None:
    """`key_expiry` within documents, at whose end their keys expire: (batch, kv_heads, seq); `None` if no key expires.

    Nothing waits for a device.

    Args:
        bias: (batch, kv_heads, seq).
        document_ends, order: See `dynamic_mask_attention`.
    """
    seq = bias.shape[-1]
    if document_ends is None:
        return key_expiry(bias, window, order) if seq > window.size else None
    ends = document_ends[:, None].expand(bias.shape)
    if seq <= window.size:
        return ends
    index = torch.arange(seq, device=bias.device)
    # As many tokens come before a document as belong to documents that have ended by then.
    tokens = index.expand(document_ends.shape).contiguous()
    starts = torch.searchsorted(document_ends.contiguous(), tokens, right=True)[:, None]
    return torch.minimum(key_expiry(bias, window, index - starts, starts), ends)


def take_keys(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather keys by index: (batch, kv_heads, keys, ...) and (batch, kv_heads, n) -> (batch, kv_heads, n, ...)."""
    return states.gather(2, index if states.ndim == 3 else index[..., None].expand(-1, -1, -1, states.shape[-1]))


def survivors(expiry: torch.Tensor, start: int, number: int) -> torch.Tensor:
    """The keys before ``start`` that query ``start`` may still see, oldest first, filled up with expired ones.

    Args:
        expiry: (..., seq), see `lifetimes`; at most ``number`` of the earlier keys may be alive at ``start``.

    Returns:
        (..., number) int64 indices.
    """
    return (expiry[..., :start] <= start).sort(dim=-1, stable=True).indices[..., :number]


def kept_keys(bias: torch.Tensor, window: KeyWindow, order: torch.Tensor | None = None) -> torch.Tensor:
    """The keys that the newest query sees, oldest first: (..., min(seq, W)) int64 indices.

    Args:
        bias, window, order: See `key_expiry`.
    """
    seq = bias.shape[-1]
    every = torch.arange(seq, device=bias.device)
    if seq <= window.size:
        return every.expand(bias.shape)
    ranking = window.ranking(bias.detach(), every if order is None else order)
    ranking = ranking.masked_fill(every >= seq - window.num_local, torch.inf)
    newest_first = ranking.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., : window.size]
    return (seq - 1 - newest_first).sort(dim=-1).values
