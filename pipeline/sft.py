"""Supervised fine-tuning on TRL's SFTTrainer, merged into a plain model directory.

accelerate launch pipeline/sft.py recipes/quickstart.yaml sft.num_train_epochs=2
"""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import sys
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model, load_tokenizer, lora_config, merged
from pipeline.models.prompt_lengths import check_prompt_lengths
from pipeline.models.text import encode_prompts
from pipeline.recipe import Recipe, parse_stage_arguments
from pipeline.runtime.signals import stop_signals
from pipeline.stages.directory import RunDirectory
from pipeline.stages.stage import base_model_path, left_out_record, load_recipe_task, run_stage
from pipeline.tasks import Task
from pipeline.trainers.huggingface.gather_weights import check_sharding, whole_weights
from pipeline.trainers.huggingface.sft import ResumableSFTTrainer, build_sft_trainer, last_checkpoint, sft_arguments


def main(argv: Sequence[str]) -> int:
    """Run the stage; 0 when its artefact is complete."""
    recipe = parse_stage_arguments(argv, __doc__)
    return run_stage(recipe, "sft", train)


def train(recipe: Recipe, run: RunDirectory) -> dict[str, object]:
    """Train, then save the model as plain weights."""
    task = load_recipe_task(recipe)
    base = base_model_path(recipe, run, task)
    arguments = sft_arguments(recipe.sft.arguments, run.sft, recipe.seed)
    check_sharding(arguments, recipe.model.load_in_4bit and recipe.sft.use_peft)
    model = load_model(base, recipe.model, frozen=recipe.sft.use_peft)
    tokenizer = load_tokenizer(base, recipe.model)
    check_later_stages(recipe, task, model, tokenizer)
    trainer = build_sft_trainer(
        model,
        arguments,
        tokenizer,
        task.train,
        task.validation,
        lora_config(recipe.model) if recipe.sft.use_peft else None,
        run.sft / "metrics.jsonl",
    )
    with stop_signals():
        result = trainer.train(resume_from_checkpoint=last_checkpoint(arguments))
    save(trainer, base, recipe.model, run.sft)
    best = trainer.state.best_metric
    figures = {"train_loss": result.training_loss, "steps": trainer.state.global_step, "best_eval_loss": best}
    figures["mixed_precision"] = (
        trainer.accelerator.mixed_precision
    )  # the machine's choice, where it is not the recipe's
    return {**figures, **left_out_record(task)}


def save(trainer: ResumableSFTTrainer, base: Path | str, config: ModelConfig, directory: Path) -> None:
    """Plain weights and the tokenizer; every process calls it, for of sharded weights each holds a part."""
    model, weights = trainer.accelerator.unwrap_model(trainer.model), whole_weights(trainer)
    if trainer.is_world_process_zero():
        if isinstance(model, PeftModel):
            model, weights = merged(model, base, config, weights), None
        model.save_pretrained(directory, state_dict=weights)
        trainer.processing_class.save_pretrained(directory)
    trainer.accelerator.wait_for_everyone()


def check_later_stages(recipe: Recipe, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse prompts that PPO and the evaluation could not answer, before the hours of this stage.

    Raises:
        ValueError: as `check_prompt_lengths`.
    """
    splits = [("eval.max_new_tokens", recipe.eval.max_new_tokens, "test", task.test)]
    if recipe.ppo is not None:
        length = recipe.ppo.response_length
        held_out = task.validation.select(range(min(len(task.validation), recipe.ppo.eval_examples or sys.maxsize)))
        splits += [("ppo.response_length", length, "train", task.prompts)]
        splits += [("ppo.response_length", length, "validation", held_out)]
    for key, length, split, rows in splits:
        prompts = encode_prompts(tokenizer, rows["prompt"], model.config.is_encoder_decoder)
        check_prompt_lengths(prompts, length, model.config, key, split)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
