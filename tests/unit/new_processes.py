"""Processes for what belongs to a process: a process group, and DeepSpeed's state.

They are forked off one that has imported PyTorch and the model, which takes five seconds, and done nothing.
"""

import multiprocessing
from collections.abc import Callable

import torch.multiprocessing

NEW = multiprocessing.get_context("forkserver")
NEW.set_forkserver_preload(["doge.training.next_token", "doge.training.engine"])


def run_in_new_processes(function: Callable[..., None], arguments: tuple, number: int) -> None:
    """Call a function with (rank, *arguments) in each of some processes, and raise what any of them raises."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=number, start_method="forkserver")
