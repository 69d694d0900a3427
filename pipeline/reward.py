"""A learned reward on TRL's RewardTrainer: an adapter and a head over the SFT model, from pairs, with a report.

accelerate launch pipeline/reward.py recipes/quickstart_reward_model.yaml reward.num_train_epochs=2
"""

import pipeline.supported  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from torch import Tensor

from pipeline.evaluation.reward_pages import print_reward_report, write_reward_report
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
from pipeline.models.text import encode_completions, encode_prompts
from pipeline.recipe import Recipe, parse_stage_arguments
from pipeline.rewards.classifier import ClassifierReward
from pipeline.rewards.learned import calibration, score_tokens
from pipeline.rewards.pair_settings import SampledPairs
from pipeline.rewards.pairs import BROKEN, HELD_OUT, TRAIN, Pair, check_pairs, read_lines, scaled_margins, write_lines
from pipeline.rewards.sampled import Sample, data_pairs, sample_pairs
from pipeline.run_directory import RunDirectory, versions
from pipeline.stage import left_out_record, load_recipe_task, plain_text, run_stage, say, say_left_out, sft_model_path
from pipeline.tasks import Task, preferences
from pipeline.trainers.reward import build_reward_trainer, reward_arguments
from pipeline.trainers.sft import last_checkpoint
from pipeline.trainers.stopping import stop_signals

DECODER_PREFIX = 2  # start token and language code
SHOWN_PAIRS, TRAINING_PAIRS, REFERENCES = 20, 1000, 1000  # in the report; of the training pairs and references, scored

# (prompts, texts, their token ids) -> raw scores [N]
Judge = Callable[[list, Sequence[str], Sequence[Sequence[int]]], Tensor]


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
    if PartialState().is_main_process:
        report = report_on(recipe, run, task, record, judge, pairs, samples)
        print_reward_report(report, Console(stderr=True))
        summary |= left_out_record(task) | {"verdict": report.verdict, "held_out_accuracy": report.accuracy.value}
    return summary


def collected_pairs(
    recipe: Recipe, run: RunDirectory, task: Task, base: Path | str
) -> tuple[list[Pair], list[Sample]]:
    """The pairs and the held-out samples, written to the stage's directory once and read back by a restart."""
    files = {name: run.reward / name for name in ("pairs.jsonl", "samples.jsonl", "pairs.json")}
    missing = not files["pairs.json"].is_file()
    PartialState().wait_for_everyone()  # every process looks before the main one writes
    if missing:
        tokenizer = load_tokenizer(base, recipe.model)
        source, broken = recipe.reward.pairs, 0
        if isinstance(source, SampledPairs):
            found, samples = sampled(recipe, task, base)
        else:
            data = preferences.load(source)
            say_left_out("reward.pairs", data.left_out)
            found = [
                *data_pairs(tokenizer, TRAIN, data.train),
                *data_pairs(tokenizer, HELD_OUT, data.validation),
            ]
            samples, broken = [], len(data.left_out)
        pairs, counts = check_pairs(found, fitting(recipe, base, found), source.min_margin)
        if broken:
            counts = replace(counts, found=counts.found + broken, dropped={**counts.dropped, BROKEN: broken})
        if PartialState().is_main_process:
            write_lines(pairs, files["pairs.jsonl"])
            write_lines(samples, files["samples.jsonl"])
            files["pairs.json"].write_text(json.dumps(asdict(counts), indent=2) + "\n", encoding="utf-8")
        say(*counts.sentences())
        PartialState().wait_for_everyone()
    return read_lines(Pair, files["pairs.jsonl"]), read_lines(Sample, files["samples.jsonl"])


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


def sampled(recipe: Recipe, task: Task, base: Path | str) -> tuple[list[Pair], list[Sample]]:
    """Pairs of training prompts and of held-out ones, and the samples of the latter."""
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
        more, samples = sample_pairs(model, tokenizer, rows, split, settings, metric, recipe.seed)
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
        return score_tokens(encode_prompts(tokenizer, prompts, seq2seq), ids, tokenizer, network.scores, device, size)

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


