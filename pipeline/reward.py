"""A learned reward on TRL's RewardTrainer: an adapter and a head over the SFT model, from pairs, with a report.

accelerate launch pipeline/reward.py recipes/quickstart_reward_model.yaml reward.num_train_epochs=2
"""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from torch import Tensor

from pipeline.evaluation.pages.reward_pages import print_reward_report, write_reward_report
from pipeline.evaluation.reward_quality import JudgedPair, JudgedText, RewardReport, consensus, judge_reward
from pipeline.metrics import load_metric
from pipeline.models.loading import (
    load_config,
    load_model,
    load_tokenizer,
    lora_config,
    plain_model_directory,
    position_limit,
)
from pipeline.models.reward_model import RewardNetwork, RewardRecord, tokenizer_digest, weights_digest
from pipeline.models.text import encode_completions, encode_prompts, plain_text
from pipeline.recipe import Recipe, parse_stage_arguments
from pipeline.rewards.classifier import ClassifierReward
from pipeline.rewards.learned import calibration, score_token_ids
from pipeline.rewards.pairs import BROKEN, HELD_OUT, TRAIN, Pair, check_pairs, read_lines, scaled_margins, write_lines
from pipeline.rewards.pairs.collect import Sample, data_pairs, sample_pairs
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.rewards.shared_judge import Judge, SharedJudge
from pipeline.runtime.distributed import Parts, on_main, part_files
from pipeline.runtime.messages import say
from pipeline.runtime.signals import stop_signals
from pipeline.stages.directory import RunDirectory, versions
from pipeline.stages.inputs import left_out_record, load_recipe_task, say_left_out, sft_model_path
from pipeline.stages.stage import run_stage
from pipeline.tasks import Task, preferences
from pipeline.trainers.huggingface.reward import build_reward_trainer, reward_arguments
from pipeline.trainers.huggingface.sft import last_checkpoint

DECODER_PREFIX = 2  # start token and language code
METRIC_BLOCK = 64  # texts that metrics score at once
SHOWN_PAIRS, TRAINING_PAIRS, REFERENCES = 20, 1000, 1000  # in the report; of the training pairs and references, scored


def main(argv: Sequence[str]) -> int:
    """Run the stage; 0 when its artefact and its report are complete."""
    recipe = parse_stage_arguments(argv, __doc__)
    return run_stage(recipe, "reward", train)


def train(recipe: Recipe, run: RunDirectory) -> dict[str, object]:
    """Collect the pairs, train on them or judge a classifier, report, and save what PPO needs."""
    task = load_recipe_task(recipe)
    base = plain_model_directory(sft_model_path(recipe, run), recipe.model, run.reward / "base")
    pairs, samples = collected_pairs(recipe, run, task, base)
    trained = recipe.reward.model is None
    record, judge, summary = train_adapter(recipe, run, base, pairs) if trained else judge_classifier(recipe)
    with part_files(run.reward / "parts") as parts:
        said = judge_everything(recipe, task, SharedJudge(judge, parts, recipe.reward.batch_size), pairs, samples)

        def report() -> dict[str, object]:
            found = report_on(recipe, run, record, said)
            print_reward_report(found, Console(stderr=True))
            return {"verdict": found.verdict, "held_out_accuracy": found.accuracy.value}

        return summary | left_out_record(task) | on_main(report)


def collected_pairs(
    recipe: Recipe, run: RunDirectory, task: Task, base: Path | str
) -> tuple[list[Pair], list[Sample]]:
    """The pairs and the held-out samples, written to the stage's directory once and read back by a restart."""
    missing = on_main(lambda: not (run.reward / "pairs.json").is_file())
    if missing and isinstance(recipe.reward.pairs, SampledPairs):
        with part_files(run.reward / "parts") as parts:
            found, samples = sampled(recipe, task, base, parts)
            on_main(lambda: keep_pairs(recipe, run, base, found, samples))
    elif missing:
        on_main(lambda: keep_pairs(recipe, run, base, *preference_pairs(recipe, base)))
    return read_lines(Pair, run.reward / "pairs.jsonl"), read_lines(Sample, run.reward / "samples.jsonl")


