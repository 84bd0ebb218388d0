"""Dynamic Mask Attention: causal attention with a bias per key, where a query attends to the keys of largest bias.

The score of query i and key j is `q_i . k_j / sqrt(head_dim) + m_j`, with one bias `m_j` per key and key-value head,
the same for every query; beyond `keep_window_size` W keys, query i attends only to the W largest `m_j` among `j <= i`.
Since `m_j` does not depend on the query, two facts make this cheap, and both are exact:

* The bias folds into the key as one more channel, matched by a 1 in the query, so ordinary causal attention computes
  it in memory linear in the length, gradient included.
* A key that was pushed out of the window never returns (the window of a later query holds only larger biases), so
  each key is seen by one interval of queries, `j <= i < expiry_j`, and a cache of W keys decodes exactly.

Ties: among equal biases the later key is kept. Ties are common: in the first layer, equal tokens have equal biases, and
a new model's are all 1. transformers leaves the choice to `topk`, whose order among equals is unspecified.

Source of the method: the Doge architecture of the SmallDoge team, as in transformers' `models/doge`.
"""

from doge.model.attention.cache import DogeCache
from doge.model.attention.dispatch import dynamic_mask_attention
from doge.model.attention.documents import document_ends
from doge.model.attention.layer import DogeAttention
from doge.model.attention.window import KeyWindow, kept_keys, key_expiry, lifetimes

__all__ = [
    "DogeAttention",
    "DogeCache",
    "KeyWindow",
    "document_ends",
    "dynamic_mask_attention",
    "kept_keys",
    "key_expiry",
    "lifetimes",
]
