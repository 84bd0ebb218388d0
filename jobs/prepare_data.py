"""Prepare a recipe's training sequences ahead of training, which otherwise does so beside it.

    python jobs/prepare_data.py --recipe tiny
    python jobs/prepare_data.py --recipe Doge-20M --storage /data/doge --all
    python jobs/prepare_data.py --recipe Doge-20M --data.sources.fineweb-edu-dedup.path '/data/fineweb/*.parquet'
    ray job submit --working-dir . -- python jobs/prepare_data.py --recipe tiny

Prepares what the recipe's steps need. Run the same command again to resume an interrupted preparation. All runs whose
recipes have the same inputs, tokenizer and sequence length share the result.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from cluster.machines.connection import connect
from cluster.runs.console import Console
from jobs.command import Command, main


@dataclass(frozen=True)
class PrepareData(Command):
    """Options of `prepare_data.py`.

    Args:
        all: Prepare every file of every source, instead of only what the recipe's steps need.
    """

    all: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def run(command: PrepareData) -> None:
    recipe, console = command.settings, Console(1, 1)
    recipe.check()
    console.say(f"Preparing {'all of ' if command.all else ''}the data of {recipe.name}")
    console.table(row for row in recipe.plan() if row[0] in ("data", "steps"))
    if command.dry_run:
        return
    connect(recipe.scaling)
    from cluster.machines.head_storage import share
    from data_pipelines.order.plan import make_plan
    from data_pipelines.prepare import prepare
    from doge.common.storage import Storage
    from doge.tokenizer.loading import check_vocabulary

    storage = share(Storage(recipe.storage, cache_bytes=recipe.cache_bytes))
    plan = make_plan(recipe.data, recipe.tokenizer, storage, console.say)
    check_vocabulary(plan.open_tokenizer(storage), recipe.model.build().vocab_size)
    counts = ", ".join(f"{name} {len(files):,}" for name, files in plan.files.items())
    console.table([("files", counts), ("tokenizer", storage.path(plan.tokenizer)), ("shards", storage.path("shards"))])
    needed = None if command.all else recipe.training_sequences
    progress = prepare(plan, storage, needed, lambda progress: console.progress(str(progress)))
    console.conclude(str(progress))
    console.say(f"The order of the sequences is {plan.fingerprint}.")


if __name__ == "__main__":
    main(PrepareData, run, __doc__)
