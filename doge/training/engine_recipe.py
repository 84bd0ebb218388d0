"""What of an engine is chosen in a recipe."""

from dataclasses import dataclass
from typing import Literal

import torch

from doge.common.errors import UserError


@dataclass(frozen=True)
class EngineRecipe:
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed partitions over workers that do not hold the whole state: 0 nothing, 1 optimizer states, 2 also
    gradients, 3 also parameters."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the computation; ``auto`` is bf16 where the device supports it natively, else fp32. Master weights
    are always fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether torch.compile compiles the layers; ``auto`` on GPUs only. On a CPU it takes half a minute of every
    worker's first start; a cache on disk outlives restarts."""
    states: Literal["auto", "replicated", "partitioned"] = "auto"
    """Whether every worker holds the whole training state, so that no step is lost with one, or a part of it; ``auto``
    is the whole state, unless a worker finds that not even one unit fits beside it."""

    def describe_states(self) -> str:
        """Where the training state is, for a reader."""
        if self.states == "partitioned":
            return f"states partitioned over the workers (ZeRO-{self.zero_stage})"
        return "states whole on every worker" + " that can hold them" * (self.states == "auto")

    def check(self) -> None:
        if self.zero_stage == 0 and self.precision == "bf16":
            raise UserError(
                "engine.zero_stage = 0 keeps no fp32 master weights in bf16: "
                "use --engine.zero-stage 1, or --engine.precision fp32."
            )

    def dtype(self, device: torch.device) -> torch.dtype:
        if self.precision == "auto":
            native = self.zero_stage > 0 and _computes_bf16(device)
            return torch.bfloat16 if native else torch.float32
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()
