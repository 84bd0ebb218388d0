"""Matrices as int8 with a scale per row."""

from typing import NamedTuple

import torch


class Int8(NamedTuple):
    """A matrix, `data * scale[:, None]`.

    Args:
        data: (rows, columns) int8, from -127 to 127.
        scale: (rows,) float32.
    """

    data: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor) -> "Int8":
        """Quantize a matrix: the largest magnitude of each row becomes 127."""
        wide = weight.detach().float()
        scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return Int8((wide / scale[:, None]).round().to(torch.int8), scale)
