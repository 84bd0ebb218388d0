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
    """The model's continuation of each prompt, sampled with a fixed seed; the prompt itself is left out.

    A prompt begins as documents do: with BOS, where the tokenizer has one.
    """
    torch.manual_seed(0)
    samples = []
    for prompt in prompts:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = [*bos, *tokenizer.encode(prompt, add_special_tokens=False)] or [tokenizer.eos_token_id]
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1,
            max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id,  # one row is never padded
        )  # fmt: skip
        samples.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return samples
