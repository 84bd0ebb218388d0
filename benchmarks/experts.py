"""What retrieved experts cost: one training step of a Doge-MoE against the dense Doge that it grows from, on the CPU.

    python benchmarks/experts.py --dense Doge-20M --moe Doge-MoE-20M

Both run forward, loss and backward over one sequence packed of documents, on the same tokens. The two take turns, and
the medians are compared: on a shared machine trust the ratios rather than the speeds. Memory is measured in a fresh
process each, as in `train_step.py`. The last line is one JSON object: how much longer the MoE model's step takes, and
how much higher its peak rises.
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import torch
from train_step import build, make_batch, resident_bytes, train_step


def build_side(side: str, args: argparse.Namespace) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model of `side`, "dense" or "moe", in training mode, and the batch."""
    model = build("ours", getattr(args, side)).to(getattr(torch, args.dtype))
    return model, make_batch("ours", model.config.vocab_size, args)


def measure_memory(side: str, args: argparse.Namespace) -> int:
    """Growth of this process's peak resident set over one step, in bytes."""
    model, batch = build_side(side, args)
    before = resident_bytes()
    train_step(model, batch)
    return resident_bytes("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default="Doge-20M", help="dense preset (default: %(default)s)")
    parser.add_argument("--moe", default="Doge-MoE-20M", help="the MoE preset (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="(default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--document-length", type=int, default=500, help="tokens, about (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="both with torch.compile")
    parser.add_argument("--memory-of", choices=["dense", "moe"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(measure_memory(args.memory_of, args))
        return

    sides = ("dense", "moe")
    growth = {}
    for side in sides:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", side]
        growth[side] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])

    built = {side: build_side(side, args) for side in sides}
    if args.compile:
        from doge.model.compilation import compile_layers

        for model, _ in built.values():
            compile_layers(model)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for round_number in range(-2, args.rounds):
        for side in sides:
            elapsed = train_step(*built[side])
            if round_number >= 0:  # the rounds before that warm up
                seconds[side].append(elapsed)

    step = {side: statistics.median(seconds[side]) for side in sides}
    print(f"1 x {args.sequence_length}, {args.dtype}, CPU, {torch.get_num_threads()} threads")
    print(f"{'':16}{'ms a step':>10}{'tokens/s':>10}{'peak growth, MB':>18}")
    for side in sides:
        speed = args.sequence_length / step[side]
        print(f"{getattr(args, side):16}{step[side] * 1e3:>10.0f}{speed:>10.0f}{growth[side] / 1e6:>18.0f}")
    result = {
        "moe_cost": round(step["moe"] / step["dense"], 3),
        "memory": round(growth["moe"] / growth["dense"], 3),
        "tokens_per_s_dense": round(args.sequence_length / step["dense"], 1),
        "tokens_per_s_moe": round(args.sequence_length / step["moe"], 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