def preference_pairs(recipe: Recipe, base: Path | str) -> tuple[list[Pair], list[Sample], int]:
    """The pairs of a data set, without samples, and how many of its rows are broken."""
    data = preferences.load(recipe.reward.pairs)
    say_left_out("reward.pairs", data.left_out)
    tokenizer = load_tokenizer(base, recipe.model)
    sides = ((TRAIN, data.train), (HELD_OUT, data.validation))
    return [p for split, rows in sides for p in data_pairs(tokenizer, split, rows)], [], len(data.left_out)


def keep_pairs(
    recipe: Recipe,
    run: RunDirectory,
    base: Path | str,
    found: Sequence[Pair],
    samples: Sequence[Sample],
    broken: int = 0,
) -> None:
    """Write the pairs that can be learnt from, the samples and, last, the counts."""
    pairs, counts = check_pairs(found, fitting(recipe, base, found), recipe.reward.pairs.min_margin)
    if broken:
        counts = replace(counts, found=counts.found + broken, dropped={**counts.dropped, BROKEN: broken})
    write_lines(pairs, run.reward / "pairs.jsonl")
    write_lines(samples, run.reward / "samples.jsonl")
    (run.reward / "pairs.json").write_text(json.dumps(asdict(counts), indent=2) + "\n", encoding="utf-8")
    say(*counts.sentences())


def fitting(recipe: Recipe, base: Path | str, pairs: Sequence[Pair]) -> Callable[[Pair], bool]:
    """Whether the model can read a pair's texts; a classifier looks at that itself."""
    config, tokenizer = load_config(base, recipe.model), load_tokenizer(base, recipe.model)
    limit = None if recipe.reward.model else position_limit(config)
    prompts = {plain_text(pair.prompt): pair.prompt for pair in pairs}
    encoded = encode_prompts(tokenizer, list(prompts.values()), config.is_encoder_decoder)
    lengths = dict(zip(prompts, map(len, encoded), strict=True))

    def fits(pair: Pair) -> bool:
        prompt = lengths[plain_text(pair.prompt)]
        text = max(len(pair.chosen_ids), len(pair.rejected_ids))
        # The two sides of an encoder-decoder have positions of their own, and the decoder is given a token or two.
        needed = max(prompt, text + DECODER_PREFIX) if config.is_encoder_decoder else prompt + text
        return limit is None or needed <= limit

    return fits


def sampled(recipe: Recipe, task: Task, base: Path | str, parts: Parts) -> tuple[list[Pair], list[Sample]]:
    """Pairs of training prompts and of held-out ones, and the samples of the latter, on the main process."""
    settings = recipe.reward.pairs
    model = load_model(base, recipe.model).to(PartialState().device).eval()
    tokenizer = load_tokenizer(base, recipe.model)
    metric = load_metric(settings.metric, task.language)
    pairs, samples = [], []
    for split, rows, count in (
        (TRAIN, task.prompts, settings.prompts),
        (HELD_OUT, task.validation, settings.held_out_prompts),
    ):
        rows = rows.select(range(min(count or len(rows), len(rows))))
        say(f"reward: {settings.samples} samples for each of {len(rows)} {split.replace('_', '-')} prompts")
        more, samples = sample_pairs(model, tokenizer, rows, split, settings, metric, recipe.seed, parts)
        pairs += more
    return pairs, samples


