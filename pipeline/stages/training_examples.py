"""Make the examples that SFT trains on, where they are not those of the data: best samples, and augmented ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.recipe import Recipe
from pipeline.rewards import build_rewards
from pipeline.rewards.best_of_n import BestSample, best_samples
from pipeline.runtime.distributed import launched_engine, on_main
from pipeline.runtime.files import write_atomically
from pipeline.runtime.messages import say
from pipeline.stages.directory import RunDirectory
from pipeline.tasks import Task, columns
from pipeline.tasks.augment import augment_examples
from pipeline.tasks.types import Where
from pipeline.trainers.precision import sampling_autocast

SAMPLES_FILE = "best_of_n.jsonl"


def with_training_examples(
    recipe: Recipe, run: RunDirectory, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Task, dict[str, object]]:
    """Return the task with the examples that SFT trains on, and what stage.json holds of them.

    `model` is the one that SFT starts from. The prompts that PPO answers stay those of the data.

    Raises:
        TaskError: an augmentation that cannot be made.
        ValueError: no sample can be learnt, or an engine shards the model that would sample.
        RewardError: a reward fails.
    """
    figures: dict[str, object] = {}
    if recipe.sft.best_of_n is not None:
        chosen = _best_samples(recipe, run, task, model, tokenizer)
        task = _with_train(task, _with_completions(task.train, chosen), [sample.row for sample in chosen])
        figures["best_of_n"] = _sample_figures(chosen)
    if recipe.augment:
        before, is_columns = len(task.train), isinstance(recipe.task.config, columns.Config)
        fields = _columns_of_prompt(recipe) if is_columns else ["source"]
        task = _with_train(task, *augment_examples(recipe.augment, task.train, fields, recipe.seed))
        say(f"task.augment: {before:,} training examples become {len(task.train):,}")
        figures["augmented_examples"] = len(task.train)
    return task, figures


def _with_train(task: Task, train: Dataset, rows: Sequence[int]) -> Task:
    """Return the task with other training examples, each made of one of `rows`, which say where it is in the data."""
    where: Where = partial(task.where, "train")
    places: Mapping[str, Where] = {**task.places, "train": lambda numbers: where([rows[i] for i in numbers])}
    return replace(task, train=train, ppo_prompts=task.prompts, places=places)


def _columns_of_prompt(recipe: Recipe) -> list[str]:
    return [columns.renamed_column(name, [name]) for name in recipe.task.config.prompt_columns]


def _with_completions(train: Dataset, chosen: Sequence[BestSample]) -> Dataset:
    rows = train.select([sample.row for sample in chosen]).remove_columns("completion")
    return rows.add_column("completion", [sample.text for sample in chosen])


def _best_samples(
    recipe: Recipe, run: RunDirectory, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[BestSample]:
    """Draw the samples, or read those that an interrupted stage has drawn."""
    if launched_engine() is not None:
        raise ValueError(
            "sft.from: best_of_n samples from a whole model on each device, and accelerate launch has been told to "
            "shard it; use accelerate_configs/multi_gpu.yaml"
        )
    file = run.sft / SAMPLES_FILE
    if on_main(lambda: not file.is_file()):
        config, ppo = recipe.sft.best_of_n, recipe.ppo
        say(f"sft: {config.samples} samples for each of {len(task.train):,} training prompts")
        rewards = build_rewards(ppo.rewards, task.language)
        given = (task.train, config, ppo.greedy, rewards, ppo.reward_handling, recipe.seed, task.strip_thoughts)
        with sampling_autocast(ppo.bf16):
            sampled = best_samples(model.to(PartialState().device).eval(), tokenizer, *given)
        if not sampled:
            raise ValueError(
                "sft.from: best_of_n found no sample that ends, has a text and has a reward; start from a model that "
                "answers the task, or raise ppo.response_length"
            )
        lines = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in sampled)
        on_main(lambda: write_atomically(file, lines))
    lines = file.read_text(encoding="utf-8").split("\n")
    samples = [BestSample(**json.loads(line)) for line in lines if line]
    if left_out := len(task.train) - len(samples):
        say(f"sft: {left_out:,} prompts are left out: no sample of theirs ended and had a text and a reward")
    return samples


def _sample_figures(samples: Sequence[BestSample]) -> dict[str, float]:
    count = len(samples)
    best, mean = (sum(values) / count for values in zip(*((s.reward, s.mean) for s in samples), strict=True))
    return {"prompts": count, "best_reward": best, "mean_reward": mean}
