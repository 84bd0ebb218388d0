"""What the Triton attention kernels take of a GPU with given block sizes, found by compiling them, without a GPU.

    python benchmarks/gpu_blocks.py                                     # the sizes that are chosen, on every card
    python benchmarks/gpu_blocks.py --search --cards 90 --kernels differentiate_key

With `--search`, the best candidates of (queries, keys, num_warps, num_stages) are listed that the card's shared memory
holds: least spilled, then most reuse (how often a token is used that is loaded in the loop), then most warps at once.
Without it, the sizes of `choose_blocks` are listed.

A row is a kernel, and what keys end by in it: nothing, documents or expiry. It tells the shared memory of a block of
threads, the registers of a thread and the bytes that it spills, and an estimate of how many of a multiprocessor's warps
run at once. On a real GPU the time decides: where PyTorch finds one of the architecture, each row is timed too, in
milliseconds, and `--search` sorts by time. The last line is one JSON object.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # its kernels are no code that could be compiled
if importlib.util.find_spec("triton") is None:
    sys.exit("benchmarks/gpu_blocks.py compiles with Triton, which is not installed here: pip install triton==3.7.1.")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from doge.model.attention.triton_blocks import Blocks, Card, KernelBlocks, choose_blocks
from doge.model.attention.triton_launches import launch_kernel, run_backward, run_forward

# By architecture: shared memory of a block of threads, shared memory and warps of a multiprocessor (CUDA's programming
# guide, "Technical Specifications per Compute Capability").
LIMITS = {80: (163 << 10, 164 << 10, 64), 86: (99 << 10, 100 << 10, 48), 89: (99 << 10, 100 << 10, 48)}
LIMITS |= {90: (227 << 10, 228 << 10, 64)}
REGISTERS = 65536  # of a multiprocessor
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPE_NAMES = {torch.int32: "i32", torch.int64: "i64"} | {dtype: name for name, dtype in DTYPES.items()}
KINDS = ("nothing", "documents", "expiry")
TUNED = {"attend": "attend", "differentiate_query": "query", "differentiate_key": "key"}  # kernels and their blocks


class Launch(NamedTuple):
    """A kernel's launch: its arguments by name, and the options of its compilation."""

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]
    options: dict[str, int]


def make_inputs(args: argparse.Namespace, kind: str, device: str) -> dict[str, Any]:
    """Query, key, value, bias, expiry and document ends, as the model lays them out."""
    tokens = (args.batch, args.sequence_length)
    states = [
        torch.randn(*tokens, heads, args.head_dim, device=device).to(DTYPES[args.dtype]).transpose(1, 2)
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    ]
    bias = torch.randn(*tokens, args.kv_heads, device=device).transpose(1, 2)
    ends = torch.arange(args.sequence_length, device=device) // args.document_length * args.document_length
    ends = (ends + args.document_length).clamp(max=args.sequence_length)
    expiry = ends.int().expand(bias.shape).contiguous() if kind == "expiry" else None
    document_ends = ends.expand(tokens) if kind == "documents" else None
    inputs = dict(zip(("query", "key", "value"), states, strict=True))
    return inputs | {"bias": bias, "expiry": expiry, "document_ends": document_ends}


