"""How the next token is chosen from its logits."""

from dataclasses import dataclass

import torch

from doge.common.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """As in transformers' `GenerationConfig`.

    Args:
        do_sample: draw a token; otherwise take the likeliest.
        temperature: the logits are divided by it.
        top_k: draw from so many likeliest alone.
        top_p: … or from the fewest likeliest whose probabilities add up to it.
        seed: of what is drawn; by default torch's global generator is used.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self):
        if not self.temperature > 0:
            raise UserError(
                f"temperature must be above 0, not {self.temperature}: leave do_sample off for the likeliest."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}.")

    def generator(self, device: torch.device) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def choose(self, logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Next tokens, (rows,) int64, from logits (rows, vocab_size)."""
        if not self.do_sample:
            return logits.argmax(-1)
        logits, tokens = logits.float() / self.temperature, None
        if self.top_k is not None or self.top_p is not None:
            logits, tokens = logits.topk(min(self.top_k or logits.shape[-1], logits.shape[-1]))
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)  # the likeliest always stays
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        return (drawn if tokens is None else tokens.gather(-1, drawn))[:, 0]
