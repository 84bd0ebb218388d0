"""What a host keeps from one membership to the next, and how it goes through one."""

import gc
import socket
import threading
import time
from typing import Any

import ray
import torch

from cluster.elastic.membership import Membership, Outcome, node_name
from cluster.workloads.membership_loop import MembershipLoop
from data_pipelines.order.packed_sequences import PackedSequences
from doge.common.errors import UserError
from doge.training import process_group
from doge.training.engine import OutOfMemory
from doge.training.state.checkpoint import Checkpoints, load_checkpoint
from doge.training.state.train_state import TrainState
from doge.training.warm_up import warm_up


class Worker:
    """What a host keeps from one membership to the next: the data, the newest state, and what it knows of itself."""

    def __init__(self, config: HostConfig, host: str, leave: threading.Event):
        self.config, self.recipe, self.board, self.host, self.leave = config, config.recipe, config.board, host, leave
        self.node = node_name(socket.gethostname(), ray.get_runtime_context().get_node_id())
        self.reader = PackedSequences(config.storage, config.data_plan, on_wait=self._wait_message)
        self.held_out = PackedSequences(config.storage, config.data_plan, True, on_wait=self._wait_message)
        self.checkpoints = Checkpoints(
            config.storage / f"runs/{self.recipe.name}/checkpoints", self.recipe.training.save_total_limit, self.say
        )
        self.device = torch.device("cuda", 0) if config.use_gpu else torch.device("cpu")
        self.held: tuple[TrainState, dict[str, Any]] | None = None  # the newest state that this host gathered
        self.speed = 0.0  # sequences per second; 0 is unknown
        self.limit = 0  # sequences of a micro-batch; 0 is unknown
        self.phase: tuple[str, int, float] = ("idle", 0, time.monotonic())
        self.step_seconds = 0.0
        self.membership_number = 0
        self.traced = False  # there is a trace of steps
        self._membership: MembershipLoop | None = None
        asked = time.monotonic()
        now = ray.get(self.board.now.remote())
        self.clock_offset = now - (asked + time.monotonic()) / 2  # to the driver's monotonic clock

    @property
    def waiting(self) -> bool:
        """Whether the loop waits for other workers right now."""
        membership = self._membership
        engine = membership.engine if membership is not None else None
        return self.phase[0] == "joining" if engine is None else engine.waiting

    def abort(self, number: int) -> None:
        """From another thread: break off a membership that has lost a member, unless it is over already."""
        loop = self._membership
        if loop is not None and loop.membership.number == number:
            loop.abandon()
            process_group.abort()

    def warm_up(self) -> None:
        """Do once what would make a first step slow."""
        recipe = self.recipe
        warm_up(recipe.model, recipe.optimizer, recipe.engine, self.device)

    def enter(self, phase: str, step: int = 0) -> None:
        self.phase = (phase, step, time.monotonic())

    def say(self, message: str) -> None:
        self.board.post.remote("message", message)

    def run(self, membership: Membership, rank: int, given: Given | None) -> Outcome:
        """Step in ``membership`` until it ends; never raises."""
        self.membership_number = membership.number
        self.enter("joining", given.step if given else 0)
        self._membership = MembershipLoop(self, membership, rank)
        try:
            self._membership.enter(given)
            outcome = self._membership.run()
            self._membership.close(broken=False)
            return outcome
        except UserError as error:  # another membership would only meet it again
            ray.get(self.board.stop.remote(str(error)))
            return Outcome("stopped", self.phase[1], str(error))
        except OutOfMemory as error:
            self._membership.note_limit(error.limit)
            reason = f"worker {rank} ran out of memory, from now on it takes at most {error.limit} sequences at once"
            return Outcome("full", self.phase[1], reason)
        except Exception as error:  # a peer is gone, or something is wrong here
            reason = " ".join(str(error).split())[:160]
            return Outcome("broken", self.phase[1], f"worker {rank}: {type(error).__name__}: {reason}")
        finally:
            self._membership.close(broken=True)
            self._membership = None
            gc.collect()
            if self.config.use_gpu:
                torch.cuda.empty_cache()
            self.enter("idle", self.phase[1])

    def starting_state(self) -> Given | None:
        """The newest state: the one this host holds or a checkpoint, of this run or else the one to start from."""
        # Without the storage nobody knows whether what is held is the newest: of a member other than rank 0 it is what
        # its membership began with.
        steps = self.checkpoints.steps()
        if self.held is None or (steps and steps[-1] > self.held[0].step):
            self.held = self.checkpoints.latest() or self.held
        state, memory = self.held or self._foreign_start() or (None, None)
        if state is None:
            return None
        if memory["position"]["data_plan"] != self.config.data_plan:
            raise UserError(
                f"The data of the run {self.recipe.name} is not what it was when it started (recipe, files or "
                f"tokenizer): choose another --name, and --from one of its checkpoints to go on with other data."
            )
        self.held = (state, memory)
        arrays = {name: tensor.numpy() for name, tensor in state.parameters.items()}
        moments = {key: {name: value.numpy() for name, value in part.items()} for key, part in state.moments.items()}
        return Given(state.step, arrays, moments, memory)

    def _foreign_start(self) -> tuple[TrainState, dict[str, Any]] | None:
        if self.config.start_from is None:
            return None
        state, memory = load_checkpoint(self.config.start_from)
        if memory["position"]["data_plan"] != self.config.data_plan:  # other data is read from its own beginning
            changed = {"data_plan": self.config.data_plan, "next_sequence": 0}
            memory = memory | {"position": memory["position"] | changed}
        return state, memory

    def _wait_message(self, message: str) -> None:
        if reason := ray.get(self.board.stopped.remote()):
            raise UserError(reason)
        if self._membership is not None and self._membership.rank == 0:
            self.say(message)
