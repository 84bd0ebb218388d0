"""How fast Doge generates, against transformers' own `generate` and the bandwidth of this machine's memory.

    python benchmarks/decode.py                  # one row: 128 tokens after 64
    python benchmarks/decode.py --what batch     # 32 rows of unequal prompts
    python benchmarks/decode.py --what long      # on to 64k tokens with a window of 2048
    python benchmarks/decode.py --what int8 --model ~/doge/runs/tiny/model   # what int8 costs a trained model

Greedy, no end token. Both sides take turns on the same prompts and the medians are compared: on a shared machine trust
the ratios rather than the speeds. The least that a token costs is to read every weight once; `bandwidth_share` is how
near the decoder comes to it, the bandwidth being what a sum over 1 GB reads per second in the same run. In fp32 both
must give the same tokens. Random weights of a trained model's spread; the last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COLUMNS = {"ours": 10, "transformers": 14, "ratio": 8, "equal tokens": 14, "of bandwidth": 14, "int8": 12}
HEADER = f"{'tokens/s':22}" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items())
BEHIND = 1e-2  # how much lower a chosen token's logit may be than the full forward's best: rounding decides in between
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(preset: str, dtype: torch.dtype):
    """The same weights as our model and as transformers' (`attn_implementation="sdpa"`)."""
    from transformers import DogeForCausalLM

    from doge.model.configuration import ModelRecipe
    from doge.model.modeling import build_model

    torch.manual_seed(0)
    ours = build_model(ModelRecipe(preset).build())
    with torch.no_grad():  # a new model would repeat one token for ever, and all keys would have one bias
        for name, parameter in ours.named_parameters():
            if name.endswith(".A") or "dt_proj" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.ndim == 2:
                parameter.mul_(3)
    config = ModelRecipe(preset).build()
    config._attn_implementation = "sdpa"
    theirs = DogeForCausalLM(config)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


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


def read_bandwidth() -> float:
    """Bytes per second of a sum over 1 GB."""
    data = torch.ones(2**28)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - began)
    return data.numel() * 4 / min(seconds)


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
    bytes_ = sum(parameter.numel() * parameter.element_size() for parameter in ours.parameters())
    return {
        **speeds, "ratio": speeds["ours"] / speeds["transformers"], "bytes": bytes_,
        "equal": equal / len(lengths) / new_tokens,
    }  # fmt: skip


def show(label: str, row: dict[str, float], bandwidth: float | None = None) -> None:
    share = f"{row['ours'] * row['bytes'] / bandwidth:.0%}" if bandwidth else ""
    print(
        f"{label:22}{row['ours']:10,.1f}{row['transformers']:14,.1f}{row['ratio']:8.2f}{row['equal']:14.1%}{share:>14}"
        f"{row['int8']:12,.1f}",
        flush=True,
    )


def measure_single(args: argparse.Namespace) -> dict[str, float]:
    result, bandwidths = {}, [read_bandwidth()]
    print(HEADER)
    for preset in args.presets:
        for precision in DTYPES:
            row = compare(preset, precision, [64], 128, args.rounds)
            bandwidths += [read_bandwidth()]
            show(f"{preset} {precision}", row, bandwidths[-1])
            size = preset.rpartition("-")[2].lower()
            result[f"ratio_{size}_{precision}"] = round(row["ratio"], 2)
            if (size, precision) == ("160m", "fp32"):
                read = row["ours"] * row["bytes"]
    bandwidth = statistics.median(bandwidths)
    if "ratio_160m_fp32" in result:
        result["bandwidth_share"] = round(read / bandwidth, 3)
    print(f"This machine reads {bandwidth / 1e9:.1f} GB/s (median), {torch.get_num_threads()} threads.")
    return result


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
    show(f"32 rows, {args.precision}", row)
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
