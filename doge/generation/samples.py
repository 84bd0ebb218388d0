"""Sample continuations of a few prompts, for a person to read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from doge.model.modeling import DogeForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate_samples(
    model: DogeForCausalLM, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], max_new_tokens: int = 64
) -> list[str]:
    """The model's continuation of each prompt, sampled with a fixed seed; the prompt itself is left out."""
    torch.manual_seed(0)
    samples = []
    for prompt in prompts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1,
            max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        samples.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return samples
