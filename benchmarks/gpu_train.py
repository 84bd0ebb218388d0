"""Training speed of all eight models on this machine's GPU, against stock transformers compiled.

    python benchmarks/gpu_train.py
    python benchmarks/gpu_train.py --presets Doge-20M --rounds 9 --micro-batch 16
    python benchmarks/gpu_train.py --device cpu --presets Doge-20M --sequence-length 128 --micro-batch 1 --rounds 1

Ours is the engine of the trainer, as it trains: bf16, AdamW, clipping, compiled layers, sequences packed of documents,
micro-batches as large as the probe finds. Stock is transformers' `DogeForCausalLM` (dense ones only) under
torch.compile with fused AdamW on the same tokens without boundaries, its micro-batch halved from ours until it fits.
The two take turns, a step each, and medians are compared. MFU counts 6 operations a parameter and token and the
attention within documents (as a run's own `mfu` does) over the peak of the GPU in bf16. Stock MoE
models route otherwise and are left out. The last line is one JSON object.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_step import make_batch

WARM_UP = 3  # steps of each side that compile and settle


class Ours:
    """One step of the engine."""

    def __init__(self, preset: str, device: torch.device, args: argparse.Namespace):
        from doge.model.configuration import ModelRecipe
        from doge.training.engine import Engine
        from doge.training.engine_recipe import EngineRecipe
        from doge.training.micro_batch import probe_micro_batch
        from doge.training.next_token import NextTokenPrediction
        from doge.training.objective import TensorBatch
        from doge.training.optimizer import OptimizerRecipe

        recipe = ModelRecipe(preset)
        self.engine = Engine(NextTokenPrediction(recipe), OptimizerRecipe(), EngineRecipe(), device)
        self.micro_batch = args.micro_batch or probe_micro_batch(self.engine, args.sequence_length, 256, 1)
        batch = make_batch("ours", recipe.build().vocab_size, args)
        self.batch = TensorBatch({key: value.repeat(self.micro_batch, 1) for key, value in batch.items()})

    def step(self) -> None:
        self.engine.step(self.batch, [self.micro_batch], 1.0)


class Stock:
    """One step of transformers' model."""

    def __init__(self, preset: str, device: torch.device, micro_batch: int, args: argparse.Namespace):
        from transformers import DogeForCausalLM

        from doge.model.configuration import ModelRecipe

        config = ModelRecipe(preset).build()
        config._attn_implementation = "sdpa"
        self.model = DogeForCausalLM(config).to(device)
        self.micro_batch = micro_batch
        batch = make_batch("transformers", config.vocab_size, args)
        self.batch = {key: value.repeat(micro_batch, 1).to(device) for key, value in batch.items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.forward = torch.compile(self.model)

    def step(self) -> None:
        with torch.autocast(self.model.device.type, torch.bfloat16):
            loss = self.forward(**self.batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()


def fitting_stock(preset: str, device: torch.device, micro_batch: int, args: argparse.Namespace) -> Stock | None:
    """Stock with the largest half, quarter, … of ours that fits; None, said, where none does or it does not run."""
    while micro_batch:
        try:
            stock = Stock(preset, device, micro_batch, args)
            stock.step()
            return stock
        except torch.OutOfMemoryError:
            stock, micro_batch = None, micro_batch // 2
            torch.cuda.empty_cache()
        except Exception as error:  # the other models can still be measured
            print(f"stock {preset} does not run: {' '.join(str(error).split())[:160]}", file=sys.stderr)
            return None
    print(f"stock {preset} does not fit", file=sys.stderr)
    return None


def warmed_up(side, device: torch.device, held: int = 0) -> float:
    """GiB at the peak of some steps, without what others ``held``."""
    from doge.common.hardware import peak_memory_bytes

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP):
        side.step()
    return (peak_memory_bytes(device) - held) / 2**30


def seconds_of(side, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    side.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(preset: str, device: torch.device, peak_tflops: float | None, args: argparse.Namespace) -> dict[str, float]:
    """The lines of a model in the table, printed, and their figures."""
    from doge.model.configuration import flops_per_token, num_parameters

    ours = Ours(preset, device, args)
    config = ours.engine.module.config
    sides: dict[str, Ours | Stock] = {"ours": ours}
    memory = {"ours": warmed_up(ours, device)}
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    stock = None if "MoE" in preset or args.no_stock else fitting_stock(preset, device, ours.micro_batch, args)
    if stock is not None:
        sides["stock"], memory["stock"] = stock, warmed_up(stock, device, held)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            seconds[name].append(seconds_of(side, device))
    per_token = flops_per_token(config, min(args.document_length, args.sequence_length))
    figures: dict[str, float] = {}
    short = preset.removeprefix("Doge-").replace("-", "_").lower()
    for name, side in sides.items():
        speed = side.micro_batch * args.sequence_length / statistics.median(seconds[name])
        mfu = speed * per_token / (peak_tflops * 1e12) if peak_tflops else math.nan
        print(
            f"{preset if name == 'ours' else '  stock':14}{num_parameters(config) / 1e6:8.0f}M{speed:12,.0f}{mfu:8.1%}"
            f"{memory[name]:8.1f}{side.micro_batch:8}",
            flush=True,
        )
        suffix = short if name == "ours" else f"stock_{short}"
        figures |= {f"tokens_per_s_{suffix}": speed, f"mfu_{suffix}": mfu, f"gib_{suffix}": memory[name]}
        figures[f"micro_batch_{suffix}"] = side.micro_batch
    if stock is not None:
        figures[f"ratio_{short}"] = figures[f"tokens_per_s_{short}"] / figures[f"tokens_per_s_stock_{short}"]
    ours.engine.close()
    return {key: round(value, 4) for key, value in figures.items() if not math.isnan(value)}


def main() -> None:
    from doge.model.configuration import preset_names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=preset_names(), help="default: all eight")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--document-length", type=int, default=500, help="tokens, about (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, help="sequences; by default what the probe finds")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side (default: %(default)s)")
    parser.add_argument("--no-stock", action="store_true", help="leave transformers out")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This machine has no GPU that PyTorch can use: --device cpu tries the script without one.")

    from doge.common.hardware import device_name, peak_tflops
    from doge.training import process_group

    process_group.be_alone(device)
    peak = peak_tflops(device)
    print(f"{device_name(device)}, peak {peak or math.nan:g} TFLOP/s in bf16, 1 x {args.sequence_length} a sequence")
    print(f"{'':14}{'params':>9}{'tokens/s':>12}{'MFU':>8}{'GiB':>8}{'micro':>8}")
    result: dict[str, float] = {}
    try:
        for preset in args.presets:
            result |= measure(preset, device, peak, args)
    finally:
        process_group.leave()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
