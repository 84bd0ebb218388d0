"""Train a small Doge in one process, without Ray: text, shards, packed sequences, the DeepSpeed step, the loss.

python docs/examples/one_process.py
"""

import tempfile
from contextlib import redirect_stdout

import torch

from data_pipelines.order.packed_sequences import PackedSequences
from data_pipelines.order.plan import make_plan
from data_pipelines.sources.source_recipe import DataRecipe, SourceRecipe
from doge.common.storage import Storage
from doge.model.configuration import ModelRecipe
from doge.tokenizer.training import TokenizerRecipe
from doge.training import process_group
from doge.training.engine import Engine
from doge.training.engine_recipe import EngineRecipe
from doge.training.next_token import NextTokenPrediction
from doge.training.optimizer import OptimizerRecipe
from doge.training.schedule import SchedulerRecipe

STEPS, SEQUENCES, DEVICE = 20, 4, torch.device("cpu")
MODEL = ModelRecipe(
    vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
    initializer_range=0.06,
)  # fmt: skip
TEXT = SourceRecipe("python-installation://prose", weight=1, max_bytes=400_000)
DATA = DataRecipe({"prose": TEXT}, sequence_length=256, held_out_sequences=0)
SCHEDULE = SchedulerRecipe(warmup_steps=5, decay_steps=5)


def main(storage: Storage) -> None:
    plan = make_plan(DATA, TokenizerRecipe(vocab_size=1024), storage)
    tokenizer = plan.open_tokenizer(storage)
    for file in range(len(plan.files["prose"])):  # in a run, Ray Data makes these beside the training
        plan.make_shard(storage, "prose", file, part=0, tokenizer=tokenizer)
    feed = PackedSequences(storage, plan.fingerprint)

    process_group.be_alone(DEVICE)
    with redirect_stdout(None):  # DeepSpeed prints its memory
        engine = Engine(NextTokenPrediction(MODEL), OptimizerRecipe(lr=8e-3), EngineRecipe(), DEVICE)
    ranges = ((step * SEQUENCES, (step + 1) * SEQUENCES) for step in range(STEPS))
    for step, sequences in enumerate(feed.prefetch(ranges)):
        batch = engine.objective.prepare(engine.module, sequences, seeds=range(SEQUENCES))
        result = engine.step(batch, micro_batch_sizes=[2, 2], lr_factor=SCHEDULE.factor(step, STEPS))
        print(f"step {step + 1}  loss {result.loss:.4f}  over {result.weight:.0f} tokens")
    engine.close()
    process_group.leave()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Storage(folder))
