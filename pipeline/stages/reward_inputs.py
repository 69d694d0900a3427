"""What the reward stage makes of a recipe: the pairs, the reward model, and the settings it reports."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from pipeline.evaluation.reward_quality_scores import ReportInputs
from pipeline.metrics import load_metric
from pipeline.models.loading import load_config, load_model, lora_config
from pipeline.models.reward_model import RewardRecord
from pipeline.recipe import Recipe
from pipeline.rewards.pairs import BROKEN, HELD_OUT, TRAIN, Pair, check_pairs, read_lines, scaled_margins, write_lines
from pipeline.rewards.pairs.collect import RankedSample, context_check, data_pairs, sample_pairs
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.rewards.raw_scores import UncalibratedReward, load_classifier
from pipeline.runtime.distributed import on_main
from pipeline.runtime.messages import say
from pipeline.stages.directory import RunDirectory, versions
from pipeline.stages.inputs import say_left_out
from pipeline.tasks import Task, preferences
from pipeline.trainers.huggingface.reward_adapter import train_reward_adapter

Base = Path | str


def collect_pairs(
    recipe: Recipe, run: RunDirectory, task: Task, base: Base, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Pair], list[RankedSample]]:
    """Write the pairs and the held-out samples to the stage's directory, unless they are there, and read them."""
    if on_main(lambda: not (run.reward / "pairs.json").is_file()):
        if isinstance(recipe.reward.pairs, SampledPairs):
            pairs, samples = _sampled(recipe, task, base, tokenizer)
            on_main(lambda: _save(recipe, run, base, tokenizer, pairs, samples))
        else:
            on_main(lambda: _save(recipe, run, base, tokenizer, *_from_data(recipe, tokenizer)))
    return read_lines(Pair, run.reward / "pairs.jsonl"), read_lines(RankedSample, run.reward / "samples.jsonl")


def _sampled(
    recipe: Recipe, task: Task, base: Base, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Pair], list[RankedSample]]:
    """Sample pairs of training prompts and of held-out ones; return them with the samples of the latter."""
    settings = recipe.reward.pairs
    model = load_model(base, recipe.model).to(PartialState().device).eval()
    metric = load_metric(settings.metric, task.language)
    pairs: list[Pair] = []
    samples: list[RankedSample] = []
    for split, rows, count in (
        (TRAIN, task.prompts, settings.prompts),
        (HELD_OUT, task.validation, settings.held_out_prompts),
    ):
        rows = rows.select(range(min(count or len(rows), len(rows))))
        say(f"reward: {settings.samples} samples for each of {len(rows)} {split.replace('_', '-')} prompts")
        more, samples = sample_pairs(model, tokenizer, rows, split, settings, metric, recipe.seed)
        pairs += more
    return pairs, samples


def _from_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Pair], list[RankedSample], int]:
    """Load the pairs of a data set; return them, no samples, and the number of broken rows."""
    data = preferences.load(recipe.reward.pairs)
    say_left_out("reward.pairs", data.left_out)
    sides = ((TRAIN, data.train), (HELD_OUT, data.validation))
    return [p for split, rows in sides for p in data_pairs(tokenizer, split, rows)], [], len(data.left_out)


def _save(
    recipe: Recipe,
    run: RunDirectory,
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    samples: Sequence[RankedSample],
    broken: int = 0,
) -> None:
    """Write the pairs that can be learnt from, the samples and, last, the counts."""
    # A classifier checks lengths itself.
    trains = recipe.reward.model is None
    fits = context_check(load_config(base, recipe.model), tokenizer, pairs) if trains else lambda pair: True
    kept, counts = check_pairs(pairs, fits, recipe.reward.pairs.min_margin)
    if broken:
        counts = replace(counts, found=counts.found + broken, dropped={**counts.dropped, BROKEN: broken})
    write_lines(kept, run.reward / "pairs.jsonl")
    write_lines(samples, run.reward / "samples.jsonl")
    (run.reward / "pairs.json").write_text(json.dumps(asdict(counts), indent=2) + "\n", encoding="utf-8")
    say(*counts.sentences())


def reward_model(
    recipe: Recipe, run: RunDirectory, base: Base, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> UncalibratedReward:
    """Train an adapter on the pairs, or load the classifier that the recipe names."""
    section, config = recipe.reward, recipe.model
    if section.model is not None:
        learned = recipe.ppo.learned_reward if recipe.ppo else None
        template = learned.options.get("template") if learned else None
        return load_classifier(section.model, config, template, section.batch_size)
    return train_reward_adapter(
        load_model(base, config, frozen=True),
        tokenizer,
        scaled_margins(pairs, section.margin_weight),
        lora_config(config),
        section.arguments,
        run.reward,
        recipe.seed,
        section.batch_size,
    )


def report_inputs(recipe: Recipe, run: RunDirectory, task: Task, record: RewardRecord) -> ReportInputs:
    """Load the metrics, the counts of the pairs and the settings for the report."""
    metrics = [load_metric(metric.name, task.language, **metric.options) for metric in recipe.eval.metrics]
    sampled = isinstance(recipe.reward.pairs, SampledPairs)
    return ReportInputs(
        metrics=metrics,
        references=list(task.validation["references"]) if sampled else None,
        consensus_metric=None if sampled else metrics[0],
        min_accuracy=recipe.reward.min_accuracy,
        pair_counts=json.loads((run.reward / "pairs.json").read_text(encoding="utf-8")),
        settings={
            "name": recipe.name,
            "seed": recipe.seed,
            "model": record.path,
            "kind": record.kind,
            "min_accuracy": recipe.reward.min_accuracy,
            "versions": versions(),
        },
    )
