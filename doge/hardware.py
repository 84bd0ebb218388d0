"""What the device under a worker is and can do."""

import os
import resource

import torch

# Dense bf16 tensor-core peaks in TFLOP/s, by a part of the device's name; from the vendors' data sheets.
_PEAK_TFLOPS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10G": 70.0,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71.0, "RTX A6000": 154.8,
}  # fmt: skip


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def peak_tflops(device: torch.device) -> float | None:
    """Peak of dense bf16 matrix products, None where it is not known."""
    if device.type != "cuda":
        return None
    name = device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def use_cores(processes_on_node: int) -> None:
    """Let this process compute on its share of the node's cores; Ray limits a worker to those it reserved."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_on_node))
