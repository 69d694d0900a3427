"""What the reward stage makes of a recipe: the pairs, the reward model, and the settings it reports."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.evaluation.reward_quality_scores import ReportInputs
from pipeline.metrics import load_metric
from pipeline.models.loading import load_config, load_model, lora_config
from pipeline.models.reward_model import RewardRecord, load_record
from pipeline.models.sharding import Sharding
from pipeline.models.text import chat_problems, without_thoughts
from pipeline.recipe import Recipe
from pipeline.rewards.classifier import ClassifierReader
from pipeline.rewards.learned import is_reward_folder
from pipeline.rewards.pairs import (
    BROKEN,
    HELD_OUT,
    LONG,
    TRAIN,
    Pair,
    check_pairs,
    read_records,
    scaled_margins,
    split_held_out,
    write_lines,
)
from pipeline.rewards.pairs.collect import RankedSample, context_check, data_pairs, sample_pairs
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.rewards.raw_scores import UncalibratedReward, load_classifier
from pipeline.runtime.distributed import on_main
from pipeline.runtime.messages import say
from pipeline.stages.directory import RunDirectory, versions
from pipeline.stages.task import say_left_out
from pipeline.tasks import Task, TaskError, columns, preferences
from pipeline.trainers.huggingface.reward_adapter import train_reward_adapter
from pipeline.trainers.precision import sampling_autocast

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
            config = _trained_config(recipe, base)
            on_main(lambda: _save(recipe, run, base, tokenizer, *_from_data(recipe, task, tokenizer, config)))
    return read_records(Pair, run.reward / "pairs.jsonl"), read_records(RankedSample, run.reward / "samples.jsonl")


def _sampled(
    recipe: Recipe, task: Task, base: Base, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Pair], list[RankedSample]]:
    """Sample pairs of training prompts and of held-out ones; return them with the samples of the latter."""
    settings = recipe.reward.pairs
    model, sharding = load_model(base, recipe.model).eval(), Sharding()
    sharding.place(model)
    metric = load_metric(settings.metric, task.language)
    pairs: list[Pair] = []
    samples: list[RankedSample] = []
    for split, rows, count in (
        (TRAIN, task.prompts, settings.prompts),
        (HELD_OUT, task.validation, settings.held_out_prompts),
    ):
        rows = rows.select(range(min(count or len(rows), len(rows))))
        say(f"reward: {settings.samples} samples for each of {len(rows)} {split.replace('_', '-')} prompts")
        given = (rows, split, settings, metric, recipe.seed, task.strip_thoughts, sharding.gathered())
        with sampling_autocast(None if recipe.ppo is None else recipe.ppo.bf16):
            more, samples = sample_pairs(model, tokenizer, *given)
        pairs += more
    return pairs, samples


def _from_data(
    recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None = None
) -> tuple[list[Pair], list[RankedSample], int]:
    """Load the pairs of a data set, in the form of the task's prompts; return them, no samples, and the broken rows.

    The rows whose pairs are longer than the reward model can read are named; `check_pairs` drops them. `config` is
    that of a model to be trained.

    Raises:
        TaskError: rows that give no pair or that the chat template cannot render, unless `skip_broken_rows` is true.
        ValueError: the task's chats have a system message and those of the pairs have none, or the other way round.
    """
    tools = recipe.task.config.tools if isinstance(recipe.task.config, columns.Config) else None
    form = preferences.PromptForm(not isinstance(task.prompts[0]["prompt"], str), task.system, tools)
    data = preferences.load(recipe.reward.pairs, form)
    left_out, long, pairs = list(data.left_out), [], []
    for split, name, rows in ((TRAIN, "train", data.train), (HELD_OUT, "validation", data.validation)):
        problems, where = _template_problems(tokenizer, rows), data.places[name]
        broken = [row for row, problem in enumerate(problems) if problem is not None]
        if broken and not recipe.reward.pairs.skip_broken_rows:
            raise TaskError(f"reward.pairs: {problems[broken[0]]}, in {where(broken)}")
        left_out += [f"{where([row])}: {problems[row]}" for row in broken]
        kept = [row for row, problem in enumerate(problems) if problem is None]
        kept_pairs = data_pairs(tokenizer, split, [_bare(task, rows[row]) for row in kept])
        fits = _fitting(recipe, config, tokenizer, kept_pairs)
        long += [where([row]) for row, pair in zip(kept, kept_pairs, strict=True) if not fits(pair)]
        pairs += kept_pairs
    _check_system(task, pairs)
    say_left_out("reward.pairs", left_out)
    say_left_out("reward.pairs", [f"{line}: {LONG}" for line in long])
    return pairs, [], len(left_out)


def _bare(task: Task, row: preferences.Preference) -> preferences.Preference:
    """Return a pair without the thoughts of its answers, where the task has none either."""
    if not task.strip_thoughts:
        return row
    return replace(row, chosen=without_thoughts(row.chosen), rejected=without_thoughts(row.rejected))


def _fitting(
    recipe: Recipe, config: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> Callable[[Pair], bool]:
    """Return a function that tells whether the reward model can read a pair; `config` is that of one to be trained."""
    if recipe.reward.model is None:
        return (lambda pair: True) if config is None else context_check(config, tokenizer, pairs)
    reader = ClassifierReader.of(recipe.reward.model, recipe.model, _template(recipe))
    return lambda pair: all(reader.fits(pair.prompt, text) for text in (pair.chosen, pair.rejected))


def reward_classifier(recipe: Recipe) -> tuple[str, str, str | None] | None:
    """Return the key, the path and the template of the classifier that rewards PPO; None where there is none."""
    if recipe.ppo is None or recipe.ppo.learned_reward is None:
        return None
    if not recipe.reward_is_external:
        model = recipe.reward.model
        return None if model is None else ("reward.model", model, _template(recipe))
    path = recipe.ppo.reward_model_path
    record = load_record(path) if is_reward_folder(path) else None
    if record is not None and record.kind == "adapter":
        return None
    template = _template(recipe) if record is None else _template(recipe) or record.template
    return "ppo.reward_model_path", path if record is None else record.path, template


def _template(recipe: Recipe) -> str | None:
    """Return the template of a classifier's texts that the recipe gives."""
    learned = recipe.ppo.learned_reward if recipe.ppo else None
    return learned.options.get("template") if learned else None