def launches(inputs: dict[str, Any], blocks: KernelBlocks) -> dict[str, Launch]:
    """What a forward and a backward pass launch, by kernel; nothing runs unless the inputs are on a GPU."""
    found = {}

    def launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **options: Any) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        named |= {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
        found[kernel.__name__] = Launch(kernel, grid, named, options)
        if inputs["query"].is_cuda:
            launch_kernel(kernel, grid, **named, **options)

    output, log_sum = run_forward(**inputs, blocks=blocks, launch=launch)
    run_backward(output, output, log_sum, **inputs, blocks=blocks, launch=launch)
    return found


def compile_for(launch: Launch, architecture: int) -> tuple[int, int, int]:
    """Compile a kernel as its launch would: shared memory (bytes), registers of a thread, bytes that it spills."""
    constexprs: dict[tuple[int, ...], Any] = {}
    signature, attributes = {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constexprs[place,] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs, attributes)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # where Triton prints what `ptxas -v` says
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    spilled = re.findall(r"(\d+) bytes spill stores", log.getvalue())
    if not (registers and spilled):
        raise RuntimeError(f"ptxas says nothing of registers and spills: {log.getvalue()}")
    return binary.metadata.shared, max(map(int, registers)), max(map(int, spilled))


def occupancy(architecture: int, shared: int, registers: int, num_warps: int) -> float:
    """The part of a multiprocessor's warps that run at once, by registers and shared memory; an estimate."""
    _, memory, most_warps = LIMITS[architecture]
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * num_warps)
    by_memory = memory // (shared + 1024)  # of which the system keeps one KiB for each block of threads
    return min(by_registers, by_memory, most_warps // num_warps) * num_warps / most_warps


def candidates(kernel: str, head_dim: int) -> Iterator[Blocks]:
    """Blocks that stay in registers, and smaller or equal ones that a loop goes over."""
    largest = 128 if head_dim <= 128 else 64
    for held, looped in itertools.product((largest, largest // 2), (largest, largest // 2, largest // 4)):
        if looped <= held:
            rows = (looped, held) if kernel == "differentiate_key" else (held, looped)
            yield from (Blocks(*rows, *others) for others in itertools.product((4, 8), (1, 2, 3, 4)))


def rows_of(args: argparse.Namespace, architecture: int) -> Iterator[dict[str, Any]]:
    """A row for each kernel, what keys end by, and candidate."""
    card = Card(architecture, LIMITS[architecture][0])
    chosen = choose_blocks(card, DTYPES[args.dtype], args.head_dim)
    here = torch.cuda.is_available() and torch.cuda.get_device_capability() == divmod(architecture, 10)
    device = "cuda" if here else "cpu"
    for kind in args.ends:
        inputs = make_inputs(args, kind, device)
        if not args.search:
            found = launches(inputs, chosen)
            yield from (row(found[kernel], kind, card, device) for kernel in args.kernels if kernel in found)
            continue
        for kernel in (each for each in args.kernels if each in TUNED):
            tried = []
            for blocks in candidates(kernel, args.head_dim):
                with contextlib.suppress(triton.runtime.errors.OutOfResources):  # of a GPU that is here
                    launch = launches(inputs, chosen._replace(**{TUNED[kernel]: blocks}))[kernel]
                    tried.append(row(launch, kind, card, device))
            tried = [each for each in tried if each["shared_memory"] <= card.shared_memory]
            yield from sorted(tried, key=quality)[: args.top]


def row(launch: Launch, kind: str, card: Card, device: str) -> dict[str, Any]:
    shared, registers, spilled = compile_for(launch, card.architecture)
    name, num_warps = launch.kernel.__name__, launch.options.get("num_warps", 4)
    found = {
        "card": f"sm_{card.architecture}",
        "kernel": name,
        "ends": kind,
        "head_dim": launch.arguments.get("HEAD_DIM"),
        "blocks": [launch.arguments.get("QUERIES"), launch.arguments.get("KEYS")],
        "num_warps": num_warps,
        "num_stages": launch.options.get("num_stages", 3),
        "shared_memory": shared,
        "shared_memory_limit": card.shared_memory,
        "registers": registers,
        "spilled_bytes": spilled,
        "occupancy": round(occupancy(card.architecture, shared, registers, num_warps), 3),
    }
    if device == "cuda":
        run = launch.kernel[launch.grid]
        found["milliseconds"] = round(do_bench(lambda: run(**launch.arguments, **launch.options)), 4)
    return found


def quality(found: dict[str, Any]) -> tuple[float, ...]:
    """The sort key of candidates: time where it is known, else spills, reuse and occupancy."""
    reuse = found["blocks"][1 if found["kernel"] == "differentiate_key" else 0]
    return found.get("milliseconds", 0.0), found["spilled_bytes"], -reuse, -found["occupancy"]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, by default this process's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, nargs="+", default=[80, 89, 90], choices=LIMITS, metavar="N",
                        help=f"architectures, of {', '.join(map(str, LIMITS))} (default: 80 89 90)")  # fmt: skip
    every = ["fill_lists", "attend", "sum_output_products", "differentiate_query", "differentiate_key"]
    parser.add_argument("--kernels", nargs="+", default=every, choices=every, help="kernels (default: all)")
    parser.add_argument("--ends", nargs="+", default=list(KINDS), choices=KINDS, help="keys end by (default: each)")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the states (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a head (default: %(default)s)")
    parser.add_argument("--search", action="store_true", help="list candidates instead of the sizes that are chosen")
    parser.add_argument("--top", type=int, default=8, help="candidates listed of each kernel (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--document-length", type=int, default=500, help="tokens (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=4, help="key and value heads (default: %(default)s)")
    return parser.parse_args(arguments)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of all cards, one by one."""
    knobs = triton.knobs
    with contextlib.ExitStack() as stack:
        for each in (knobs.nvidia, knobs.compilation, knobs.cache):
            stack.enter_context(each.scope())
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        # of a kernel that was compiled before, nobody tells the registers
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        for architecture in args.cards:
            yield from rows_of(args, architecture)


def main() -> None:
    args = parse()
    print(
        f"{'card':6} {'kernel':20} {'ends by':10} {'queries x keys':>14} {'warps':>6} {'stages':>7} "
        f"{'shared, KiB':>12} {'registers':>10} {'spilled, B':>11} {'occupancy':>10} {'ms':>9}"
    )
    table = []
    for found in rows(args):
        table.append(found)
        queries, keys = (number or "-" for number in found["blocks"])
        print(
            f"{found['card']:6} {found['kernel']:20} {found['ends']:10} {f'{queries} x {keys}':>14} "
            f"{found['num_warps']:>6} {found['num_stages']:>7} {found['shared_memory'] / 1024:>12.1f} "
            f"{found['registers']:>10} {found['spilled_bytes']:>11} {found['occupancy']:>10.0%} "
            f"{found.get('milliseconds', '-'):>9}",
            flush=True,
        )
    print(json.dumps({"rows": table}))


if __name__ == "__main__":
    main()
