"""A key-value cache of W slots per head, which decodes exactly and in constant memory at any length.

A key that has left the window never returns, so its slot can be reused: a new key takes the slot of the smallest bias
(the earliest among equals), or no slot if its own bias is smaller. Until the window is full, the cache grows by
doubling. Slots are in no order; each stores the place of its key in the row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import Cache, DogeConfig
from transformers.cache_utils import CacheLayerMixin

from doge.common.errors import UserError
from doge.common.words import count
from doge.model.attention.window import KeyWindow, kept_keys, key_expiry, take_keys

FIRST_SLOTS = 64
QUERY_CHUNK = 512  # queries masked at a time where several continue a cache
NO_KEY = -(2**40)  # the place stored in an empty slot: before every other


class Slots(NamedTuple):
    """The tensors of a layer's cache; see `DogeCacheLayer`."""

    keys: torch.Tensor
    values: torch.Tensor
    biases: torch.Tensor
    orders: torch.Tensor


class DogeCache(Cache):
    """The cache of a Doge model, for `generate(past_key_values=...)`.

    No gradient flows into it. It can be cropped while it has held no more tokens than `keep_window_size`: a key that
    left the window is gone.

    Args:
        config: The model's configuration.

    Attributes:
        packs_documents: Whether it may be filled with documents packed in one row.
    """

    packs_documents: bool = False

    def __init__(self, config: DogeConfig):
        super().__init__(layers=[DogeCacheLayer(KeyWindow.of(config)) for _ in range(config.num_hidden_layers)])

    def fill(self, key, value, bias, order, layer_idx: int) -> None:
        """See `DogeCacheLayer.fill`."""
        self.layers[layer_idx].fill(key, value, bias, order)

    def check_fits(self, layers: int, rows: int) -> None:
        """Raise UserError if it is of a model with another number of layers, or holds another number of rows."""
        if len(self.layers) != layers:
            raise UserError(f"past_key_values is of a model with {len(self.layers)} layers, and this one has {layers}.")
        if self.get_seq_length() and self.batch_size != rows:
            raise UserError(
                f"past_key_values holds {count(self.batch_size, 'row')}, and the input has {rows}: give each batch a "
                "cache of its own."
            )

    def attend(self, query, key, value, bias, order, layer_idx: int) -> torch.Tensor:
        """See `DogeCacheLayer.attend`."""
        return self.layers[layer_idx].attend(query, key, value, bias, order)


