"""A learned reward on TRL's RewardTrainer: an adapter and a head over the SFT model, from pairs, with a report.

accelerate launch pipeline/reward.py recipes/quickstart_reward_model.yaml reward.num_train_epochs=2
"""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from pipeline.evaluation.pages.reward_pages import print_reward_report, write_reward_report
from pipeline.evaluation.reward_quality_scores import reward_report, reward_test_data, score_test_data
from pipeline.models.loading import load_config, load_tokenizer, plain_model_directory
from pipeline.recipe import Recipe, parse_stage_arguments
from pipeline.runtime.distributed import on_main
from pipeline.stages.directory import RunDirectory
from pipeline.stages.inputs import sft_model_path
from pipeline.stages.reward_inputs import collect_pairs, report_inputs, reward_model
from pipeline.stages.stage import run_stage
from pipeline.stages.task import left_out_record, load_recipe_task, template_record


def main(argv: Sequence[str]) -> int:
    """Run the stage; return 0 when its artefact and its report are complete."""
    return run_stage(parse_stage_arguments(argv, __doc__), "reward", train_reward_model)


def train_reward_model(recipe: Recipe, run: RunDirectory) -> dict[str, object]:
    """Collect the pairs, train on them or load a classifier, report, and save what PPO needs."""
    recipe, task = load_recipe_task(recipe, run)
    base = plain_model_directory(sft_model_path(recipe, run), recipe.model, run.reward / "base")
    tokenizer = load_tokenizer(base, recipe.model)
    pairs, samples = collect_pairs(recipe, run, task, base, tokenizer)
    reward = reward_model(recipe, run, base, tokenizer, pairs)
    given = (tokenizer, recipe.seed, load_config(base, recipe.model))
    data = reward_test_data(pairs, samples, task.validation, task.prompts["prompt"], *given)
    scores = score_test_data(reward, data, recipe.reward.batch_size)

    def report() -> dict[str, object]:
        report, held_out = reward_report(data, scores, report_inputs(recipe, run, task, reward.record))
        write_reward_report(report, data.held_out, held_out, run.reward, f"Reward model of {recipe.name}")
        right = report.accuracy
        figures = {"accuracy": right.value, "accuracy_low": right.low, "held_out_pairs": right.count}
        replace(reward.record, shift=report.shift, scale=report.scale, **figures).save(run.reward)
        print_reward_report(report, Console(stderr=True))
        return {"verdict": report.verdict, "held_out_accuracy": report.accuracy.value}

    return {**reward.summary, **left_out_record(task), **template_record(tokenizer), **on_main(report)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