def report_on(
    recipe: Recipe,
    run: RunDirectory,
    task: Task,
    record: RewardRecord,
    judge: Judge,
    pairs: Sequence[Pair],
    samples: Sequence[Sample],
) -> RewardReport:
    """Score held-out pairs, texts and references; write the report, and the record with its figures."""
    chosen_from = random.Random(recipe.seed)
    training = [pair for pair in pairs if pair.split == TRAIN]
    training = chosen_from.sample(training, min(TRAINING_PAIRS, len(training)))
    held_out = [pair for pair in pairs if pair.split == HELD_OUT]
    judged, known = judged_pairs(recipe, task, judge, held_out), judged_pairs(recipe, task, judge, training)
    texts = judged_texts(recipe, task, judge, held_out, samples)
    scores = torch.tensor([text.score for text in texts])
    figures = calibration(scores, reference_scores(recipe, task, judge))
    counts = json.loads((run.reward / "pairs.json").read_text(encoding="utf-8"))
    settings = {
        "name": recipe.name,
        "seed": recipe.seed,
        "model": record.path,
        "kind": record.kind,
        "min_accuracy": recipe.reward.min_accuracy,
        "versions": versions(),
    }
    report = judge_reward(judged, known, texts, figures, recipe.reward.min_accuracy, counts, settings)
    shown = [
        [plain_text(p.prompt), p.chosen, p.rejected, *(f"{(s - figures[0]) / figures[1]:+.2f}" for s in both)]
        for p, both in zip(held_out, ((j.chosen_score, j.rejected_score) for j in judged), strict=True)
    ][:SHOWN_PAIRS]
    write_reward_report(report, judged, shown, run.reward, f"Reward model of {recipe.name}")
    shift, scale = figures
    replace(record, shift=shift, scale=scale, accuracy=report.accuracy.value, held_out_pairs=len(judged)).save(
        run.reward
    )
    return report


def judged_pairs(recipe: Recipe, task: Task, judge: Judge, pairs: Sequence[Pair]) -> list[JudgedPair]:
    """Pairs with their raw scores and what the trivial rules look at."""
    prompts = [pair.prompt for pair in pairs]
    chosen = judge(prompts, [p.chosen for p in pairs], [p.chosen_ids for p in pairs]).tolist()
    rejected = judge(prompts, [p.rejected for p in pairs], [p.rejected_ids for p in pairs]).tolist()
    metric = load_metric(recipe.eval.metrics[0].name, task.language, **recipe.eval.metrics[0].options)
    agreement: list[dict[str, tuple[float, float]]] = [{}] * len(pairs)
    if isinstance(recipe.reward.pairs, preferences.Config):  # among samples the reference would be one of the texts
        agreement = consensus([(pair.row, pair.chosen, pair.rejected) for pair in pairs], metric)
    return [
        JudgedPair(a, b, len(pair.chosen), len(pair.rejected), others)
        for pair, a, b, others in zip(pairs, chosen, rejected, agreement, strict=True)
    ]


def judged_texts(
    recipe: Recipe, task: Task, judge: Judge, pairs: Sequence[Pair], samples: Sequence[Sample]
) -> list[JudgedText]:
    """Held-out texts with their scores: the samples, by every metric of the task; without any, those of the pairs."""
    if not samples:
        both = [
            (p, text, ids) for p in pairs for text, ids in ((p.chosen, p.chosen_ids), (p.rejected, p.rejected_ids))
        ]
        distinct = {(p.row, text): (p.prompt, text, ids) for p, text, ids in both}
        prompts, texts, tokens = (list(column) for column in zip(*distinct.values(), strict=True))
        scores = judge(prompts, texts, tokens).tolist()
        rows = [row for row, _ in distinct]
        return [JudgedText(*values, {}) for values in zip(rows, scores, map(len, tokens), strict=True)]
    rows: Dataset = task.validation.select([sample.row for sample in samples])
    texts, tokens = [sample.text for sample in samples], [sample.ids for sample in samples]
    scores = judge(list(rows["prompt"]), texts, tokens).tolist()
    metrics = [load_metric(m.name, task.language, **m.options) for m in recipe.eval.metrics]
    values = {metric.name: metric.sample_scores(texts, list(rows["references"])) for metric in metrics}
    return [
        JudgedText(sample.row, scores[i], len(sample.ids), {name: found[i] for name, found in values.items()})
        for i, sample in enumerate(samples)
    ]


def reference_scores(recipe: Recipe, task: Task, judge: Judge) -> Tensor:
    """Raw scores of the validation split's first references."""
    rows = task.validation.select(range(min(REFERENCES, len(task.validation))))
    prompts, texts = list(rows["prompt"]), [references[0] for references in rows["references"]]
    tokenizer = load_tokenizer(recipe_base(recipe), recipe.model)
    return judge(prompts, texts, encode_completions(tokenizer, prompts, texts))


def recipe_base(recipe: Recipe) -> Path | str:
    """Where the tokenizer of the SFT model is."""
    return sft_model_path(recipe, RunDirectory.of(recipe))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
