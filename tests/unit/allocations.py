"""Watches which tensors a piece of code allocates."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """While active, records shape and dtype of every result of every operator, those of the backward pass included."""

    def __init__(self):
        super().__init__()
        self.results: set[tuple[tuple[int, ...], torch.dtype]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.results.add((tuple(leaf.shape), leaf.dtype))
        return result
