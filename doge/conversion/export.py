"""From a checkpoint to a model directory that transformers opens, and what that model writes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import transformers

from doge.common.storage import Storage
from doge.model.configuration import DogeConfig
from doge.model.modeling import DogeForCausalLM, build_model
from doge.training.state.train_state import TrainState, check_fits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_model(
    state: TrainState, config: DogeConfig, tokenizer: "PreTrainedTokenizerBase", storage: Storage, name: str
) -> DogeForCausalLM:
    """Write weights (fp32), configuration and tokenizer as one ``save_pretrained`` directory; returns the model."""
    model = build_model(config)
    check_fits(state, model)
    model.load_state_dict(state.parameters, strict=False)
    model.tie_weights()

    transformers.utils.logging.disable_progress_bar()

    def fill(directory: str) -> None:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    storage.write(name, fill)
    return model.eval()


@torch.no_grad()
def generate_samples(
    model: DogeForCausalLM, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], max_new_tokens: int = 64
) -> list[str]:
    """What the model writes after each prompt, sampled with a fixed seed; the prompt is not repeated."""
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