def check_data_pairs(recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Load the pairs of a data set once before SFT, and refuse what the reward stage would refuse after it.

    Raises:
        TaskError, ValueError: as `_from_data` and `check_pairs`.
    """
    config = config if recipe.reward.model is None else None
    pairs = _from_data(recipe, task, tokenizer, config)[0]
    check_pairs(pairs, _fitting(recipe, config, tokenizer, pairs), recipe.reward.pairs.min_margin)


def _trained_config(recipe: Recipe, base: Base) -> PretrainedConfig | None:
    """Return the configuration of the model that is trained; None for a classifier."""
    return load_config(base, recipe.model) if recipe.reward.model is None else None


def _template_problems(tokenizer: PreTrainedTokenizerBase, rows: Sequence[preferences.Preference]) -> list[str | None]:
    prompts = [row.prompt for row in rows]
    sides = [
        chat_problems(tokenizer, prompts, [getattr(row, side) for row in rows]) for side in ("chosen", "rejected")
    ]
    return [chosen or rejected for chosen, rejected in zip(*sides, strict=True)]


def _check_system(task: Task, pairs: Sequence[Pair]) -> None:
    """Refuse pairs whose chats begin otherwise than the task's: with a system message, or without one."""
    prompts = [task.prompts["prompt"][:], [pair.prompt for pair in pairs]]
    begins = [{not isinstance(p, str) and p[0]["role"] == "system" for p in side} for side in prompts]
    if begins[0].isdisjoint(begins[1]) and pairs:
        has, lacks = ("task", "pairs") if begins[0] == {True} else ("pairs", "task")
        raise ValueError(
            f"reward.pairs: the chats of the {has} begin with a system message, and those of the {lacks} have none; "
            "the reward model would learn from other prompts than PPO asks it about: set task.system, or mend the data"
        )


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
    fits = _fitting(recipe, _trained_config(recipe, base), tokenizer, pairs)
    kept, counts = check_pairs(pairs, fits, recipe.reward.pairs.min_margin)
    if recipe.reward.model is None and recipe.reward.arguments.get("load_best_model_at_end", True):
        kept, counts = split_held_out(kept, counts, recipe.seed)
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
        return load_classifier(section.model, config, _template(recipe), section.batch_size)
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
