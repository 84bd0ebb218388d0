"""Prefill: reading prompts before decoding, packed into one row as training packs documents, without padding."""

from collections.abc import Iterator, Sequence

import torch

from doge.model.attention.cache import NO_KEY, DogeCache, Slots
from doge.model.attention.window import kept_keys
from doge.model.modeling import DogeForCausalLM

TOKENS_PER_FORWARD = 8192  # tokens that one forward reads at most, except for a single longer prompt

Prompt = Sequence[int]


def prefill(model: DogeForCausalLM, prompts: Sequence[Prompt], slots: int) -> tuple[torch.Tensor, list[Slots]]:
    """Read prompts in evaluation mode, without changing the mode that the model is in.

    Args:
        model: The model.
        prompts: Token ids of each prompt, at least one each.
        slots: Slots of each head, limited to `keep_window_size`; no fewer than the longest prompt fills.

    Returns:
        Logits of the next tokens, (prompts, vocab_size) float32, and every layer's slots with a row per prompt. Slots
        are filled in the order of the tokens until the window is full; an empty slot has a bias of minus infinity, and
        any key.
    """
    training = model.training
    model.eval()
    try:
        found = [_prefill_packed(model, group, slots) for group in _groups(prompts)]
    finally:
        model.train(training)
    if len(found) == 1:
        return found[0]
    return torch.cat([logits for logits, _ in found]), [
        Slots(*(torch.cat(states) for states in zip(*layers, strict=True)))
        for layers in zip(*(layers for _, layers in found), strict=True)
    ]


def _groups(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Consecutive prompts that one forward reads."""
    group: list[Prompt] = []
    tokens = 0
    for prompt in prompts:
        if group and tokens + len(prompt) > TOKENS_PER_FORWARD:
            yield group
            group, tokens = [], 0
        group.append(prompt)
        tokens += len(prompt)
    yield group


def _prefill_packed(model: DogeForCausalLM, prompts: list[Prompt], slots: int) -> tuple[torch.Tensor, list[Slots]]:
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.tensor([[token for prompt in prompts for token in prompt]])
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    cache = _PromptCache(model.config, lengths.tolist(), slots, model.device)
    output = model(
        ids.to(model.device), position_ids=positions[None].to(model.device), past_key_values=cache, use_cache=True,
        logits_to_keep=lengths.cumsum(0).to(model.device) - 1,
    )  # fmt: skip
    return output.logits[0].float(), cache.found


class _PromptCache(DogeCache):
    """Is filled with documents packed in one row, and gives each a row of slots.

    Attributes:
        found: Slots of every layer so far.
    """

    packs_documents = True

    def __init__(self, config, lengths: list[int], slots: int, device: torch.device):
        super().__init__(config)
        self.found: list[Slots] = []
        self._window, self._lengths = self.layers[0].window, lengths
        slots = min(slots, self._window.size)
        ends = torch.tensor(lengths, device=device)
        place = torch.arange(slots, device=device)
        self._taken = (place < ends[:, None])[:, None]  # (rows, 1, slots)
        starts = (ends.cumsum(0) - ends)[:, None]
        self._source = (starts + torch.minimum(place, ends[:, None] - 1))[:, None]  # token of each slot
        self._starts = starts.flatten().tolist()

    @torch.no_grad()
    def fill(self, key, value, bias, order, layer_idx: int) -> None:
        """`DogeCacheLayer.fill` with one packed row."""
        kv_heads = bias.shape[1]
        source = self._source.expand(-1, kv_heads, -1)
        long = [row for row, length in enumerate(self._lengths) if length > self._window.size]
        if long:
            source = source.clone()
        for row in long:
            begin = self._starts[row]
            source[row] = begin + kept_keys(bias[0, :, begin : begin + self._lengths[row]], self._window)
        head = torch.arange(kv_heads, device=bias.device)[:, None]
        orders = source - source.new_tensor(self._starts)[:, None, None]
        self.found.append(
            Slots(
                key[0][head, source].contiguous(),
                value[0][head, source].contiguous(),
                bias[0][head, source].masked_fill(~self._taken, -torch.inf),
                orders.masked_fill(~self._taken, NO_KEY),
            )
        )
