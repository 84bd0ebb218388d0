"""All that is known here of DeepSpeed's insides: its configuration, and what it does not let go of by itself.

Checked with DeepSpeed 0.19; `doge.training.state.train_state` reads and writes its partitions.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def deepspeed_config(zero_stage: int, dtype: torch.dtype, max_grad_norm: float, num_parameters: int) -> dict[str, Any]:
    """The configuration of an engine whose caller owns the step boundary.

    Args:
        max_grad_norm: global norm that gradients are clipped to; not under ZeRO 0, where DeepSpeed tells no norm.
        num_parameters: bounds the buffer that gradients are reduced in.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the caller owns the step boundary: ranks bring what they have
        "gradient_clipping": max_grad_norm if zero_stage else 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            # allocated whole: 2 GB by default, at any model size
            "reduce_bucket_size": min(num_parameters, 500_000_000),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }


def discard_gradients(engine: "DeepSpeedEngine") -> None:
    """Make the step as if none of its micro-batches had run; only for ZeRO 0 and 1.

    Their backward passes leave ``grad`` of the parameters and, in bf16, the fp32 sums of ``BF16_Optimizer``; one that
    broke off also leaves DeepSpeed's hooks believing that they are within it.
    """
    optimizer = engine.optimizer
    optimizer.zero_grad()
    while getattr(optimizer, "_backward_active_depth", 0):
        optimizer.exit_backward()
    engine._unmanaged_backward_count = 0


def free(engine: "DeepSpeedEngine") -> None:
    """Take all tensors out of an engine and its model, within its group or after leaving it.

    Only to drop it is not enough under ZeRO 1 to 3: DeepSpeed's hooks refer to the model and to the engine from where
    the garbage collector does not see them.
    """
    parameters, optimizer = list(engine.module.parameters()), engine.optimizer
    with suppress(AssertionError, ValueError):  # outside the group it fails to print that the hooks are removed
        engine.destroy()
    for parameter in parameters:
        parameter.grad = None
        parameter.data = torch.empty(0)
        vars(parameter).clear()
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.state.clear()
    inner.param_groups.clear()
    vars(optimizer).clear()


def forget_engines() -> None:
    """Let ZeRO 3 number modules and parameters from 0, as in the processes of this group that have had no engine yet.

    It compares the numbers between ranks. It would also keep a model for ever as the one whose forward is under way.
    """
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    partition_parameters.Init.param_id = 0
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    parameter_offload.FWD_MODULE_STACK.clear()


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed for this device, without the shared-memory extension that it would compile for a minute on CPUs."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with _hidden("mlflow"):  # its autotuner, which is not used here, would import it for a second
        import deepspeed
        import deepspeed.ops
        from deepspeed.runtime import compiler

    # For its own Muon alone, which is not used here: an engine would import torch's compiler for two seconds.
    compiler.compile = lambda: compiler.dummy_decorator
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)  # it prints its whole configuration at INFO
    log.addFilter(_is_news)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()  # Muon is tested here


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let an optional package that is not imported yet be absent for what is imported in the block."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # as Python's import system documents it
    try:
        yield
    finally:
        del sys.modules[package]
