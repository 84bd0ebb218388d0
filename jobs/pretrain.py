"""Pretrain a Doge model.

    python jobs/pretrain.py --recipe tiny
    python jobs/pretrain.py --recipe Doge-20M --storage /data/doge --data.sources.python-edu.weight 0.1
    python jobs/pretrain.py --recipe Doge-20M --name longer --from ~/doge/runs/Doge-20M/checkpoints/step-00007000 \\
        --training.max-steps 16000
    python jobs/pretrain.py --recipe tiny --name traced --profile
    ray job submit --working-dir . -- python jobs/pretrain.py --recipe tiny

Run the same command again to resume an interrupted run. Every key of the recipe is an option.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from cluster.runs.console import Console
from cluster.runs.forecast import dry_run
from cluster.runs.pretraining import pretrain
from jobs.command import Command, main

PROFILE_STEPS = 3


@dataclass(frozen=True)
class Pretrain(Command):
    """Options of `pretrain.py`.

    Args:
        from_: Directory of a checkpoint to start a new run from: to leave the stable phase earlier or later, or to
            train on other data.
        profile: Write a trace of three steps for Perfetto.
    """

    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def run(command: Pretrain) -> None:
    recipe = command.settings
    if command.profile and not recipe.tracking.profile_steps:
        recipe = replace(recipe, tracking=replace(recipe.tracking, profile_steps=PROFILE_STEPS))
    if command.dry_run:
        dry_run(recipe, Console(1, 1))
    else:
        pretrain(recipe, start_from=command.from_)


if __name__ == "__main__":
    main(Pretrain, run, __doc__)
