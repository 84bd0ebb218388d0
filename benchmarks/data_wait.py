"""The share of their time that training steps wait for data, while the data is still being prepared beside them.

    python benchmarks/data_wait.py --steps 60

Runs the tiny recipe by `jobs/pretrain.py` in a new storage: the tokenizer is trained and the shards are made as in any
first run. Every step logs what it took and how long it waited for its batch; the first ten, which come before anything
is warm, are left out. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 10


def histories(storage: str, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of every step of a run of the tiny recipe, and seconds of it spent waiting for data."""
    from cluster.runs.recipe import Recipe
    from doge.common.config_tree import from_dict, to_yaml
    from doge.common.storage import Storage
    from doge.reporting.tracking import Tracker

    values = yaml.safe_load((ROOT / "jobs/recipes/tiny.yaml").read_text())
    values["storage"] = storage
    values["training"] |= {"max_steps": steps, "eval_steps": 10**6, "save_steps": 10**6}
    values["lr_scheduler"] = {"warmup_steps": steps // 10, "decay_steps": steps // 4}
    recipe = from_dict(Recipe, values)
    path = Path(storage, "recipe.yaml")
    path.write_text(to_yaml(recipe))
    command = [sys.executable, "jobs/pretrain.py", "--recipe", str(path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"The run failed:\n{done.stdout[-3000:]}")
    root = Storage(storage)
    tracker = Tracker(recipe.tracking, root, root / f"runs/{recipe.name}", recipe.name)
    tokens = recipe.training.global_batch_size * recipe.data.sequence_length
    seconds = [tokens / rate for _, rate in tracker.history("tokens_per_s")]
    return seconds, [waited for _, waited in tracker.history("data_wait_s")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the run (default: %(default)s)")
    args = parser.parse_args()
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be more than {WARM_UP_STEPS}: the first ones do not count.")
    with tempfile.TemporaryDirectory(prefix="doge-", dir="/tmp", ignore_cleanup_errors=True) as storage:
        seconds, waited = histories(storage, args.steps)
    if not len(seconds) == len(waited) == args.steps:
        raise RuntimeError(f"{len(seconds)} steps were logged and {len(waited)} waits, not {args.steps}.")
    print(f"first step: waited {waited[0]:.3f} s for data")
    seconds, waited = seconds[WARM_UP_STEPS:], waited[WARM_UP_STEPS:]
    result = {
        "steps": len(seconds),
        "step_s": round(sum(seconds) / len(seconds), 4),
        "longest_wait_s": round(max(waited), 4),
        "data_wait": round(sum(waited) / sum(seconds), 6),
    }
    print(f"{len(seconds)} steps after that: {sum(seconds):.1f} s, {sum(waited):.3f} s of it spent waiting for data")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
