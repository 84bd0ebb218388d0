"""How the next token is chosen from its logits."""

from dataclasses import dataclass

import torch

from doge.common.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Sampling options with the names and meaning of transformers' `GenerationConfig`.

    Args:
        do_sample: Sample a token; otherwise take the likeliest.
        temperature: Divides the logits.
        top_k: Sample only from the k likeliest tokens.
        top_p: Sample only from the fewest likeliest tokens whose probabilities add up to at least top_p.
        seed: Seed of the sampling; by default torch's global generator is used.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(
                f"temperature must be above 0, not {self.temperature}: set do_sample to False for the likeliest token."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}.")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A generator with the seed; None without one."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def choose(self, logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Choose next tokens, (rows,) int64, from logits (rows, vocab_size)."""
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
