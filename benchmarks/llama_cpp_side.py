"""llama.cpp beside Doge: a plain Llama of a Doge model's shape, with random weights, through llama.cpp's own library.

Doge's few further parameters (dynamic mask, residual weights, norms of queries and keys) have no counterpart in a
Llama; everything that is read as a matrix has.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

MISSING = (
    "llama.cpp is not installed: pip install -e '.[benchmarks]' builds it for this processor (needs "
    "cmake and a C++ compiler), or leave it out with --without-llama-cpp."
)
KINDS = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}
"""What a GGUF file calls our precisions."""
CACHE_BYTES = 2
"""llama.cpp keeps keys and values in float16 by default, whatever its weights are."""


def require() -> None:
    """Raise SystemExit, with what to install, where llama.cpp or the writer of its files is missing."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError:
        raise SystemExit(MISSING) from None


def write_llama(config, kind: str, path: Path) -> int:
    """Write a Llama with the sizes of a Doge ``config`` to ``path``; returns the bytes of its tensors.

    Args:
        kind: The type of its matrices, one of `KINDS`' values. Norms are float32, as llama.cpp wants them.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    generator, stored = torch.Generator().manual_seed(0), gguf.GGMLQuantizationType[kind]
    written = 0

    def add(name: str, *shape: int) -> None:
        nonlocal written
        if len(shape) == 1:
            data, form = torch.ones(shape).numpy(), gguf.GGMLQuantizationType.F32
        else:
            drawn = (torch.randn(shape, generator=generator) * 3 * config.initializer_range).numpy()
            data, form = gguf.quants.quantize(drawn, stored), stored
        writer.add_tensor(f"{name}.weight", data, raw_dtype=form)
        written += data.nbytes

    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    add("token_embd", config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        own = f"blk.{layer}."
        add(f"{own}attn_norm", hidden)
        add(f"{own}attn_q", hidden, hidden)
        add(f"{own}attn_k", keys, hidden)
        add(f"{own}attn_v", keys, hidden)
        add(f"{own}attn_output", hidden, hidden)
        add(f"{own}ffn_norm", hidden)
        add(f"{own}ffn_gate", inner, hidden)
        add(f"{own}ffn_up", inner, hidden)
        add(f"{own}ffn_down", hidden, inner)
    add("output_norm", hidden)
    if not config.tie_word_embeddings:
        add("output", config.vocab_size, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@contextlib.contextmanager
def open_llama(config, precision: str, context: int) -> Iterator[tuple[Callable[[list[int], int], Iterator[int]], int]]:
    """A generator of greedy tokens, `stream(prompt, new_tokens)`, and the bytes of the weights that it reads a token.

    It has as many threads as torch. The largest logit is found by numpy in microseconds; llama.cpp's own greedy
    sampler first makes a list of all candidates.

    Raises:
        RuntimeError: llama.cpp refuses the model.
    """
    import llama_cpp.llama_cpp as library
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        size = write_llama(config, KINDS[precision], path)
        silent = library.llama_log_callback(lambda level, text, data: None)
        library.llama_log_set(silent, None)
        library.llama_backend_init()
        model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load a {KINDS[precision]} model of this shape.")
    wanted = library.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = context
    wanted.n_threads = wanted.n_threads_batch = torch.get_num_threads()
    session = library.llama_init_from_model(model, wanted)

    def stream(prompt: list[int], new_tokens: int) -> Iterator[int]:
        library.llama_memory_clear(library.llama_get_memory(session), True)
        tokens = prompt
        for _ in range(new_tokens):
            held = (library.llama_token * len(tokens))(*tokens)  # the batch only points there
            batch = library.llama_batch_get_one(held, len(tokens))
            if failure := library.llama_decode(session, batch):
                raise RuntimeError(f"llama_decode returned {failure}.")
            logits = np.ctypeslib.as_array(library.llama_get_logits_ith(session, -1), (config.vocab_size,))
            tokens = [int(logits.argmax())]
            yield tokens[0]

    try:
        yield stream, size
    finally:
        library.llama_free(session)
        library.llama_model_free(model)
