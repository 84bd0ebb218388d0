"""How fast Doge generates, against llama.cpp, transformers' own `generate` and the bandwidth of this machine's memory.

    python benchmarks/decode.py                  # one row: 128 tokens after 64
    python benchmarks/decode.py --what batch     # 32 rows of unequal prompts, beside transformers
    python benchmarks/decode.py --what long      # on to 64k tokens with a window of 2048
    python benchmarks/decode.py --what int8 --model ~/doge/runs/tiny/model   # what int8 costs a trained model

Greedy, no end token, as many threads for every side. The sides take turns on the same prompts and the medians are
compared: on a shared machine trust the ratios rather than the speeds. One row is timed as `one_row.py` says;
`--without-llama-cpp` leaves llama.cpp out of it. In fp32 transformers must give the same tokens as Doge. Random weights
of a trained model's spread; the last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import one_row
from decode_models import DTYPES, build

COLUMNS = {"ours": 10, "transformers": 14, "ratio": 8, "equal tokens": 14, "int8": 12}
HEADER = f"{'tokens/s':22}" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items())
BEHIND = 1e-2  # how much lower a chosen token's logit may be than the full forward's best: rounding decides in between


def prompts_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 32768, (length,), generator=generator).tolist() for length in lengths]


def generate_stock(model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    return found[:, longest:].tolist()


def timed(act) -> tuple[float, list[list[int]]]:
    began = time.perf_counter()
    result = act()
    return time.perf_counter() - began, result


def compare(preset: str, precision: str, lengths: list[int], new_tokens: int, rounds: int) -> dict[str, float]:
    """Medians of tokens per second of both sides, and of ours with int8 matrices."""
    from doge.generation import Decoder

    ours, theirs = build(preset, DTYPES[precision])
    prompts, decoder = prompts_of(lengths), Decoder(ours)
    small = Decoder(ours, int8=True)
    sides = {
        "ours": lambda: decoder.generate(prompts, new_tokens, eos_token_id=-1),
        "int8": lambda: small.generate(prompts, new_tokens, eos_token_id=-1),
        "transformers": lambda: generate_stock(theirs, prompts, new_tokens),
    }
    decoder.generate(prompts, 3, eos_token_id=-1)
    small.generate(prompts, 3, eos_token_id=-1)
    generate_stock(theirs, prompts, 3)
    found = {}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, act in sides.items():
            elapsed, found[side] = timed(act)
            seconds[side].append(elapsed)
    equal = sum(
        a == b
        for one, two in zip(found["ours"], found["transformers"], strict=True)
        for a, b in zip(one, two, strict=True)
    )
    if precision == "fp32" and equal < len(lengths) * new_tokens:
        raise SystemExit(f"Only {equal} of {len(lengths) * new_tokens} tokens of {preset} are transformers' in fp32.")
    speeds = {side: len(lengths) * new_tokens / statistics.median(each) for side, each in seconds.items()}
    return {**speeds, "ratio": speeds["ours"] / speeds["transformers"], "equal": equal / len(lengths) / new_tokens}


def measure_single(args: argparse.Namespace) -> dict[str, float]:
    return one_row.measure(args.presets, args.rounds, not args.without_llama_cpp)


def measure_int8(args: argparse.Namespace) -> dict[str, float]:
    """Loss of a trained model on text of the Python installation, with its matrices as they are and as int8."""
    import pydoc_data.topics

    from transformers import AutoTokenizer

    from doge.conversion.load import load_model
    from doge.generation.int8 import Int8

    if args.model is None:
        raise SystemExit("Name a trained model and its tokenizer: --model ~/doge/runs/tiny/model.")
    path = Path(args.model).expanduser()
    model, tokenizer = load_model(path).float(), AutoTokenizer.from_pretrained(path)
    text = "\n".join(pydoc_data.topics.topics.values())[:400_000]
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    tokens = tokens[: len(tokens) // 512 * 512].view(-1, 512)[:64]

    @torch.no_grad()
    def loss() -> float:
        return model(tokens, labels=tokens).loss.item()

    exact = loss()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                matrix = Int8.of(parameter)
                parameter.copy_(matrix.data * matrix.scale[:, None])
    rounded = loss()
    print(f"{tokens.numel():,} tokens of {path}: {exact:.4f} nats a token, with int8 matrices {rounded:.4f}")
    return {"loss": round(exact, 5), "loss_int8": round(rounded, 5)}


def measure_batch(args: argparse.Namespace) -> dict[str, float]:
    lengths = [16 + 7 * number % 113 for number in range(32)]
    print(HEADER)
    row = compare("Doge-20M", args.precision, lengths, 64, args.rounds)
    print(
        f"{f'32 rows, {args.precision}':22}{row['ours']:10,.1f}{row['transformers']:14,.1f}{row['ratio']:8.2f}"
        f"{row['equal']:14.1%}{row['int8']:12,.1f}"
    )
    return {"ratio_batch": round(row["ratio"], 2)}


def measure_long(args: argparse.Namespace) -> dict[str, float]:
    """Speed near 4k and near the end, memory meanwhile, and a check against the full forward."""
    import resource

    from doge.generation import Decoder

    ours, _ = build("Doge-20M", DTYPES[args.precision])
    decoder, prompts = Decoder(ours), prompts_of([64])
    span, marks, tokens = 512, [], []
    began = time.perf_counter()
    for number, found in enumerate(decoder.stream(prompts, args.length - 64), start=65):
        tokens.append(found.item())
        if number % span == 0:
            now = time.perf_counter()
            marks.append((number, span / (now - began), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
            began = now
            if number % (8 * span) == 0:
                print(f"{number:7,} tokens {marks[-1][1]:8.1f} tokens/s, peak {marks[-1][2]:,.0f} MB", flush=True)
    early = statistics.median(speed for number, speed, _ in marks if 3 * 1024 < number <= 5 * 1024)
    late = statistics.median(speed for number, speed, _ in marks if number > args.length - 2 * 1024)
    growth = marks[-1][2] - next(memory for number, _, memory in marks if number >= 4096)
    checked = min(args.check, args.length)
    with torch.no_grad():
        logits = ours(torch.tensor([prompts[0] + tokens[: checked - 64]]), use_cache=False).logits[0]
    found, logits = torch.tensor(tokens[: checked - 64]), logits[63:-1].float()
    agreed = (logits.argmax(-1) == found).float().mean().item()
    behind = (logits.max(-1).values - logits.gather(1, found[:, None])[:, 0]).max().item()
    print(f"{agreed:.2%} of the first {checked:,} tokens are the full forward's, others at most {behind:.1e} behind")
    if args.precision == "fp32" and behind > BEHIND:
        raise SystemExit(f"A token's logit is {behind:.1e} behind that of the full forward's, more than {BEHIND}.")
    return {"flatness": round(late / early, 3), "growth_mb": round(growth, 1), "agreed": round(agreed, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["single", "batch", "long", "int8"], default="single")
    parser.add_argument("--model", help="folder of a trained model, of int8")
    parser.add_argument("--without-llama-cpp", action="store_true", help="leave llama.cpp out of single")
    parser.add_argument("--presets", nargs="+", default=["Doge-20M", "Doge-160M"], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of each side (default: %(default)s)")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of batch and long (default: %(default)s)")
    parser.add_argument("--length", type=int, default=65536, help="tokens of long (default: %(default)s)")
    parser.add_argument(
        "--check", type=int, default=16384, help="of them against a full forward (default: %(default)s)"
    )
    args = parser.parse_args()
    measures = {"single": measure_single, "batch": measure_batch, "long": measure_long, "int8": measure_int8}
    print(json.dumps(measures[args.what](args)))


if __name__ == "__main__":
    main()
