"""The recipe of a pretraining run: one tree whose parts lie beside the code that they configure."""

import os
import unicodedata
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from cluster.accounts.ledger import LedgerRecipe
from cluster.machines.scaling import ScalingRecipe
from data_pipelines.order.mixture import mixture_units
from data_pipelines.sources.source_recipe import DataRecipe
from doge.common.config_tree import flatten, from_dict, to_dict
from doge.common.errors import UserError
from doge.common.paths import is_relative, is_uri, plain_path
from doge.common.redaction import without_secrets
from doge.model.configuration import ModelRecipe, num_parameters
from doge.reporting.tracking import TrackingRecipe, database_path
from doge.tokenizer.training import TokenizerRecipe
from doge.training.engine_recipe import EngineRecipe
from doge.training.optimizer import OptimizerRecipe
from doge.training.schedule import SchedulerRecipe

_NAME_BYTES = 200  # file systems take 255, and some records of a run are named after it and more
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in a submitted job alone
_RAY_COPY = "/_ray_pkg_"


@dataclass(frozen=True)
class TrainingRecipe:
    max_steps: int = 8_000
    global_batch_size: int = 256
    """Sequences per step, whatever the number of workers."""
    micro_batch_size: int | None = None
    """Most sequences that a worker processes at once. Default: what fits in its GPU's memory, and 8 on a CPU. The
    result does not depend on it."""
    seed: int = 233
    """Seed of the initial weights."""
    eval_steps: int = 500
    """Steps between two evaluations of the held-out loss."""
    save_steps: int = 200
    """Steps between two checkpoints, at most."""
    save_seconds: float | None = 300.0
    """Seconds between two checkpoints, at most; a slow machine would risk hours otherwise. ``null``: no bound."""
    save_total_limit: int = 2
    """Number of newest checkpoints to keep."""
    logging_steps: int = 10
    """Steps between two lines of a job's log, and between two expert statistics."""
    record_samples: bool = False
    """Record where each sequence of every step comes from, in runs/NAME/samples."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do where a step gives no finite loss or gradient, twice: end the run, or leave its sequences out and
    record that."""
    on_spike: Literal["off", "stop", "skip"] = "off"
    """The same for a loss beyond spike_factor times the mean of the latest 50 steps."""
    spike_factor: float = 2.0
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for a third more computation."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of each label's logits, which keeps them small (PaLM: 1e-4). The training loss
    includes it, the held-out loss does not. 0: none."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps", "global_batch_size", "micro_batch_size", "eval_steps", "save_steps", "save_total_limit",
            "logging_steps",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"training.{name} must be at least 1, not {value}.")
        if not 0 <= self.z_loss < inf:
            raise UserError(f"training.z_loss must be finite and not negative, not {self.z_loss:g}.")
        if not self.spike_factor > 1:
            raise UserError(f"training.spike_factor must be above 1, not {self.spike_factor:g}: it bounds the loss.")
        if self.save_seconds is not None and not self.save_seconds > 0:
            raise UserError(f"training.save_seconds must be above 0, or null for no bound, not {self.save_seconds:g}.")


def _default_storage() -> str:
    return os.environ.get("DOGE_HOME", "~/doge")


