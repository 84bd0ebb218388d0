"""The training states that a host holds: in memory, in an engine, or on their way to other hosts."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cluster.elastic.membership import StateId
from cluster.workloads.training_events import StepMade
from doge.training.engine import Engine
from doge.training.state.checkpoint import Checkpoint
from doge.training.state.run_position import RunPosition
from doge.training.state.train_state import TrainState


@dataclass(frozen=True)
class SharedTrainState:
    """A training state in the object store: numpy tensors, and where the run stands."""

    id: StateId
    parameters: dict[str, np.ndarray]
    moments: dict[str, dict[str, np.ndarray]]
    position: RunPosition

    @classmethod
    def of(cls, held: "Held") -> "SharedTrainState":
        state, position = held.checkpoint()
        parameters = {name: tensor.numpy() for name, tensor in state.parameters.items()}
        moments = {key: {name: value.numpy() for name, value in part.items()} for key, part in state.moments.items()}
        return cls(held.id, parameters, moments, position)

    def open(self) -> "Held":
        """The tensors where they lie, without a copy: the engine only reads them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nobody may write to it
            parameters = {name: torch.from_numpy(array) for name, array in self.parameters.items()}
            moments = {
                key: {name: torch.from_numpy(array) for name, array in part.items()}
                for key, part in self.moments.items()
            }
        checkpoint = TrainState(self.id.step, parameters, moments), self.position
        return Held(self.id, self.position, lambda: checkpoint)


@dataclass(frozen=True)
class Held:
    """A state that a host holds, in its memory or in its engine.

    Args:
        checkpoint: gives the state and the position.
    """

    id: StateId
    position: RunPosition
    checkpoint: Callable[[], Checkpoint]

    @classmethod
    def of(cls, checkpoint: Checkpoint, membership: int = 0) -> "Held":
        return cls(StateId(checkpoint[0].step, membership), checkpoint[1], lambda: checkpoint)

    def share(self) -> SharedTrainState:
        return SharedTrainState.of(self)


@dataclass
class Replica:
    """An engine that has the whole state and outlives memberships.

    Args:
        membership: the one in which it took up its state or made its last step.
        phase: index of the phase that it was built for.
        settled: the step after which all that was due is done.
        last: what was told of its last step.
    """

    engine: Engine
    position: RunPosition
    membership: int
    phase: int
    settled: int
    last: StepMade | None = None

    @property
    def id(self) -> StateId:
        return StateId(self.engine.step_count, self.membership)

    def checkpoint(self) -> Checkpoint:
        state = self.engine.state()
        assert state is not None, "a replica has the whole state"
        return state, self.position
