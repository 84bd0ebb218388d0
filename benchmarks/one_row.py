"""The speed of decoding one row: Doge beside transformers and llama.cpp, and how much of the memory each side uses.

The time runs from the first new token to the last, so that reading the prompt is left out on every side. Medians of
rounds in which the sides take turns.

MBU, memory-bandwidth utilization, is the bytes of weights, keys and values that a token must read, times tokens per
second, over the bandwidth that `memory_bandwidth.py` measures in the same run (the best of several). A model that fits
in a cache reads little from memory: its MBU says nothing, and may exceed 1.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from decode_models import DTYPES, build
from llama_cpp_side import CACHE_BYTES, open_llama, require
from memory_bandwidth import read_bandwidth
from transformers.generation.streamers import BaseStreamer

PROMPT, NEW = 64, 128
SIDES = ("ours", "llama.cpp", "transformers")
ALTERNATIVES = {"fp32": "f32", "bf16": "bf16", "int8": "q8"}
"""What llama.cpp's side is called in the result."""


class Side(NamedTuple):
    """A decoder.

    Args:
        generate: Takes a prompt and a function to call at every new token; returns the `NEW` tokens.
        bytes_read: Of weights, keys and values, that each token has to read.
    """

    generate: Callable[[list[int], Callable[[], None]], list[int]]
    bytes_read: float


class _Clock:
    def __init__(self):
        self.times: list[float] = []

    def __call__(self) -> None:
        self.times.append(time.perf_counter())


class _Streamer(BaseStreamer):
    """Calls a function at every token of transformers' `generate`."""

    def __init__(self, seen: Callable[[], None]):
        self._seen, self._prompt = seen, True

    def put(self, value):
        if not self._prompt:
            self._seen()
        self._prompt = False

    def end(self):
        pass


def _of_stream(stream: Callable[[list[int]], Iterable[int]], bytes_read: float) -> Side:
    def generate(prompt: list[int], seen: Callable[[], None]) -> list[int]:
        tokens = []
        for token in stream(prompt):
            tokens.append(token)
            seen()
        return tokens

    return Side(generate, bytes_read)


def cache_bytes(config, itemsize: int) -> float:
    """Bytes of the keys and values that a token reads, on average over the `NEW` ones."""
    keys = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return 2 * config.num_hidden_layers * keys * (PROMPT + NEW / 2) * itemsize


def weight_bytes(model, int8: bool) -> int:
    """Bytes of a model's parameters. With ``int8`` a matrix has a byte a weight and a float32 scale a row."""

    def of(name: str, parameter: torch.Tensor) -> int:
        if int8 and parameter.ndim == 2 and "dt_proj" not in name:
            return parameter.numel() + 4 * len(parameter)
        return parameter.numel() * parameter.element_size()

    return sum(of(name, parameter) for name, parameter in model.named_parameters())


def open_sides(ours, theirs, precision: str, llama: bool, stack: contextlib.ExitStack) -> dict[str, Side]:
    """The sides of one comparison; int8 is that of a float32 model, and has no counterpart in transformers."""
    from doge.generation import Decoder

    config, int8 = ours.config, precision == "int8"
    decoder, itemsize = Decoder(ours, int8=int8), ours.dtype.itemsize
    own = weight_bytes(ours, int8) + cache_bytes(config, itemsize)
    sides = {"ours": _of_stream(lambda prompt: (int(found) for found in decoder.stream([prompt], NEW)), own)}
    if llama:
        stream, size = stack.enter_context(open_llama(config, precision, PROMPT + NEW))
        read = size + cache_bytes(config, CACHE_BYTES)
        sides["llama.cpp"] = _of_stream(lambda prompt: stream(prompt, NEW), read)
    if not int8:

        def generate(prompt: list[int], seen: Callable[[], None]) -> list[int]:
            ids = torch.tensor([prompt])
            found = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                pad_token_id=2, streamer=_Streamer(seen),
            )  # fmt: skip
            return found[0, len(prompt) :].tolist()

        sides["transformers"] = Side(generate, weight_bytes(theirs, False) + cache_bytes(config, itemsize))
    return sides


def compare(sides: dict[str, Side], prompt: list[int], rounds: int) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Every side's tokens per second, the median of ``rounds`` after one that is not counted, and its tokens."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    tokens = {}
    for number in range(rounds + 1):
        for name, side in sides.items():
            clock = _Clock()
            tokens[name] = side.generate(prompt, clock)
            if number:
                speeds[name].append((NEW - 1) / (clock.times[-1] - clock.times[0]))
    return {name: statistics.median(each) for name, each in speeds.items()}, tokens


def measure(presets: list[str], rounds: int, llama: bool) -> dict[str, float]:
    """Print a line for every model and precision, with MBU by the best bandwidth so far.

    Returns the ratios, the MBU by the best bandwidth of all, and that in GB/s.

    Raises:
        SystemExit: llama.cpp is wanted but not installed, or transformers gives other tokens in fp32.
    """
    if llama:
        require()
    prompt = torch.randint(3, 32768, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    bandwidth, rows, result = read_bandwidth(), {}, {}
    print(f"{'tokens/s (MBU)':16}" + "".join(f"{name:>20}" for name in SIDES), flush=True)
    for preset in presets:
        for precision, alternative in ALTERNATIVES.items():
            ours, theirs = build(preset, DTYPES.get(precision, torch.float32))
            with contextlib.ExitStack() as stack:
                sides = open_sides(ours, theirs, precision, llama, stack)
                speeds, tokens = compare(sides, prompt, rounds)
            if precision == "fp32" and tokens["ours"] != tokens["transformers"]:
                raise SystemExit(f"The tokens of {preset} are not transformers' in fp32.")
            bandwidth = max(bandwidth, read_bandwidth())
            size = preset.rpartition("-")[2].lower()
            read = rows[size, precision] = {name: speeds[name] * side.bytes_read for name, side in sides.items()}
            found = (f"{speeds[name]:,.1f} ({read[name] / bandwidth:.2f})" if name in read else "" for name in SIDES)
            print(f"{f'{size} {precision}':16}" + "".join(f"{text:>20}" for text in found), flush=True)
            for name, key in (("llama.cpp", f"llamacpp_{alternative}"), ("transformers", f"transformers_{precision}")):
                if name in speeds:
                    result[f"ratio_{key}_{size}"] = round(speeds["ours"] / speeds[name], 2)
    print(f"This machine reads {bandwidth / 1e9:.1f} GB/s with {torch.get_num_threads()} threads.")
    for (size, precision), read in rows.items():
        result[f"mbu_{size}_{precision}"] = round(read["ours"] / bandwidth, 3)
        if "llama.cpp" in read:
            result[f"mbu_llamacpp_{ALTERNATIVES[precision]}_{size}"] = round(read["llama.cpp"] / bandwidth, 3)
    return result | {"bandwidth_gb_s": round(bandwidth / 1e9, 1)}
