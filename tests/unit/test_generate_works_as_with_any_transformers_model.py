"""Every way of transformers into `generate` gives the tokens of transformers' own Doge, or one sentence."""

import pytest
import tokenizers
import torch
import transformers
from tiny_models import tiny_model, tokens
from transformers import DynamicCache

from doge.common.errors import UserError
from doge.model.attention import DogeCache

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def stock_twin(model):
    twin = transformers.DogeForCausalLM(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def repeating(length: int = 30) -> torch.Tensor:
    """One prompt of tokens that come again and again, which a lookup in the prompt finds."""
    return tokens(1, 6).repeat(1, -(-length // 6))[:, :length]


ASSISTANTS = {
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 4},
    "the model itself": lambda model: {"assistant_model": model},
    "a smaller model": lambda model: {"assistant_model": tiny_model(num_hidden_layers=1)},
    "transformers' Doge": lambda model: {"assistant_model": stock_twin(model)},
    "the model's first layer": lambda model: {"assistant_early_exit": 1},
}


@pytest.mark.parametrize(
    ("assistant", "moe"),
    [*((assistant, False) for assistant in ASSISTANTS), ("prompt lookup", True), ("the model itself", True)],
)
def test_assisted_decoding_gives_the_tokens_of_greedy_search(assistant, moe):
    model = tiny_model(moe)
    expected = model.generate(repeating(), **GREEDY)
    assert torch.equal(model.generate(repeating(), **GREEDY, **ASSISTANTS[assistant](model)), expected)


@pytest.mark.parametrize("prompt", [12, 40], ids=["a prompt below the window", "a prompt above it"])
@pytest.mark.parametrize("assistant", ["prompt lookup", "a smaller model"])
def test_assisted_decoding_beyond_the_window_is_refused_before_it_begins(assistant, prompt):
    model = tiny_model(window=16)
    with pytest.raises(UserError, match="keep_window_size of 16 tokens") as error:
        model.generate(repeating(prompt), **GREEDY, **ASSISTANTS[assistant](model))
    assert "\n" not in str(error.value)


def test_an_assistant_of_a_small_window_says_so():
    with pytest.raises(UserError, match="keep_window_size 16"):
        tiny_model().generate(repeating(40), **GREEDY, assistant_model=tiny_model(window=16, num_hidden_layers=1))


@pytest.mark.parametrize("sizes", [[20], [8, 12], [20] + [1] * 4], ids=["one piece", "two pieces", "token by token"])
@pytest.mark.parametrize("window", [24, 2048])
@pytest.mark.parametrize("removed", [1, 3, 20])
def test_a_cropped_cache_is_that_of_the_tokens_left(sizes, window, removed):
    model, row, other = tiny_model(window=window), tokens(2, 24), tokens(2, 24, seed=1)
    cache, start = DogeCache(model.config), 0
    with torch.no_grad():
        for size in sizes:
            model(row[:, start : start + size], past_key_values=cache)
            start += size
        cache.crop(-removed)
        assert cache.get_seq_length() == start - removed
        left = start - removed
        found = model(other[:, left:], past_key_values=cache).logits
        whole = model(torch.cat([row[:, :left], other[:, left:]], dim=1)).logits[:, left:]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_a_cache_whose_keys_left_the_window_is_not_cropped():
    model = tiny_model(window=16)
    cache = model(tokens(1, 17)).past_key_values
    cache.crop(0)
    with pytest.raises(UserError, match="17 tokens cannot be cropped"):
        cache.crop(-1)


def settings_of(case: str, model) -> dict:
    left_padded = tokens(2, 20)
    left_padded[0, :7] = 2
    mask = torch.ones_like(left_padded)
    mask[0, :7] = 0
    embed = model.get_input_embeddings()
    return {
        "several sequences": {"input_ids": tokens(2, 12), "num_return_sequences": 2, "num_beams": 4},
        "left padding": {"input_ids": left_padded, "attention_mask": mask},
        "left padding and beams": {"input_ids": left_padded, "attention_mask": mask, "num_beams": 3},
        "embeddings": {"inputs_embeds": embed(tokens(2, 12)).detach()},
        "embeddings and tokens": {"input_ids": tokens(2, 12), "inputs_embeds": embed(tokens(2, 12)).detach()},
        "embeddings and padding": {"inputs_embeds": embed(left_padded).detach(), "attention_mask": mask},
        "chunks of the prompt": {"input_ids": tokens(2, 30), "prefill_chunk_size": 8},
        "no cache": {"input_ids": tokens(2, 12), "use_cache": False},
        "penalties": {"input_ids": tokens(2, 12), "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    }[case]


CASES = [
    "several sequences", "left padding", "left padding and beams", "embeddings", "embeddings and tokens",
    "embeddings and padding", "chunks of the prompt", "no cache", "penalties",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_of_transformers(case):
    model = tiny_model()
    found, expected = (m.generate(**settings_of(case, model), **GREEDY) for m in (model, stock_twin(model)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "MoE"])
def test_a_cache_goes_on_where_it_ended(moe):
    model, prompt = tiny_model(moe), tokens(2, 12)
    cache = DogeCache(model.config)
    first = model.generate(prompt, past_key_values=cache, **GREEDY)
    longer = torch.cat([first, tokens(2, 5, seed=3)], dim=1)
    every = torch.ones_like(longer)  # there may be padding tokens among those that were generated
    second = model.generate(longer, attention_mask=every, past_key_values=cache, **GREEDY)
    assert torch.equal(second, model.generate(longer, attention_mask=every, **GREEDY))


def test_a_cache_of_something_else_is_one_sentence():
    model = tiny_model()
    filled = model(tokens(1, 12)).past_key_values
    for cache, problem in (
        (DynamicCache(), "must be a DogeCache, not DynamicCache"),
        (((torch.zeros(2, 2, 4, 16),) * 2,) * 2, "must be a DogeCache, not tuple"),
        (filled, "holds 1 row, and the input has 2"),
        (DogeCache(tiny_model(num_hidden_layers=3).config), "3 layers"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            model.generate(tokens(2, 16), past_key_values=cache, **GREEDY)
        assert "\n" not in str(error.value)


def test_continuous_batching_is_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"use generate, or doge\.Decoder"):
        tiny_model().generate_batch(tokens(2, 12).tolist())


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<begin>", "<end>", "<pad>", *alphabet])}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<begin>", eos_token="<end>", pad_token="<pad>", padding_side="left"
    )


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "MoE"])
def test_a_pipeline_writes_what_generate_does(tokenizer, moe):
    model = tiny_model(moe, vocab_size=259)
    write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    texts = ["Once", "A longer text"]
    for text, (written,) in zip(texts, write(texts, max_new_tokens=6, do_sample=False), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        alone = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
        assert written["generated_text"] == tokenizer.decode(alone, skip_special_tokens=True)


@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "prompt lookup"])
def test_a_streamer_gets_every_token_and_a_stop_string_ends_them(tokenizer, settings):
    model, got = tiny_model(vocab_size=259), []
    prompt = tokenizer("again and again and again", return_tensors="pt").input_ids
    whole = model.generate(prompt, **GREEDY)
    streamer = transformers.generation.BaseStreamer()
    streamer.put = lambda value: got.extend(value.flatten().tolist())
    streamer.end = lambda: got.append("end")
    stop = tokenizer.decode(whole[0, prompt.shape[1] + 2 :][:2])
    stopped = model.generate(
        prompt,
        streamer=streamer,
        tokenizer=tokenizer,
        stop_strings=[stop],
        **{**GREEDY, "min_new_tokens": 0},
        **settings,
    )
    assert got == [*stopped[0].tolist(), "end"]
    assert torch.equal(stopped[0], whole[0, : stopped.shape[1]])
    assert prompt.shape[1] < stopped.shape[1] <= prompt.shape[1] + 4
