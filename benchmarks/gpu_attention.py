"""How fast the attention kernels are on this machine's GPU, against PyTorch's attention under the same mask.

    python benchmarks/gpu_attention.py --heads 8 --kv-heads 4

Both attend in bfloat16 to the same keys, each seen by the queries of its interval. PyTorch's
`scaled_dot_product_attention` is given what is faster for it: keys and values already repeated for every head, a mask
with the biases in it that was made beforehand, and no gradient of the bias; the kernels find the gradient of the bias
too. The two take turns, and the medians are compared: a ratio above 1 says how many times faster the kernels are.
The error is the largest of the relative errors of the output and of the gradients, against PyTorch's attention in
float32 over the first row. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from doge.model.attention import KeyWindow, key_expiry
from doge.model.attention.backends.triton_attention import supports, triton_attention


def make_inputs(args: argparse.Namespace) -> list[torch.Tensor]:
    """Query, key, value (batch, heads or kv_heads, seq, head_dim), bias and expiry (batch, kv_heads, seq)."""
    torch.manual_seed(0)
    tokens = (args.batch, args.sequence_length)
    states = [torch.randn(*tokens, n, args.head_dim, device="cuda") for n in (args.heads, args.kv_heads, args.kv_heads)]
    bias = torch.randn(*tokens, args.kv_heads, device="cuda").exp().transpose(1, 2)
    expiry = key_expiry(bias, KeyWindow(args.window)).int()
    return [*(x.bfloat16().transpose(1, 2).requires_grad_() for x in states), bias.requires_grad_(), expiry]


def repeat_and_mask(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Query, key and value with one kv head a head, and the mask (batch, heads, seq, seq) of biases."""
    query, key, value, bias, expiry = inputs
    seq, group = query.shape[2], query.shape[1] // key.shape[1]
    key, value, bias, expiry = (x.repeat_interleave(group, dim=1) for x in (key, value, bias, expiry))
    i, j = torch.arange(seq, device="cuda")[:, None], torch.arange(seq, device="cuda")
    mask = torch.where((j <= i) & (i < expiry[:, :, None]), bias[:, :, None], -torch.inf)
    return [query, key, value, mask.to(query.dtype)]


def masked_attention(query, key, value, mask) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def largest_error(inputs: list[torch.Tensor]) -> float:
    """The largest relative error of output, query, key, value and bias gradient, over the first row of the batch."""
    row = [x.detach()[:1] for x in inputs]
    row = [x.requires_grad_() if x.is_floating_point() else x for x in row]
    exact = [x.detach().float().requires_grad_() for x in row[:4]]
    results = []
    for output, leaves in (
        (triton_attention(*row), row[:4]),
        (masked_attention(*repeat_and_mask([*exact, row[4]])), exact),
    ):
        weights = torch.cos(torch.arange(output.numel(), device="cuda")).view_as(output)
        results.append((output, *torch.autograd.grad((output.float() * weights).sum(), leaves)))
    return max(float((ours.float() - true).norm() / true.norm()) for ours, true in zip(*results, strict=True))


def time_turn(attend, inputs: list[torch.Tensor], output_grad: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of one forward and of one backward pass."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    leaves = [x for x in inputs if x.requires_grad]
    events[0].record()
    output = attend(*inputs)
    events[1].record()
    torch.autograd.grad(output, leaves, output_grad)
    events[2].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="keys that a query keeps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=4, help="key and value heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a head (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="timed turns of each side (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_attention.py measures a GPU, and PyTorch finds none on this machine.")
    inputs = make_inputs(args)
    if not supports(inputs[0]):
        sys.exit(f"The attention kernels do not take head_dim {args.head_dim} in bfloat16 on this machine's GPU.")

    masked = [x.detach() for x in repeat_and_mask(inputs)]
    sides = {
        "kernels": (triton_attention, inputs),
        "masked SDPA": (masked_attention, [*(x.requires_grad_() for x in masked[:3]), masked[3]]),
    }
    output_grad = torch.randn_like(inputs[0].detach().transpose(1, 2))
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for round_number in range(-5, args.rounds):
        for side, (attend, tensors) in sides.items():
            elapsed = time_turn(attend, tensors, output_grad)
            if round_number >= 0:  # the rounds before that compile and warm up
                times[side].append(elapsed)

    medians = {
        side: [statistics.median(column) for column in zip(*turns, strict=True)] for side, turns in times.items()
    }
    shape = f"{args.batch} x {args.sequence_length}, {args.heads} / {args.kv_heads} heads of {args.head_dim}"
    print(f"{shape}, window {args.window}, bfloat16, {torch.cuda.get_device_name()}")
    print(f"{'':14}{'forward, ms':>14}{'backward, ms':>14}")
    for side, (forward, backward) in medians.items():
        print(f"{side:14}{forward:>14.3f}{backward:>14.3f}")
    result = {
        "forward_ratio": round(medians["masked SDPA"][0] / medians["kernels"][0], 3),
        "backward_ratio": round(medians["masked SDPA"][1] / medians["kernels"][1], 3),
        "max_error": round(largest_error(inputs), 5),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
