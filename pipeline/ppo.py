"""PPO from the SFT model with the recipe's rewards; the policy is an adapter over the SFT model.

accelerate launch pipeline/ppo.py recipes/quickstart.yaml ppo.total_episodes=10240 ppo.kl_coef=0.05
accelerate launch pipeline/ppo.py recipes/quickstart.yaml control=true --stage control
"""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import sys
from collections.abc import Sequence
from functools import partial

from pipeline.models.loading import load_model, load_tokenizer, lora_config, plain_model_directory
from pipeline.recipe import Recipe, parse_arguments_of_stages
from pipeline.rewards import build_rewards
from pipeline.runtime.signals import stop_signals
from pipeline.stages.control import ppo_arguments
from pipeline.stages.directory import RunDirectory
from pipeline.stages.inputs import held_out_metrics, learned_reward, sft_model_path
from pipeline.stages.stage import run_stage
from pipeline.stages.task import left_out_record, load_recipe_task, template_record
from pipeline.trainers.ppo.trainer import PPOTrainer


def main(argv: Sequence[str]) -> int:
    """Run the stage; 0 when its artefact is complete."""
    recipe, stage = parse_arguments_of_stages(argv, __doc__, ("ppo", "control"))
    return run_stage(recipe, stage, partial(train_ppo, stage=stage))


def train_ppo(recipe: Recipe, run: RunDirectory, stage: str) -> dict[str, object]:
    """Train the policy and save the best one; the control's scores are shuffled."""
    (recipe, task), output = load_recipe_task(recipe, run), run.stage(stage)
    path = plain_model_directory(sft_model_path(recipe, run), recipe.model, output / "base")
    tokenizer = load_tokenizer(path, recipe.model)
    trainer = PPOTrainer(
        model=load_model(path, recipe.model, frozen=recipe.ppo.use_peft),
        args=ppo_arguments(recipe, stage),
        processing_class=tokenizer,
        reward_funcs=build_rewards(recipe.ppo.rewards, task.language, learned_reward(recipe, run, task, tokenizer)),
        train_dataset=task.prompts,
        eval_dataset=task.validation,
        peft_config=lora_config(recipe.model),
        output_dir=output,
        seed=recipe.seed,
        compute_metrics=held_out_metrics(recipe, task),
        strip_thoughts=task.strip_thoughts,
    )
    with stop_signals():
        state = trainer.train(resume_from_checkpoint=True)
    trainer.save_model(output)
    figures = {"steps": state.step, "episodes": state.episodes, "best_step": state.best_step}
    figures |= {"mixed_precision": trainer.accelerator.mixed_precision, "response_length": recipe.ppo.response_length}
    figures[f"best_{recipe.ppo.metric_for_best_model}"] = state.best_metric
    return {**figures, **left_out_record(task), **template_record(tokenizer)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
