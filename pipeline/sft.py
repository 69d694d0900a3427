"""Supervised fine-tuning on TRL's SFTTrainer, merged into a plain model directory.

accelerate launch pipeline/sft.py recipes/quickstart.yaml sft.num_train_epochs=2
"""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import sys
from collections.abc import Sequence
from functools import partial

from pipeline.evaluation.config import BASELINES, SFT_BY_METRIC
from pipeline.models.loading import load_model, load_tokenizer, lora_config
from pipeline.recipe import Recipe, parse_arguments_of_stages
from pipeline.runtime.signals import stop_signals
from pipeline.stages.baselines import choose_checkpoint, sft_keys
from pipeline.stages.directory import RunDirectory
from pipeline.stages.early_checks import check_later_stages
from pipeline.stages.endings import check_endings
from pipeline.stages.stage import run_stage
from pipeline.stages.task import left_out_record, load_recipe_task, sft_base, template_record
from pipeline.stages.training_examples import with_training_examples
from pipeline.trainers.huggingface.gather_weights import check_sharding, save_plain_model
from pipeline.trainers.huggingface.resumable import last_checkpoint
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments, training_figures


def main(argv: Sequence[str]) -> int:
    """Run the stage; 0 when its artefact is complete."""
    recipe, stage = parse_arguments_of_stages(argv, __doc__, ("sft", *BASELINES))
    return run_stage(recipe, stage, partial(train_sft, stage=stage))


def train_sft(recipe: Recipe, run: RunDirectory, stage: str) -> dict[str, object]:
    """Train SFT or a baseline, then save the model as plain weights."""
    (recipe, task), output = load_recipe_task(recipe, run), run.stage(stage)
    base, arguments = sft_base(recipe, run, output), sft_arguments(sft_keys(recipe, run, stage), output, recipe.seed)
    check_sharding(arguments, recipe.model.load_in_4bit and recipe.sft.use_peft)
    model, tokenizer = load_model(base, recipe.model, frozen=recipe.sft.use_peft), load_tokenizer(base, recipe.model)
    check_later_stages(recipe, task, model, tokenizer)  # before the hours of this stage
    task, figures = with_training_examples(recipe, run, task, model, tokenizer)
    adapter = lora_config(recipe.model) if recipe.sft.use_peft else None
    log = output / "metrics.jsonl"
    trainer = build_sft_trainer(model, arguments, tokenizer, task.train, task.validation, adapter, log, task.where)
    with stop_signals():
        result = trainer.train(resume_from_checkpoint=last_checkpoint(arguments))
    figures |= check_endings(recipe, task, trainer, tokenizer)
    save_plain_model(trainer, base, recipe.model, output)
    return {
        **training_figures(trainer, result),
        **figures,
        **(choose_checkpoint(recipe, run, task, output) if stage == SFT_BY_METRIC else {}),
        **left_out_record(task),
        **template_record(tokenizer),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
