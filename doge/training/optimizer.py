"""The optimizer: fused AdamW with weight decay on matrices only, and Muon, where chosen, for the hidden matrices."""

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch

from doge.common.errors import UserError
from doge.training.muon import MuonAdamW

# Muon orthogonalises a matrix; one of fewer rows or columns has nothing to gain by it.
_SMALLEST_SIDE = 16


@dataclass(frozen=True)
class OptimizerRecipe:
    lr: float = 8e-3
    """Peak learning rate, held through the stable phase."""
    embedding_lr: float | None = None
    """Peak learning rate of the embedding and of the output's weight. Default: lr."""
    vector_lr: float | None = None
    """Peak learning rate of vectors: norms, residual weights, biases and the dynamic mask's ``A``. Default: lr."""
    base_width: int | None = None
    """Width (hidden_size) that lr is meant for: where AdamW updates the matrices between embedding and output, their
    rate is lr * base_width / width, so that one lr serves models of all widths. The other rates need no such factor.
    Default: lr at every width."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the gradient's first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay of every matrix; norms, residual weights and the dynamic mask's ``A`` have none."""
    embedding_weight_decay: float | None = None
    """Weight decay of the embedding and of the output's weight. Default: weight_decay."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped."""
    hidden_matrices: Literal["adamw", "muon"] = "adamw"
    """What updates the linear layers between embedding and output. ``muon`` learns in fewer steps, and needs whole
    matrices on every worker."""
    muon_lr: float = 1e-2
    """Peak learning rate of the matrices that Muon updates."""
    muon_momentum: float = 0.95
    """Decay rate of their gradients' mean."""

    def __post_init__(self):
        rate, decay = "positive and finite", "finite and not negative"
        for name, fits, rule in (
            ("lr", 0 < self.lr < inf, rate),
            ("embedding_lr", self.embedding_lr is None or 0 < self.embedding_lr < inf, rate),
            ("vector_lr", self.vector_lr is None or 0 < self.vector_lr < inf, rate),
            ("base_width", self.base_width is None or self.base_width > 0, "at least 1"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "at least 0 and below 1"),
            ("eps", 0 < self.eps < inf, "positive and finite"),
            ("weight_decay", 0 <= self.weight_decay < inf, decay),
            (
                "embedding_weight_decay",
                self.embedding_weight_decay is None or 0 <= self.embedding_weight_decay < inf,
                decay,
            ),
            ("muon_lr", 0 < self.muon_lr < inf, rate),
            ("muon_momentum", 0 <= self.muon_momentum < 1, "at least 0 and below 1"),
            ("max_grad_norm", self.max_grad_norm > 0, "positive"),
        ):  # not-a-number fits nowhere
            if not fits:
                raise UserError(f"optimizer.{name} must be {rule}, not {getattr(self, name)}.")

    def describe(self) -> str:
        """For a reader."""
        rates = [f"{self.lr:g}"]
        if self.base_width is not None:
            rates.append(f"at width {self.base_width:,}")
        if self.embedding_lr is not None:
            rates.append(f"embedding {self.embedding_lr:g}")
        if self.vector_lr is not None:
            rates.append(f"vectors {self.vector_lr:g}")
        if self.hidden_matrices == "adamw":
            return f"AdamW, peak learning rate {', '.join(rates)}"
        return f"Muon for hidden matrices, peak learning rate {self.muon_lr:g}; AdamW for the rest, {', '.join(rates)}"

    def build(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of the trainable parameters, in groups of one learning rate and weight decay.

        ``initial_lr`` of each group is its peak learning rate.

        Raises:
            UserError: a model without an embedding has no width for base_width.
        """
        muon = hidden_matrices(model) if self.hidden_matrices == "muon" else []
        chosen = {id(parameter) for parameter in muon}
        embeddings, factor = _embeddings(model), self._width_factor(model)
        of_setting: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for parameter in model.parameters():
            if not parameter.requires_grad or id(parameter) in chosen:
                continue
            if parameter.ndim < 2:
                setting = (_first(self.vector_lr, self.lr), 0.0)
            elif id(parameter) in embeddings:
                setting = (_first(self.embedding_lr, self.lr), _first(self.embedding_weight_decay, self.weight_decay))
            else:
                setting = (self.lr * factor, self.weight_decay)
            of_setting.setdefault(setting, []).append(parameter)
        groups = [
            {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}
            for (lr, weight_decay), parameters in of_setting.items()
        ]
        adamw = torch.optim.AdamW(groups, betas=self.betas, eps=self.eps, fused=True)
        if not muon:
            return adamw
        matrices = {"params": muon, "weight_decay": self.weight_decay, "momentum": self.muon_momentum}
        return MuonAdamW(matrices | {"lr": self.muon_lr, "initial_lr": self.muon_lr}, adamw)

    def _width_factor(self, model: torch.nn.Module) -> float:
        if self.base_width is None:
            return 1.0
        if (embedding := _embedding(model, "input")) is None:
            raise UserError("optimizer.base_width needs a model with an embedding, whose width it is compared with.")
        width: int = embedding.weight.shape[1]
        return self.base_width / width


def hidden_matrices(model: torch.nn.Module) -> list[torch.Tensor]:
    """The trainable weights of a model's linear layers, without its output's and those that are nearly vectors."""
    outside = _embeddings(model)
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
        and module.weight.requires_grad
        and min(module.weight.shape) >= _SMALLEST_SIDE
        and id(module.weight) not in outside
    ]


def _embeddings(model: torch.nn.Module) -> set[int]:
    """The identities of the parameters of a model's embedding and output, which may be the same."""
    modules = [_embedding(model, side) for side in ("input", "output")]
    return {id(parameter) for module in modules if module is not None for parameter in module.parameters()}


def _embedding(model: torch.nn.Module, side: Literal["input", "output"]) -> Any:
    """The module that turns tokens into vectors, or vectors into logits, as transformers names it; None without one."""
    return getattr(model, f"get_{side}_embeddings", lambda: None)()


def _first(value: float | None, default: float) -> float:
    return default if value is None else value
