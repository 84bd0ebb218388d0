"""How fast one training step of Doge is, against transformers' own implementation, on this machine's CPU.

    python benchmarks/train_step.py --presets Doge-20M Doge-60M

Both run forward, loss and backward over one sequence packed of documents, on the same tokens. Ours is compiled by layer
and keeps the documents apart; theirs (`attn_implementation="sdpa"`) is given no boundaries and attends across them,
which is its faster way. The two take turns, and the medians are compared: on a shared machine trust the ratios rather
than the speeds. Memory is measured in a fresh process each, uncompiled: how far the peak of the resident set rises
above its size just before the first step. The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def make_batch(side: str, vocab_size: int, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Random tokens (1, sequence_length) in documents of about `document_length`, with labels; for ours, positions."""
    sequence_length, document_length = args.sequence_length, args.document_length
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < sequence_length:
        spread = document_length // 5
        length = document_length + int(torch.randint(-spread, spread + 1, (), generator=generator))
        lengths.append(min(length, sequence_length - sum(lengths)))
    tokens = torch.randint(3, vocab_size, (1, sequence_length), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    labels = tokens.masked_fill(positions == 0, -100)
    batch = {"input_ids": tokens, "labels": labels}
    return batch | {"position_ids": positions} if side == "ours" else batch


def build(side: str, preset: str, dtype: str = "bfloat16", **changes: int) -> Any:
    """The model of `side`, "ours" or "transformers", in training mode; ``changes`` are fields of its recipe."""
    from doge.model.configuration import ModelRecipe

    config = ModelRecipe(preset, **changes).build()
    torch.manual_seed(0)
    if side == "ours":
        from doge.model.modeling import build_model

        model = build_model(config)
    else:
        from transformers import DogeForCausalLM

        config._attn_implementation = "sdpa"
        model = DogeForCausalLM(config)
    return model.to(getattr(torch, dtype)).train()


def train_step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward, loss and backward."""
    started = time.perf_counter()
    model(**batch, use_cache=False).loss.backward()
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return seconds


def resident_bytes(field: str = "VmRSS") -> int:
    """The resident set of this process now, or its peak ("VmHWM"; ru_maxrss would be the parent's if that is more)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} is missing from /proc/self/status: memory can be measured on Linux only.")


def measure_memory(side: str, args: argparse.Namespace) -> int:
    """Growth of this process's peak resident set over one step, in bytes."""
    model = build(side, args.presets[0], args.dtype)
    batch = make_batch(side, model.config.vocab_size, args)
    before = resident_bytes()
    train_step(model, batch)
    return resident_bytes("VmHWM") - before


def matmul_flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of this machine's best plain product."""
    a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(seconds)


def compare(preset: str, args: argparse.Namespace) -> dict[str, float]:
    """Ratios of speed and memory of one preset, after a table of both sides."""
    from doge.model.configuration import ModelRecipe, flops_per_token

    sides = ("ours", "transformers")
    growth = {}
    for side in sides:
        command = [sys.executable, __file__, *sys.argv[1:], "--presets", preset, "--memory-of", side]
        growth[side] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])

    models = {side: build(side, preset, args.dtype) for side in sides}
    models["transformers"].load_state_dict(models["ours"].state_dict())
    if not args.no_compile:
        from doge.model.compilation import compile_layers

        compile_layers(models["ours"])
    batches = {side: make_batch(side, model.config.vocab_size, args) for side, model in models.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for round_number in range(-2, args.rounds):
        for side in sides:
            elapsed = train_step(models[side], batches[side])
            if round_number >= 0:  # the rounds before that warm up
                seconds[side].append(elapsed)

    speed = {side: args.sequence_length / statistics.median(seconds[side]) for side in sides}
    print(f"{preset}, 1 x {args.sequence_length}, {args.dtype}, CPU, {torch.get_num_threads()} threads")
    possible = matmul_flops(getattr(torch, args.dtype)) / flops_per_token(
        ModelRecipe(preset).build(), min(args.document_length, args.sequence_length)
    )
    print(f"{'':14}{'tokens/s':>10}{'of possible':>14}{'peak growth, MB':>18}")
    for side in sides:
        share = speed[side] / possible
        print(f"{side:14}{speed[side]:>10.0f}{share:>14.0%}{growth[side] / 1e6:>18.0f}", flush=True)
    print(f"{'possible':14}{possible:>10.0f}{'':14}  by the best plain product of this machine")
    size = preset.rpartition("-")[2].lower()
    return {
        f"ratio_{size}": round(speed["ours"] / speed["transformers"], 3),
        f"memory_ratio_{size}": round(growth["ours"] / growth["transformers"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = ["Doge-20M", "Doge-60M"]
    parser.add_argument("--presets", nargs="+", default=presets, help="dense ones (default: %(default)s)")
    dtypes = ["auto", "bfloat16", "float32"]
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 if the CPU computes it itself")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--document-length", type=int, default=500, help="tokens, about (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--memory-of", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dtype == "auto":
        args.dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    if args.memory_of:
        print(measure_memory(args.memory_of, args))
        return
    result: dict[str, float] = {}
    for preset in args.presets:
        result |= compare(preset, args)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
