"""What a backend of dynamic mask attention provides, and which backend computes a call."""

import functools
import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from doge.model.attention.window import KeyWindow

_log = logging.getLogger(__name__)


class Backend(Protocol):
    """Computes dynamic mask attention; it has no state."""

    @property
    def name(self) -> str:
        """The backend's name in messages, by which no other is known."""

    @property
    def device_types(self) -> tuple[str, ...] | None:
        """The types of `torch.device` that the backend is made for; `None`: every type."""

    @property
    def priority(self) -> int:
        """The backend of highest priority among those that can compute a call is chosen."""

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: bool) -> str | None:
        """Why the backend cannot compute such calls, to follow "cannot run here:"; `None` if it can.

        Args:
            dtype: The dtype of query, key and value.
            dropout: Whether attention weights are dropped.
        """

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        window: KeyWindow,
        document_ends: torch.Tensor | None,
        order: torch.Tensor | None,
        dropout_p: float,
    ) -> torch.Tensor:
        """Compute `dynamic_mask_attention`, whose arguments these are, but for two.

        Args:
            query, key, value: All of one dtype.
            order: (batch or 1, 1, seq) int64; `None` with ``document_ends``.
        """


BACKENDS: dict[str, Backend] = {}
"""All backends by their names, those of highest priority first."""

BackendT = TypeVar("BackendT", bound=Callable[[], Backend])


def register(cls: BackendT) -> BackendT:
    """Class decorator that makes a backend known. The class takes no arguments."""
    backend = cls()
    BACKENDS[backend.name] = backend
    for name in sorted(BACKENDS, key=lambda name: -BACKENDS[name].priority):
        BACKENDS[name] = BACKENDS.pop(name)  # to the end
    return cls


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: bool) -> Backend:
    """The backend of highest priority that can compute such calls; see `Backend.unsupported_reason`.

    Logs once why a backend that is made for this type of device is passed over.
    """
    return BACKENDS[_name_of_best(device, dtype, head_dim, dropout)]


@torch.compiler.assume_constant_result  # a compiled layer asks once, and the question leaves nothing in its graph
def _name_of_best(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: bool) -> str:
    reasons: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        if backend.device_types is None or device.type in backend.device_types:
            reason = backend.unsupported_reason(device, dtype, head_dim, dropout)
            if reason is None:
                for passed_over in reasons.items():
                    _warn_once(*passed_over, name)
                return name
            reasons[name] = reason
    raise RuntimeError(f"No attention backend computes {dtype} on {device}: {reasons}.")


@functools.cache
def _warn_once(name: str, reason: str, chosen: str) -> None:
    _log.warning(
        "The attention backend %s cannot run here: %s. %s computes the same results, more slowly.", name, reason, chosen
    )
