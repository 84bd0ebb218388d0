"""A pretraining recipe as the phases of a training."""

from cluster.runs.recipe import Recipe
from cluster.workloads.phase import Phase, TrainingSettings
from cluster.workloads.side_tasks import Evaluation
from data_pipelines.order.packed_sequences import PackedSequencesConfig
from data_pipelines.order.plan import Plan
from doge.common.config_tree import to_dict
from doge.common.storage import Storage
from doge.training.next_token import NextTokenPrediction


def pretraining_settings(recipe: Recipe, plan: Plan, start_from: Storage | None = None) -> TrainingSettings:
    """The settings of the workload that pretrains the recipe's model.

    Args:
        recipe: of the run.
        plan: of its data.
        start_from: checkpoint of another run to begin with.
    """
    training, length, held_out = recipe.training, recipe.data.sequence_length, recipe.data.held_out_sequences
    evaluation = Evaluation(PackedSequencesConfig(plan.fingerprint, held_out=True), held_out, training.eval_steps)
    phase = Phase(
        name="pretraining",
        objective=NextTokenPrediction(
            recipe.model, training.seed, training.gradient_checkpointing, z_loss=training.z_loss
        ),
        feed=PackedSequencesConfig(plan.fingerprint),
        steps=training.max_steps,
        units_per_step=training.global_batch_size,
        unit_tokens=length,
        optimizer=recipe.optimizer,
        lr_scheduler=recipe.lr_scheduler,
        side_tasks=(evaluation,) if held_out else (),
    )
    return TrainingSettings(
        phases=(phase,),
        engine=recipe.engine,
        tokenizer=plan.tokenizer_fingerprint,
        recipe=to_dict(recipe),
        seed=training.seed,
        save_steps=training.save_steps,
        save_seconds=training.save_seconds,
        save_total_limit=training.save_total_limit,
        logging_steps=training.logging_steps,
        micro_batch_size=training.micro_batch_size,
        record_samples=training.record_samples,
        shares=recipe.scaling.shares,
        peak_tflops=recipe.tracking.peak_tflops,
        profile_steps=recipe.tracking.profile_steps,
        start_from=start_from,
        on_nonfinite=training.on_nonfinite,
        on_spike=training.on_spike,
        spike_factor=training.spike_factor,
    )
