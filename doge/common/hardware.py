"""The device of a process: name, peak speed, memory and energy."""

import functools
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from doge.common.words import count

# Dense bf16 tensor-core peaks in TFLOP/s by the device's whole name, from the vendors' data sheets. Variants differ (an
# H100 on PCIe has three quarters of the speed), and the name of a part of a device (MIG) has something after it.
_PEAK_TFLOPS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA H200": 989.0, "NVIDIA H200 NVL": 835.5, "NVIDIA GH200 480GB": 989.0, "NVIDIA GH200 144G HBM3e": 989.0,
    "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 NVL": 835.5, "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0, "NVIDIA A40": 149.7, "NVIDIA A30": 165.0, "NVIDIA A10": 125.0, "NVIDIA A10G": 70.0,
    "NVIDIA L40S": 362.0, "NVIDIA L40": 181.0, "NVIDIA L4": 121.0,
    "NVIDIA RTX 6000 Ada Generation": 364.2, "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 5090": 209.5, "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA GeForce RTX 4080": 97.5,
    "NVIDIA GeForce RTX 3090": 71.0,
}  # fmt: skip
_POWERCAP = Path("/sys/class/powercap")


def device_name(device: torch.device) -> str:
    """A GPU's own name; for the CPU, ``CPU (2 threads)``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name(torch.get_num_threads())


def cpu_name(threads: int) -> str:
    """The device name of a CPU process with so many threads."""
    return f"CPU ({count(threads, 'thread')})"


def device_trouble(device: torch.device) -> str:
    """What a device that computed before says to the simplest sum; empty if it is well.

    An error of CUDA is sticky: after an illegal access every later call of the process fails with it.
    """
    try:
        works = torch.ones(2, device=device).sum().item() == 2
    except RuntimeError as error:
        return " ".join(str(error).split())[:160]
    return "" if works else "it cannot add two numbers"


def peak_tflops(device: torch.device) -> float | None:
    """Peak TFLOP/s of dense bf16 matrix products; None if the device's name is not a known one."""
    if device.type != "cuda":
        return None
    return _PEAK_TFLOPS.get(device_name(device))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far in bytes: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def use_cores(processes_on_node: int) -> None:
    """Use as many threads as this process's share of the cores that it may run on."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes_on_node))


def energy_joules(device: torch.device) -> float | None:
    """Energy in joules that the device has used since an unknown moment; only differences are meaningful.

    A GPU's counter is its own, from NVML; a CPU's counts all of the machine's processors and their memory, from RAPL.
    None if it cannot be read: without NVML, on an older GPU or a part of one (MIG), or if only root may read RAPL.
    """
    counter = _energy_counter(device)
    return counter() if counter else None


@functools.cache
def _energy_counter(device: torch.device) -> Callable[[], float | None] | None:
    if device.type == "cuda":
        return _nvml_counter(device)
    return _rapl_counter() if device.type == "cpu" else None


def _nvml_counter(device: torch.device) -> Callable[[], float | None] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        # NVML numbers the machine's GPUs, torch those of CUDA_VISIBLE_DEVICES, perhaps in another order.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # a missing package, driver, permission or counter each raises an error of its own
        return None

    def read() -> float | None:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except pynvml.NVMLError:
            return None

    return read


def _rapl_counter() -> Callable[[], float | None] | None:
    """The sum of the counters of processor packages and memory; wrap-arounds of a counter are added back."""
    zones = []
    for folder in sorted(_POWERCAP.glob("intel-rapl:*")):
        with suppress(OSError, ValueError):
            name = (folder / "name").read_text().strip()
            if name.startswith("package") or name == "dram":  # core and uncore are parts of a package
                last = int((folder / "energy_uj").read_text())
                zones.append((folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()), [last, 0]))
    if not zones:
        return None

    def read() -> float | None:
        try:
            for path, end, state in zones:
                now = int(path.read_text())
                state[1] += now - state[0] if now >= state[0] else now + end - state[0]
                state[0] = now
        except (OSError, ValueError):
            return None
        return sum(state[1] for _, _, state in zones) / 1e6

    return read
