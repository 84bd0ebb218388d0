"""Reading prompts before decoding: packed into one row as training packs documents, so that none is padded."""

from collections.abc import Iterator, Sequence

import torch

from doge.model.attention.cache import NO_KEY, DogeCache, Slots
from doge.model.attention.window import kept_keys
from doge.model.modeling import DogeForCausalLM

TOKENS_TOGETHER = 8192  # tokens that one forward reads, or a single longer prompt

Prompt = Sequence[int]


def read_prompts(model: DogeForCausalLM, prompts: Sequence[Prompt], slots: int) -> tuple[torch.Tensor, list[Slots]]:
    """Logits of the next tokens, (prompts, vocab_size) float32, and every layer's slots, a row for each prompt.

    Slots are filled in the order of the tokens until the window is full; those left empty hold anything, with a bias of
    minus infinity.

    Args:
        model: whose mode is kept.
        prompts: none of them empty.
        slots: of each head, to be at most `keep_window_size`; no fewer than the longest prompt has keys in its window.
    """
    training = model.training
    model.eval()
    try:
        found = [_read_together(model, group, slots) for group in _groups(prompts)]
    finally:
        model.train(training)
    if len(found) == 1:
        return found[0]
    return torch.cat([logits for logits, _ in found]), [
        Slots(*(torch.cat(states) for states in zip(*layers, strict=True)))
        for layers in zip(*(layers for _, layers in found), strict=True)
    ]


def _groups(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    group: list[Prompt] = []
    tokens = 0
    for prompt in prompts:
        if group and tokens + len(prompt) > TOKENS_TOGETHER:
            yield group
            group, tokens = [], 0
        group.append(prompt)
        tokens += len(prompt)
    yield group


def _read_together(model: DogeForCausalLM, prompts: list[Prompt], slots: int) -> tuple[torch.Tensor, list[Slots]]:
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
    """Takes in documents packed in one row, and makes a row of slots of each.

    Attributes:
        found: every layer's, in the order in which they were filled.
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
        self._source = (starts + torch.minimum(place, ends[:, None] - 1))[:, None]  # of each slot, in the packed row
        self._starts = starts.flatten().tolist()

    @torch.no_grad()
    def fill(self, key, value, bias, order, layer_idx: int) -> None:
        """See `DogeCacheLayer.fill`; of one row."""
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