class DogeCacheLayer(CacheLayerMixin):
    """The slots of one layer.

    Attributes:
        keys, values: (batch, kv_heads, slots, head_dim), the keys rotated.
        biases: (batch, kv_heads, slots) float32, -inf where a slot is empty.
        orders: (batch, kv_heads, slots) int64, the place of each key in its row; see `DogeAttention.forward`.
        seen: Number of tokens so far, including those whose keys have left the window.
    """

    is_compileable = False
    is_croppable = False  # at any length, as transformers' deferred stopping would need it; see `crop`
    is_sliding = False

    keys: torch.Tensor
    values: torch.Tensor
    biases: torch.Tensor
    orders: torch.Tensor
    is_initialized: bool

    def __init__(self, window: KeyWindow):
        super().__init__()
        self.window = window
        self.reset()

    @property
    def slots(self) -> Slots:
        return Slots(self.keys, self.values, self.biases, self.orders)

    @torch.no_grad()
    def fill(self, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, order: torch.Tensor | None) -> None:
        """Start from a prompt, keeping the keys that its last query sees.

        Args:
            key, value: (batch, kv_heads, seq, head_dim).
            bias: (batch, kv_heads, seq) float32.
            order: (batch or 1, seq) int64; by default 0, 1, 2, ...
        """
        order = self._orders(bias, order)
        kept = kept_keys(bias, self.window, order)
        self._replace(*(take_keys(states, kept) for states in (key, value, bias, order)))
        self.seen = bias.shape[2]

    def attend(self, query, key, value, bias, order: torch.Tensor | None) -> torch.Tensor:
        """Add new tokens to the cache, and attend from them to the cached and the new keys.

        Args:
            query: (batch, heads, queries, head_dim).
            key, value, bias, order: The same tokens' keys, as in `fill`; by default the order continues the cache's.

        Returns:
            (batch, queries, heads, head_dim).
        """
        order = self._orders(bias, order)
        with torch.no_grad():
            self._make_room(query.shape[2])
        self.seen += query.shape[2]
        if query.shape[2] > 1:
            return self._attend_several(query, key, value, bias, order)
        with torch.no_grad():
            insert_key(self.keys, self.values, self.biases, self.orders, key, value, bias, order, self.window)
        return attend_slots(query, self.keys, self.values, self.biases)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; like transformers, this takes their number as a negative one.

        Raises:
            UserError: More tokens than the window's size have been added, so that keys may have been dropped for those
                that are to be removed.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"To remove tokens from the end of a cache, give their number as -{tokens_to_remove}.")
        if tokens_to_remove == 0:
            return
        if self.seen > self.window.size:
            raise UserError(
                f"A Doge cache of {self.seen} tokens cannot be cropped: for some of them, keys have left the window of "
                f"keep_window_size {self.window.size}. Assisted decoding and prompt lookup, which crop the cache, work "
                "only up to that many tokens."
            )
        self.seen = max(0, self.seen + tokens_to_remove)
        # Slots were filled in order.
        removed = torch.arange(self.biases.shape[-1], device=self.biases.device) >= self.seen
        self.biases = self.biases.masked_fill(removed, -torch.inf)
        self.orders = self.orders.masked_fill(removed, NO_KEY)

    def _attend_several(self, query, key, value, bias, order) -> torch.Tensor:
        number = min(self.seen - query.shape[2], self.keys.shape[2])  # filled slots
        slots = tuple(states[:, :, :number] for states in self.slots)
        if self.seen - query.shape[2] > self.window.size:  # before, slots are in order
            by_order = slots[-1].argsort(dim=-1)
            slots = tuple(take_keys(states, by_order) for states in slots)
        new = (key, value, bias, order)
        keys, values, biases, orders = (torch.cat(pair, dim=2) for pair in zip(slots, new, strict=True))
        expiry = key_expiry(biases, self.window, orders)
        chunks = []
        for start in range(0, query.shape[2], QUERY_CHUNK):
            part = query[:, :, start : start + QUERY_CHUNK]
            i = number + start + torch.arange(part.shape[2], device=query.device)[:, None]
            visible = (torch.arange(keys.shape[2], device=query.device) <= i) & (i < expiry[:, :, None])
            mask = biases[:, :, None].masked_fill(~visible, -torch.inf)
            chunks.append(_attend(part, keys, values, mask))
        with torch.no_grad():
            kept = kept_keys(biases, self.window, orders)
            self._replace(*(take_keys(states, kept) for states in (keys, values, biases, orders)))
        return torch.cat(chunks, dim=1)

    def _orders(self, bias: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """The places of new tokens, (batch, kv_heads, seq)."""
        if order is None:
            order = torch.arange(self.seen, self.seen + bias.shape[2], device=bias.device)
        return order.expand(bias.shape[0], -1)[:, None].expand(bias.shape)

    def _make_room(self, tokens: int) -> None:
        """Grow until the next tokens find empty slots, or the cache has as many slots as the window."""
        slots = self.keys.shape[2]
        needed = min(self.seen + tokens, self.window.size)
        if needed > slots:
            self._grow(min(max(needed, 2 * slots), self.window.size) - slots)

    def _replace(self, keys, values, biases, orders) -> None:
        """Replace the content, keeping the number of slots."""
        slots = self.keys.shape[2] if self.is_initialized else FIRST_SLOTS
        self.keys, self.values, self.biases, self.orders = keys, values, biases, orders
        self.is_initialized = True
        self._grow(max(0, min(slots, self.window.size) - keys.shape[2]))

    def _grow(self, number: int) -> None:
        self.keys, self.values = (F.pad(states, (0, 0, 0, number)).contiguous() for states in (self.keys, self.values))
        self.biases = F.pad(self.biases.float(), (0, number), value=-torch.inf).contiguous()
        self.orders = F.pad(self.orders, (0, number), value=NO_KEY).contiguous()

    # The interface of transformers' cache layers.

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0] if self.is_initialized else -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("A Doge cache is initialised by its first prompt: use fill.")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise NotImplementedError("A Doge cache also stores the biases of keys: use fill and attend.")

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.biases = self.orders = torch.empty(0)
        self.is_initialized, self.seen = False, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows with these indices, which may repeat."""
        if self.is_initialized:
            self.keys, self.values, self.biases, self.orders = (
                states.index_select(0, indices.to(states.device))
                for states in (self.keys, self.values, self.biases, self.orders)
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def insert_key(keys, values, biases, orders, key, value, bias, order, window: KeyWindow) -> None:
    """Insert one key per row and head in place: into an empty slot, or instead of the key that leaves the window.

    There must be an empty slot unless the window is full.

    Args:
        keys, values, biases, orders: see `DogeCacheLayer`.
        key, value: (batch, kv_heads, 1, head_dim).
        bias, order: (batch, kv_heads, 1).
    """
    competing = window.ranking(biases, orders)
    if window.num_local:
        competing = competing.masked_fill(orders > order - window.num_local, torch.inf)
    lowest = competing.amin(-1, keepdim=True)
    slot = torch.where(competing == lowest, orders, torch.iinfo(torch.int64).max).argmin(-1, keepdim=True)
    enters = window.ranking(bias, order) >= lowest
    if window.num_local:
        enters = torch.ones_like(enters)
    wide = slot[..., None].expand(-1, -1, -1, keys.shape[-1])
    keys.scatter_(2, wide, torch.where(enters[..., None], key, keys.gather(2, wide)))
    values.scatter_(2, wide, torch.where(enters[..., None], value, values.gather(2, wide)))
    biases.scatter_(2, slot, torch.where(enters, bias, biases.gather(2, slot)))
    orders.scatter_(2, slot, torch.where(enters, order, orders.gather(2, slot)))


def attend_slots(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Attend from one token per row to all slots: (batch, heads, 1, head_dim) -> (batch, 1, heads, head_dim)."""
    return _attend(query, keys, values, biases[:, :, None])


def _attend(query, keys, values, mask) -> torch.Tensor:
    """Attention with an additive mask (batch, kv_heads, queries or 1, keys): (batch, queries, heads, head_dim).

    The query heads of a group become further queries of their key-value head.
    """
    batch, heads, queries, head_dim = query.shape
    grouped = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # (batch, kv_heads, groups * queries, head_dim)
    mask = mask[:, :, None].expand(-1, -1, heads // keys.shape[1], queries, -1).flatten(2, 3)
    output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=head_dim**-0.5)
    return output.view(batch, heads, queries, head_dim).transpose(1, 2)