def train_adapter(
    recipe: Recipe, run: RunDirectory, base: Path | str, pairs: Sequence[Pair]
) -> tuple[RewardRecord, Judge, dict[str, object]]:
    """The adapter and the head, saved; its record without figures; how it scores texts."""
    model, tokenizer = load_model(base, recipe.model, frozen=True), load_tokenizer(base, recipe.model)
    digests = {"base_digest": weights_digest(model), "tokenizer_digest": tokenizer_digest(tokenizer)}
    arguments = reward_arguments(recipe.reward.arguments, run.reward, recipe.seed)
    trainer = build_reward_trainer(
        model,
        arguments,
        tokenizer,
        scaled_margins(pairs, recipe.reward.margin_weight),
        lora_config(recipe.model),
        run.reward / "metrics.jsonl",
    )
    with stop_signals():
        result = trainer.train(resume_from_checkpoint=last_checkpoint(arguments))
    network: RewardNetwork = trainer.accelerator.unwrap_model(trainer.model).eval()
    if trainer.is_world_process_zero():
        network.save_pretrained(run.reward)
        tokenizer.save_pretrained(run.reward)
    trainer.accelerator.wait_for_everyone()
    device, size, seq2seq = trainer.accelerator.device, recipe.reward.batch_size, model.config.is_encoder_decoder

    def judge(prompts: list, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Tensor:
        return score_token_ids(
            encode_prompts(tokenizer, prompts, seq2seq), ids, tokenizer, network.scores, device, size
        )

    summary = {"train_loss": result.training_loss, "steps": trainer.state.global_step}
    summary["mixed_precision"] = trainer.accelerator.mixed_precision
    return RewardRecord("adapter", str(base), 0.0, 1.0, None, 0, **digests), judge, summary


def judge_classifier(recipe: Recipe) -> tuple[RewardRecord, Judge, dict[str, object]]:
    """A classifier as it is: its record without figures, and how it scores texts."""
    learned = recipe.ppo.learned_reward if recipe.ppo else None
    path, template = recipe.reward.model, learned.options.get("template") if learned else None
    classifier = ClassifierReward(path, recipe.model, template, recipe.reward.batch_size).to(PartialState().device)

    def judge(prompts: list, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Tensor:
        return classifier.raw_scores(prompts, texts)

    return RewardRecord("classifier", path, 0.0, 1.0, None, 0, template=template), judge, {}


@dataclass(frozen=True)
class Said:
    """All that the report needs, on the main process: held-out pairs with what was said of them, some of the training
    pairs, held-out texts, and the raw scores of references."""

    held_out: list[Pair]
    judged: list[JudgedPair]
    known: list[JudgedPair]
    texts: list[JudgedText]
    references: Tensor


def judge_everything(
    recipe: Recipe, task: Task, judge: SharedJudge, pairs: Sequence[Pair], samples: Sequence[Sample]
) -> Said:
    """Score held-out pairs, texts and references; every process its share, and the main one has all."""
    chosen_from = random.Random(recipe.seed)
    training = [pair for pair in pairs if pair.split == TRAIN]
    training = chosen_from.sample(training, min(TRAINING_PAIRS, len(training)))
    held_out = [pair for pair in pairs if pair.split == HELD_OUT]
    return Said(
        held_out,
        judged_pairs(recipe, task, judge, held_out, HELD_OUT),
        judged_pairs(recipe, task, judge, training, TRAIN),
        judged_texts(recipe, task, judge, held_out, samples),
        reference_scores(recipe, task, judge),
    )


def report_on(recipe: Recipe, run: RunDirectory, record: RewardRecord, said: Said) -> RewardReport:
    """Write the report, and the record with its figures."""
    figures = calibration(torch.tensor([text.score for text in said.texts]), said.references)
    counts = json.loads((run.reward / "pairs.json").read_text(encoding="utf-8"))
    settings = {
        "name": recipe.name,
        "seed": recipe.seed,
        "model": record.path,
        "kind": record.kind,
        "min_accuracy": recipe.reward.min_accuracy,
        "versions": versions(),
    }
    report = judge_reward(said.judged, said.known, said.texts, figures, recipe.reward.min_accuracy, counts, settings)
    shown = [
        [plain_text(p.prompt), p.chosen, p.rejected, *(f"{(s - figures[0]) / figures[1]:+.2f}" for s in both)]
        for p, both in zip(said.held_out, ((j.chosen_score, j.rejected_score) for j in said.judged), strict=True)
    ][:SHOWN_PAIRS]
    write_reward_report(report, said.judged, shown, run.reward, f"Reward model of {recipe.name}")
    shift, scale = figures
    replace(record, shift=shift, scale=scale, accuracy=report.accuracy.value, held_out_pairs=len(said.judged)).save(
        run.reward
    )
    return report


def judged_pairs(recipe: Recipe, task: Task, judge: SharedJudge, pairs: Sequence[Pair], name: str) -> list[JudgedPair]:
    """Pairs with their raw scores and what the trivial rules look at, on the main process."""
    prompts = [pair.prompt for pair in pairs]
    chosen = judge.scores(f"{name}/chosen", prompts, [p.chosen for p in pairs], [p.chosen_ids for p in pairs])
    rejected = judge.scores(f"{name}/rejected", prompts, [p.rejected for p in pairs], [p.rejected_ids for p in pairs])
    metric = load_metric(recipe.eval.metrics[0].name, task.language, **recipe.eval.metrics[0].options)
    agreement: list[dict[str, tuple[float, float]]] = [{}] * len(pairs)
    if isinstance(recipe.reward.pairs, preferences.Config):  # among samples the reference would be one of the texts
        by_prompt: dict[int, list[int]] = {}
        for number, pair in enumerate(pairs):
            by_prompt.setdefault(pair.row, []).append(number)

        def agree(rows: Sequence[int]) -> list[dict[str, tuple[float, float]]]:
            return consensus([(pairs[r].row, pairs[r].chosen, pairs[r].rejected) for r in rows], metric)

        agreement = judge.parts.shared_out(f"{name}/consensus", list(by_prompt.values()), agree)
    if not judge.parts.is_read_here:
        return []
    return [
        JudgedPair(a, b, len(pair.chosen), len(pair.rejected), others)
        for pair, a, b, others in zip(pairs, chosen.tolist(), rejected.tolist(), agreement, strict=True)
    ]


def judged_texts(
    recipe: Recipe, task: Task, judge: SharedJudge, pairs: Sequence[Pair], samples: Sequence[Sample]
) -> list[JudgedText]:
    """Held-out texts with their scores, on the main process: the samples, by every metric of the task; without any,
    those of the pairs."""
    if not samples:
        both = [
            (p, text, ids) for p in pairs for text, ids in ((p.chosen, p.chosen_ids), (p.rejected, p.rejected_ids))
        ]
        distinct = {(p.row, text): (p.prompt, text, ids) for p, text, ids in both}
        prompts, texts, tokens = (list(column) for column in zip(*distinct.values(), strict=True))
        scores = judge.scores("texts", prompts, texts, tokens).tolist()
        numbers = [row for row, _ in distinct]
        if not judge.parts.is_read_here:
            return []
        return [JudgedText(*values, {}) for values in zip(numbers, scores, map(len, tokens), strict=True)]
    rows: Dataset = task.validation.select([sample.row for sample in samples])
    references = list(rows["references"])
    texts, tokens = [sample.text for sample in samples], [sample.ids for sample in samples]
    scores = judge.scores("texts", list(rows["prompt"]), texts, tokens).tolist()
    metrics = [load_metric(m.name, task.language, **m.options) for m in recipe.eval.metrics]

    def work(block: Sequence[int]) -> list[dict[str, float]]:
        some = [texts[i] for i in block], [references[i] for i in block]
        values = {metric.name: metric.sample_scores(*some) for metric in metrics}
        return [{name: found[i] for name, found in values.items()} for i in range(len(block))]

    blocks = [range(i, min(i + METRIC_BLOCK, len(texts))) for i in range(0, len(texts), METRIC_BLOCK)]
    values = judge.parts.shared_out("metrics", blocks, work)
    if not judge.parts.is_read_here:
        return []
    return [
        JudgedText(sample.row, score, len(sample.ids), found)
        for sample, score, found in zip(samples, scores, values, strict=True)
    ]


def reference_scores(recipe: Recipe, task: Task, judge: SharedJudge) -> Tensor:
    """Raw scores of the validation split's first references, on the main process."""
    rows = task.validation.select(range(min(REFERENCES, len(task.validation))))
    prompts, texts = list(rows["prompt"]), [references[0] for references in rows["references"]]
    tokenizer = load_tokenizer(recipe_base(recipe), recipe.model)
    return judge.scores("references", prompts, texts, encode_completions(tokenizer, prompts, texts))


def recipe_base(recipe: Recipe) -> Path | str:
    """Where the tokenizer of the SFT model is."""
    return sft_model_path(recipe, RunDirectory.of(recipe))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