@dataclass(frozen=True)
class Recipe:
    name: str = "Doge-20M"
    """Name of the run; running the same name again resumes it."""
    storage: str = field(default_factory=_default_storage)
    """Root of everything durable: a directory, or a URI such as s3://bucket/doge. DOGE_HOME sets the default."""
    cache_gib: float | None = None
    """Most GiB of each node's disk that copies of remote files may take; one that is evicted while a worker has it open
    goes when it is closed. Default: as much as they leave free."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    lr_scheduler: SchedulerRecipe = field(default_factory=SchedulerRecipe)
    engine: EngineRecipe = field(default_factory=EngineRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    scaling: ScalingRecipe = field(default_factory=ScalingRecipe)
    tracking: TrackingRecipe = field(default_factory=TrackingRecipe)
    ledger: LedgerRecipe = field(default_factory=LedgerRecipe)

    def check(self) -> None:
        """Raise UserError if the parts do not fit together; starts nothing and reads nothing."""
        config = self.model.build()
        if self.data.sequence_length > config.max_position_embeddings:
            raise UserError(
                f"data.sequence_length ({self.data.sequence_length}) is beyond the model's max_position_embeddings "
                f"({config.max_position_embeddings}): lower it, or set --model.max-position-embeddings."
            )
        if self.tokenizer.path is None and self.tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"tokenizer.vocab_size ({self.tokenizer.vocab_size}) does not fit the model's vocab_size "
                f"({config.vocab_size}): lower it, or set --model.vocab-size."
            )
        mixture_units({name: source.weight for name, source in self.data.sources.items()})
        self.engine.check()
        for key, does in (("on_nonfinite", self.training.on_nonfinite), ("on_spike", self.training.on_spike)):
            if does == "skip" and self.engine.states == "partitioned":
                raise UserError(
                    f"training.{key} = skip needs the whole state on every worker: do not set --engine.states "
                    "partitioned beside it."
                )
        if self.cache_gib is not None and not self.cache_gib > 0:
            raise UserError(
                f"cache_gib must be above 0, or null for as much as it leaves free, not {self.cache_gib:g}."
            )
        self.lr_scheduler.check(self.training.max_steps)
        self.check_workers(self.scaling.min_workers)
        check_name(self.name)
        if not self.storage.strip():
            raise UserError("storage is empty: give a directory, or a URI such as s3://bucket/doge.")
        check_lasting("storage", self.storage)
        self.tracking.check()
        if (database := database_path(self.tracking.given_uri or "")) is not None:
            check_lasting("tracking.uri", database)

    def check_workers(self, num_workers: int) -> None:
        """Raise UserError if a step has fewer sequences than there are workers."""
        if self.training.global_batch_size < num_workers:
            raise UserError(
                f"training.global_batch_size ({self.training.global_batch_size}) is smaller than the number of "
                f"workers ({num_workers}): raise it, or lower --scaling.num-workers."
            )

    @property
    def cache_bytes(self) -> int | None:
        """The bound of the cache on each node, as `Storage` takes it."""
        return None if self.cache_gib is None else int(self.cache_gib * 2**30)

    @property
    def training_sequences(self) -> int:
        """Sequences that the whole run trains on."""
        return self.training.max_steps * self.training.global_batch_size

    def plan(self) -> list[tuple[str, str]]:
        """The run's plan as ``(label, text)`` lines for a reader."""
        config, training = self.model.build(), self.training
        total, active = num_parameters(config), num_parameters(config, active=True)
        parameters = f"{total / 1e6:,.1f}M parameters"
        if active != total:
            parameters += f" ({active / 1e6:,.1f}M active a token)"
        tokens = self.training_sequences * self.data.sequence_length
        batch = f"{training.global_batch_size:,} sequences × {self.data.sequence_length:,}"
        states = total * (2 + 4 + 12) / 2**30  # bf16 weights, fp32 gradients, master weights and two moments
        layers = f"{config.num_hidden_layers} layers of {config.hidden_size}"
        return [
            ("model", f"{self.model.preset}, {parameters}, {layers}, vocabulary {config.vocab_size:,}"),
            ("data", ", ".join(f"{name} {source.weight:g}" for name, source in self.data.sources.items())),
            ("steps", f"{training.max_steps:,} × {batch} = {tokens / 1e6:,.1f}M tokens"),
            ("optimizer", self.optimizer.describe()),
            ("schedule", self.lr_scheduler.describe()),
            ("engine", f"DeepSpeed, {self.engine.describe_states()}, precision {self.engine.precision}"),
            ("memory", f"{states:,.2f} GiB of model and optimizer states on one worker, besides activations"),
            ("run", f"{self.storage}/runs/{self.name}"),
        ]


def check_name(name: str) -> None:
    """Raise UserError if a run's name can be no directory's."""
    if name in ("", ".", "..") or "/" in name:
        raise UserError(f"name = {name!r} must be a plain name: it becomes a directory.")
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise UserError(f"name = {name!r} holds what cannot be printed: it becomes a directory and a title.")
    if (size := len(name.encode())) > _NAME_BYTES:
        raise UserError(f"name is {size} bytes long and becomes a directory: give one of at most {_NAME_BYTES}.")
    if name.endswith((".partial", ".shared")):
        raise UserError(f"name = {name!r} ends like a file that is being written: choose another ending.")


def check_lasting(key: str, place: str) -> None:
    """Raise UserError for a place in the copy of the working directory that Ray makes for a submitted job."""
    if _RAY_JOB in os.environ and (is_relative(place) or (not is_uri(place) and _RAY_COPY in plain_path(place))):
        raise UserError(
            f"{key} = {place} lies in the copy of the working directory that Ray makes for a submitted job, and "
            "deletes later: give an absolute path outside, such as ~/doge, or a URI."
        )


def redacted(recipe: Recipe) -> Recipe:
    """The recipe as it may be shown and kept, without the passwords and tokens of its URIs."""

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shown(item) for item in value]
        return without_secrets(value) if isinstance(value, str) else value

    return from_dict(Recipe, shown(to_dict(recipe)))


# Keys that may change when a run is resumed: no sample and no gradient depends on them, or they only say when to stop.
_FREE = (
    "storage", "cache_gib", "tokenizer.path", "training.max_steps", "training.micro_batch_size", "training.eval_steps",
    "training.save_steps", "training.save_seconds", "training.save_total_limit", "training.logging_steps",
    "training.record_samples", "training.gradient_checkpointing", "training.on_nonfinite", "training.on_spike",
    "training.spike_factor", "lr_scheduler.decay_steps", "engine.", "scaling.", "tracking.", "ledger.", "data.",
)  # fmt: skip


def check_same_run(recipe: Recipe, started: Recipe) -> None:
    """Raise UserError if ``recipe`` cannot resume the run that was started with ``started``.

    The data is not compared here: its order has a fingerprint of its own, which the checkpoint holds.
    """
    before = flatten(started)
    for key, value in flatten(recipe).items():
        if not key.startswith(_FREE) and before.get(key) != value:
            raise UserError(
                f"The run {recipe.name} was started with {key} = {before.get(key)}, not {value}: "
                f"choose another --name, or --from one of its checkpoints."
            )
