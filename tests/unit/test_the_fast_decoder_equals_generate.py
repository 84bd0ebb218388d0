"""The lean decoder gives the tokens of `generate`, row for row, and what it adds is what it says."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import logits_of, tiny_model, tokens
from torch._inductor.utils import fresh_cache

from doge.common.errors import UserError
from doge.generation import Decoder, Sampling, prefill
from doge.generation.cpu import cpu_step
from doge.generation.cpu.cpu_step import CpuStep
from doge.generation.int8 import Int8
from doge.generation.torch_step import TorchStep
from doge.generation.weights import LayerWeights
from doge.model import compilation
from doge.model.attention import DogeCache

NEW = 24


def prompts_of(*lengths):
    return [tokens(1, length, seed=seed)[0].tolist() for seed, length in enumerate(lengths)]


def generated(model, prompt, number=NEW):
    settings = {"max_new_tokens": number, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    return model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("window", [2048, 16])
@pytest.mark.parametrize(("moe", "compile"), [(False, True), (False, False), (True, False)])
def test_every_row_gets_the_tokens_it_would_get_alone(moe, compile, window):
    model, given = tiny_model(moe, window), prompts_of(3, 20, 11, 1, 7)
    decoder = Decoder(model, compile)
    assert isinstance(decoder._step, CpuStep if compile else TorchStep)
    assert decoder.generate(given, NEW, eos_token_id=-1) == [generated(model, prompt) for prompt in given]


@pytest.mark.parametrize("few", [1, 2, 3])
def test_in_bfloat16_the_library_distinguishes_few_rows_from_many_alone(few):
    """As the docstring says: fewer than four rows, or any number from four on."""
    decoder, given = Decoder(tiny_model(dtype=torch.bfloat16)), prompts_of(*range(3, 15))

    def in_batches_of(rows):
        batches = [given[start : start + rows] for start in range(0, len(given), rows)]
        return [row for batch in batches for row in decoder.generate(batch, NEW, eos_token_id=-1)]

    assert in_batches_of(few) == in_batches_of(1)
    assert in_batches_of(4 * few) == in_batches_of(12)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "moe"), [(1, False), (3, True)])
def test_the_step_that_torch_compiles_gives_the_same_tokens(moe, rows):
    model, prompts = tiny_model(moe, window=16, num_hidden_layers=1 if moe else 2), prompts_of(*[9] * rows)
    decoder = Decoder(model, compile=False)
    expected = decoder.generate(prompts, NEW, eos_token_id=-1)
    layers = [LayerWeights.of(layer) for layer in model.model.layers]
    decoder._step = TorchStep(model, layers, model.model.embed_tokens.weight, model.lm_head.weight)
    assert decoder._step._compiles
    assert decoder.generate(prompts, NEW, eos_token_id=-1) == expected


@pytest.fixture
def num_threads():
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


def logits_of_steps(decoder, lengths, steps, reader=None):
    """Logits (steps + 1, rows, vocab_size) over the end of prompts of these lengths and over the tokens after it.

    Prompts are read by another decoder, if one is given.

    No token of a row is there twice: two would tie for the window but for the last digit.
    """
    rows = [tokens(1, length + steps, seed=seed)[0].tolist() for seed, length in enumerate(lengths)]
    with torch.no_grad():
        first, slots, number = (reader or decoder)._prefill([row[: len(row) - steps] for row in rows], steps + 1, 1)
        found = [first.float()]
        for step in range(steps):
            given = torch.tensor([row[len(row) - steps + step] for row in rows])
            found.append(decoder._step(given, number + step, slots, greedy=False).float())
    return torch.stack(found)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forced", [{}, {"num_sink_keys": 2}, {"num_local_keys": 3}])
@pytest.mark.parametrize(("rows", "threads"), [(1, 2), (2, 1), (9, 2)])
def test_the_library_computes_what_torch_does(num_threads, rows, threads, forced, dtype, int8):
    num_threads(threads)
    model = tiny_model(window=24, dtype=dtype, hidden_size=72)  # head_dim 18: no multiple of the vectors' width
    for name, value in forced.items():
        setattr(model.config, name, value)
    lengths = range(3, 3 + 5 * rows, 5)
    library, plain = (Decoder(model, compile, int8) for compile in (True, False))
    ours = logits_of_steps(library, lengths, 40)
    # PyTorch reads prompts with the model's own weights, the library with those it decodes with
    theirs = logits_of_steps(plain, lengths, 40, library if int8 else None)
    if dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    else:
        assert (ours - theirs).abs().mean() < 0.03 * theirs.std()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("read", [CpuStep.prefill, TorchStep.prefill])
@pytest.mark.parametrize(
    ("lengths", "shared"), [((1, 300, 5, 700), 0), ((41, 3, 17, 60, 24, 25), 0), ((2, 400, 30), 300)]
)
def test_prompts_are_read_as_if_alone(monkeypatch, num_threads, lengths, shared, read, layers):
    num_threads(2)  # so that some hundred tokens are several chunks of what a thread reads at once
    monkeypatch.setattr(prefill, "TOKENS_PER_FORWARD", 64)  # in several forwards
    window = 2048 if max(lengths) > 100 else 24
    model = tiny_model(window=window, vocab_size=1024, num_hidden_layers=layers)
    decoder = Decoder(model, compile=read is CpuStep.prefill)
    torch.manual_seed(0)
    beginning, *ends = torch.randperm(1000)[None].repeat(1 + len(lengths), 1).split(1)
    ends = [end[0, shared:][torch.randperm(1000 - shared)] for end in ends]  # no token of a row twice: two would tie
    rows = [
        [*beginning[0, :shared].tolist(), *end[:length].tolist()] for end, length in zip(ends, lengths, strict=True)
    ]
    with torch.no_grad():
        logits, slots = read(decoder._step, rows, 768)
        for number, row in enumerate(rows):
            cache = DogeCache(model.config)
            expected = model(torch.tensor([row]), past_key_values=cache).logits[0, -1]
            torch.testing.assert_close(logits[number], expected, atol=1e-5, rtol=1e-5)
            for found, layer in zip(slots, cache.layers, strict=True):
                kept = min(len(row), window)
                for mine, other in zip(found, layer.slots, strict=True):
                    torch.testing.assert_close(mine[number, :, :kept], other[0, :, :kept], atol=1e-5, rtol=1e-5)
                assert found.biases[number, :, kept:].eq(-torch.inf).all()


def test_what_prompts_begin_with_is_read_once(monkeypatch):
    model, (prefix, *rests) = tiny_model(), prompts_of(30, 1, 5, 9)
    decoder, advance, rows = Decoder(model), CpuStep._advance, []
    monkeypatch.setattr(
        CpuStep, "_advance", lambda step, given, *others: rows.append(given) or advance(step, given, *others)
    )
    given = [prefix + rest for rest in rests]
    assert decoder.generate(given, NEW, eos_token_id=-1) == [generated(model, prompt) for prompt in given]
    assert list(rows[0][0][:30]) == prefix
    assert sum(map(len, rows[1])) <= 1 + 5 + 9


def test_a_prompt_longer_than_the_window_changes_no_other():
    decoder, (long, short) = Decoder(tiny_model(window=16), int8=True), prompts_of(40, 5)
    alone = decoder._step.prefill([short], 64)[0]
    assert torch.equal(decoder._step.prefill([long, short], 64)[0][1:], alone)


def test_int8_costs_little():
    model = tiny_model()
    exact, rounded = (logits_of_steps(Decoder(model, int8=int8), [30], 10) for int8 in (False, True))
    error = (exact - rounded).abs().mean() / exact.std()
    assert 1e-5 < error < 0.02


def test_int8_rows_keep_half_a_step():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * torch.arange(7.0)[:, None]
    rounded = Int8.of(weight)
    error = (rounded.data * rounded.scale[:, None] - weight).abs()
    assert (error <= rounded.scale[:, None] * 0.5001).all()
    assert rounded.data[1:].abs().amax(1).eq(127).all()


@pytest.mark.parametrize("compile", [True, False])
def test_far_beyond_the_window_the_tokens_are_the_full_forwards(compile):
    model, prompt = tiny_model(window=16), prompts_of(5)[0]
    found = Decoder(model, compile).generate([prompt], 200, eos_token_id=-1)[0]
    logits = logits_of(model, torch.tensor([prompt + found]))
    assert found == logits[0, 4:-1].argmax(-1).tolist()


def test_a_row_ends_at_the_end_token_and_the_others_go_on():
    model, prompts = tiny_model(), prompts_of(4, 9)
    decoder = Decoder(model, compile=False)
    whole = decoder.generate(prompts, NEW, eos_token_id=-1)
    end = next(token for token in whole[0] if token not in whole[1])
    found = decoder.generate(prompts, NEW, eos_token_id=end)
    assert found == [whole[0][: whole[0].index(end)], whole[1]]


def test_several_end_tokens_may_be_given_or_be_the_models(monkeypatch):
    model, prompts = tiny_model(), prompts_of(4)
    decoder = Decoder(model, compile=False)
    whole = decoder.generate(prompts, NEW, eos_token_id=-1)[0]
    expected = [whole[: whole.index(whole[5])]]
    assert decoder.generate(prompts, NEW, eos_token_id=[1, whole[5]]) == expected
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, whole[5]])
    assert decoder.generate(prompts, NEW) == expected


def test_threads_may_share_a_decoder():
    decoder, prompts = Decoder(tiny_model(window=16)), prompts_of(3, 20, 11)
    expected = [decoder.generate([prompt], 60, eos_token_id=-1) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            assert list(pool.map(lambda prompt: decoder.generate([prompt], 60, eos_token_id=-1), prompts)) == expected


def test_another_default_dtype_is_no_matter():
    decoder, prompts = Decoder(tiny_model()), prompts_of(3)
    expected = decoder.generate(prompts, 5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert decoder.generate(prompts, 5) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_equal_prompts_are_read_once(monkeypatch):
    model, (one, two) = tiny_model(), prompts_of(4, 9)
    shapes = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = Decoder(model, compile=False).generate([one, two, one], 5, num_return_sequences=2, eos_token_id=-1)
    assert shapes == [(1, 4 + 9)]
    assert found[0] == found[1] == found[4] == found[5] == generated(model, one, 5)
    assert found[2] == found[3] == generated(model, two, 5)


def test_what_is_drawn_is_a_function_of_the_seed():
    decoder, prompts = Decoder(tiny_model(), compile=False), prompts_of(4)
    drawn = [
        decoder.generate(prompts, NEW, Sampling(do_sample=True, seed=seed), num_return_sequences=2, eos_token_id=-1)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0][0] != drawn[0][1]
    greedy = decoder.generate(prompts, NEW, eos_token_id=-1)
    assert decoder.generate(prompts, NEW, Sampling(do_sample=True, top_k=1), eos_token_id=-1) == greedy


def test_sampling_draws_in_proportion_and_within_its_bounds():
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = (probabilities.log() * 2).expand(20000, -1)
    for sampling, expected in (
        (Sampling(do_sample=True, temperature=2.0, seed=0), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(do_sample=True, temperature=2.0, top_k=2, seed=0), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(do_sample=True, temperature=2.0, top_p=0.7, seed=0), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(do_sample=True, temperature=2.0, top_p=0.4, seed=0), [1, 0, 0, 0]),
    ):
        drawn = sampling.choose(logits, sampling.generator(logits.device))
        shares = torch.bincount(drawn, minlength=4) / len(logits)
        torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float32), atol=0.015, rtol=0)
        assert not shares[torch.tensor(expected) == 0].any()


@pytest.mark.parametrize(
    ("settings", "name"), [({"temperature": 0.0}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 1.5}, "top_p")]
)
def test_impossible_sampling_is_one_sentence(settings, name):
    with pytest.raises(UserError, match=name):
        Sampling(do_sample=True, **settings)


def test_nothing_to_go_on_from_or_to_is_one_sentence():
    decoder = Decoder(tiny_model(), compile=False)
    with pytest.raises(UserError, match="max_new_tokens"):
        decoder.generate([[3]], 0)
    for given in ([], [[3, 4], []]):
        with pytest.raises(UserError, match="at least one token"):
            decoder.generate(given, 3)


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("token", [-1, 128])
def test_a_token_of_another_vocabulary_is_one_sentence(token, compile):
    with pytest.raises(UserError, match="outside 0 to 127"):
        Decoder(tiny_model(), compile).generate([[3], [4, token, 5]], 3)


def test_another_default_device_is_no_matter():
    decoder, given = Decoder(tiny_model()), prompts_of(3, 5)
    expected = decoder.generate(given, 5)
    with torch.device("meta"):
        assert decoder.generate(given, 5) == expected


def test_an_odd_size_is_left_to_torch():
    model, given = tiny_model(intermediate_size=97), prompts_of(3, 9, 4, 8, 1)
    assert not CpuStep.supports(model, [LayerWeights.of(layer) for layer in model.model.layers])
    decoder = Decoder(model, compile=False)
    assert decoder.generate(given, 5, eos_token_id=-1) == [generated(model, prompt, 5) for prompt in given]


def test_a_compiler_that_fails_is_no_error(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("DOGE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    cpu_step._library.cache_clear()
    model = tiny_model()
    layers = [LayerWeights.of(layer) for layer in model.model.layers]
    assert not CpuStep.supports(model, layers)
    cpu_step._library.cache_clear()
    assert "false says" in caplog.text
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_the_same_is_computed_and_it_is_said_once(monkeypatch, caplog):
    model, prompts = tiny_model(), prompts_of(4)
    expected = Decoder(model, compile=False).generate(prompts, 5)
    cpu_step._library.cache_clear()
    monkeypatch.setattr(cpu_step.shutil, "which", lambda name: None)
    compilation.can_compile.cache_clear()
    torch._dynamo.reset()
    without = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)})
    with without, fresh_cache(), caplog.at_level(logging.WARNING, "doge"):
        assert Decoder(model).generate(prompts, 5) == expected
        assert Decoder(model).generate(prompts, 5) == expected
    compilation.can_compile.cache_clear()
    cpu_step._library.cache_clear()
    torch._dynamo.reset()
    assert sum("torch.compile" in record.message for record in caplog.records) == 1
    assert sum("fast decoding step" in record.message for record in caplog.records) == 1
