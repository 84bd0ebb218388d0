"""Exporting a training state as a model directory that transformers opens."""

import copy
from typing import TYPE_CHECKING

import transformers

from doge.common.storage import Storage
from doge.conversion.model_code import add_model_code
from doge.model.configuration import DogeConfig
from doge.model.modeling import DogeForCausalLM, build_model
from doge.training.state.train_state import TrainState, check_fits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_model(
    state: TrainState, config: DogeConfig, tokenizer: "PreTrainedTokenizerBase", storage: Storage, name: str
) -> DogeForCausalLM:
    """Write weights (float32), configuration and tokenizer as the ``save_pretrained`` directory ``name`` of a storage.

    BOS, EOS and PAD of the configuration and of ``generation_config.json`` are the tokenizer's, None where it has none,
    so that whoever generates stops where the documents ended.

    Returns:
        The exported model, in evaluation mode.

    Raises:
        UserError: the state is that of another model.
        StorageError: the storage cannot be written.
    """
    config = copy.deepcopy(config)
    for name_of_id in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name_of_id, getattr(tokenizer, name_of_id))
    model = build_model(config)
    check_fits(state, model)
    model.load_state_dict(state.parameters, strict=False)
    model.tie_weights()

    transformers.utils.logging.disable_progress_bar()

    def fill(directory: str) -> None:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        add_model_code(directory, config)

    storage.write(name, fill)
    return model.eval()
