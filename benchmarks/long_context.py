"""Long sequences: forward and backward of Doge-20M against transformers', beyond the window.

    python benchmarks/long_context.py --lengths 2048 4096 8192 16384

fp32, 1 x T, `keep_window_size` 2048, distinct random tokens. Both sides take turns at each length and the medians are
compared; memory is the rise of the peak resident set over one step, in a fresh process each, and its growth exponent is
the slope of log memory over log length, fitted. transformers materialises masks of T x T and is left out
beyond --slow-limit. The outputs of one layer must agree within 1e-4, but for the queries whose window rounding
decides: its last key and the first one out of it have biases that are equal to float32's last digits (one layer,
because what such a query sees would go on into the next). The last line is one JSON object.
"""

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_step import build, resident_bytes

SIDES = ("ours", "transformers")
TOLERANCE = 1e-4
ROUNDING = 2.0**-20  # relative: eight units in the last place of float32
LEFT_OUT = 0.05  # share of the queries that rounding may decide


def build_spread(side: str, layers: int, window: int) -> Any:
    """Doge-20M without its head; its keys' biases differ, so that the window chooses among them."""
    model = build(
        side, "Doge-20M", "float32",
        num_hidden_layers=layers, keep_window_size=window, max_position_embeddings=32768,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(parameter + torch.randn(parameter.shape, generator=generator) * 0.02)
        for layer in model.model.layers:
            layer.self_attn.A.add_(1)
    return model.model


def step(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    began = time.perf_counter()
    model(tokens, use_cache=False).last_hidden_state.square().mean().backward()
    seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return seconds


def tokens_of(length: int) -> torch.Tensor:
    """Distinct ones: equal tokens have equal biases, and which of them is kept is not the same in transformers."""
    return torch.randperm(32768 - 3, generator=torch.Generator().manual_seed(length))[None, :length] + 3


@torch.no_grad()
def decided(model: Any, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """(length,) bool: the last key in the query's window has a clearly larger bias than the first one out of it."""
    layer = copy.deepcopy(model.layers[0]).double()
    attention = layer.self_attn
    values = attention.v_proj(layer.input_layernorm(model.embed_tokens(tokens).double()))
    biases = (attention.A * F.softplus(attention.dt_proj(values))).exp()[0].T
    found = torch.ones(tokens.shape[1], dtype=torch.bool)
    for query in range(window, tokens.shape[1]):
        last, first_out = biases[:, : query + 1].topk(window + 1).values[:, -2:].T
        found[query] = (first_out < last * (1 - ROUNDING)).all()
    return found


@torch.no_grad()
def compare(models: dict[str, torch.nn.Module], tokens: torch.Tensor, window: int) -> tuple[float, int]:
    """The largest difference of the outputs, and how many queries rounding decides, which are left out."""
    ours, theirs = (models[side](tokens, use_cache=False).last_hidden_state[0] for side in SIDES)
    compared = decided(models["ours"], tokens, window)
    return float((ours - theirs)[compared].abs().max()), int((~compared).sum())


def memory_of(side: str, length: int, args: argparse.Namespace) -> float:
    """Bytes that one step adds to the peak; nan where the process did not survive."""
    command = [sys.executable, __file__, "--memory-of", side, "--lengths", str(length)]
    command += ["--layers", str(args.layers), "--window", str(args.window)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else math.nan


def exponent(lengths: list[int], memory: list[float]) -> float:
    xs, ys = [math.log(each) for each in lengths], [math.log(each) for each in memory]
    return statistics.linear_regression(xs, ys).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="T (default: %(default)s)"
    )
    parser.add_argument("--window", type=int, default=2048, help="keep_window_size (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--slow-limit", type=int, default=8192, help="longest T of transformers (default: %(default)s)")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        model, tokens = build_spread(args.memory_of, args.layers, args.window), tokens_of(args.lengths[0])
        before = resident_bytes()
        step(model, tokens)
        print(resident_bytes("VmHWM") - before)
        return

    models = {side: build_spread(side, args.layers, args.window) for side in SIDES}
    single = {side: build_spread(side, 1, args.window) for side in SIDES}
    memory: dict[str, dict[int, float]] = {side: {} for side in SIDES}
    ratios, worst = {}, 0.0
    print(f"{'T':>7}{'ours, s':>10}{'transformers':>14}{'ratio':>8}{'ours, MB':>10}{'transformers':>14}", end="")
    print(f"{'difference':>12}{'left out':>10}")
    for length in args.lengths:
        tokens = tokens_of(length)
        sides = SIDES if length <= args.slow_limit else SIDES[:1]
        difference, left_out = compare(single, tokens, args.window) if len(sides) > 1 else (math.nan, 0)
        if len(sides) > 1 and not (difference <= TOLERANCE and left_out <= LEFT_OUT * length):
            raise SystemExit(f"The outputs of {length - left_out:,} of {length:,} queries differ by {difference:.1e}.")
        worst = max(worst, difference) if len(sides) > 1 else worst
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(-1, args.rounds):
            for side in sides:
                elapsed = step(models[side], tokens)
                if number >= 0:
                    seconds[side].append(elapsed)
        medians = {side: statistics.median(each) for side, each in seconds.items()}
        for side in sides:
            memory[side][length] = memory_of(side, length, args)
        theirs = medians.get("transformers", math.nan)
        ratios[length] = theirs / medians["ours"]
        print(
            f"{length:7,}{medians['ours']:10.2f}{theirs:14.2f}{ratios[length]:8.2f}"
            f"{memory['ours'][length] / 1e6:10,.0f}{memory['transformers'].get(length, math.nan) / 1e6:14,.0f}"
            f"{difference:12.1e}{left_out:10}",
            flush=True,
        )
    result = {f"ratio_{length // 1024}k": round(ratio, 2) for length, ratio in ratios.items() if not math.isnan(ratio)}
    result["memory_exponent"] = round(exponent(list(memory["ours"]), list(memory["ours"].values())), 3)
    print(json.dumps(result | {"difference": worst}))


if __name__ == "__main__":
    main()
