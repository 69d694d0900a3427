"""Score base, SFT and PPO on the test split by the same decoding, and say whether PPO beat SFT.

accelerate launch pipeline/eval.py recipes/quickstart.yaml eval.num_beams=4
"""

import importlib.metadata
import sys
from collections.abc import Sequence

from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation.predictions import Prediction, predict, save_predictions
from pipeline.evaluation.report import (
    EvaluationReport,
    compare_systems,
    find_warnings,
    print_report,
    score_system,
    verdict,
    write_report,
)
from pipeline.metrics import load_metric
from pipeline.models.generation import Decoding
from pipeline.models.loading import load_model, load_policy, load_tokenizer
from pipeline.recipe import Recipe, parse_stage_arguments
from pipeline.rewards import Reward, as_completions, build_rewards, combine, score_all
from pipeline.run_directory import RunDirectory
from pipeline.stage import base_model_path, run_stage, sft_model_path
from pipeline.tasks import Task, load_task


def main(argv: Sequence[str]) -> int:
    """Run the stage; 0 when the report is written."""
    recipe = parse_stage_arguments(argv, __doc__)
    return run_stage(recipe, "eval", evaluate)


def evaluate(recipe: Recipe, run: RunDirectory) -> dict[str, object]:
    """Predict with every system, then score, compare and report on the main process."""
    task = load_task(recipe.task.name, recipe.task.config)
    predictions = {name: predict_system(recipe, run, task, name) for name in recipe.eval.systems}
    if not PartialState().is_main_process:
        return {}
    report, samples = build_report(recipe, run, task, predictions)
    write_report(report, samples, run.eval)
    print_report(report, Console(stderr=True))
    return {"verdict": report.verdict}


def predict_system(recipe: Recipe, run: RunDirectory, task: Task, name: str) -> list[Prediction]:
    """Every process answers its share of the test prompts; all get all answers, in order."""
    state = PartialState()
    if state.is_main_process:
        print(f"{name}: writing {len(task.test)} completions", file=sys.stderr, flush=True)
    sft = load_model(sft_model_path(recipe, run), recipe.model).to(state.device).eval()
    model, tokenizer = load_system(recipe, run, task, name, sft)
    share = list(range(state.process_index, len(task.test), state.num_processes))
    decoding = Decoding(recipe.eval.max_new_tokens or recipe.ppo.response_length, num_beams=recipe.eval.num_beams)
    found = predict(
        model.to(state.device).eval(),
        tokenizer,
        task.test,
        share,
        decoding,
        recipe.eval.per_device_eval_batch_size,
        sft,
    )
    return sorted(gather_object(found), key=lambda prediction: prediction.index)


def load_system(
    recipe: Recipe, run: RunDirectory, task: Task, name: str, sft: PreTrainedModel
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a system."""
    if name == "base":
        path = base_model_path(recipe, run, task)
        return load_model(path, recipe.model), load_tokenizer(path, recipe.model)
    path = sft_model_path(recipe, run)
    tokenizer = load_tokenizer(path, recipe.model)
    return (sft if name == "sft" else load_policy(run.ppo, path, recipe.model)), tokenizer


def score_texts(
    rewards: Sequence[Reward], task: Task, predictions: Sequence[Prediction]
) -> tuple[list[float], dict[str, list[float]]]:
    """The weighted reward of each prediction, and each part of it by name."""
    rows = task.test
    columns = {name: list(rows[name]) for name in rows.column_names if name not in ("prompt", "completion")}
    columns["completion_ids"] = [prediction.completion_ids for prediction in predictions]
    prompts = list(rows["prompt"])
    completions = as_completions(prompts, [prediction.completion for prediction in predictions])
    parts = score_all(rewards, prompts, completions, columns)
    return combine(rewards, parts).tolist(), {name: values.tolist() for name, values in parts.items()}


def build_report(
    recipe: Recipe, run: RunDirectory, task: Task, predictions: dict[str, list[Prediction]]
) -> tuple[EvaluationReport, list[dict[str, str]]]:
    """Scores, comparisons and side-by-side samples; predictions go to their files."""
    settings = recipe.eval
    metrics = [load_metric(m.name, task.language, **m.options) for m in settings.metrics]
    rewards = build_rewards(recipe.ppo.rewards, task.language) if recipe.ppo else []
    references = list(task.test["references"])
    systems, scores = {}, {}
    for name, items in predictions.items():
        scores[name], parts = score_texts(rewards, task, items) if rewards else ([], {})
        file = run.eval / "predictions" / f"{name}.jsonl"
        save_predictions(file, items, task.test, parts, scores[name])
        relative = file.relative_to(run.eval).as_posix()
        systems[name] = score_system(
            items,
            references,
            metrics,
            scores[name],
            parts,
            relative,
            settings.n_bootstrap,
            settings.confidence,
            recipe.seed,
        )
    comparisons = []
    for a, b in (("base", "sft"), ("sft", "ppo")):
        if a in systems and b in systems:
            comparisons += compare_systems(
                a, b, predictions, references, metrics, scores, settings.n_bootstrap, recipe.seed
            )
    warnings = find_warnings(predictions, comparisons)
    result = verdict(comparisons, metrics[0])
    report = EvaluationReport(systems, comparisons, result, warnings, report_settings(recipe, task))
    count = min(settings.num_samples, len(task.test))
    samples = [sample(task, predictions, len(task.test) * number // count) for number in range(count)]
    return report, samples


def sample(task: Task, predictions: dict[str, list[Prediction]], row: int) -> dict[str, str]:
    """One test example with every system's answer."""
    prompt = task.test[row]["prompt"]
    texts = {name: items[row].completion for name, items in predictions.items()}
    shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return {"prompt": shown, "reference": task.test[row]["references"][0], **texts}


def report_settings(recipe: Recipe, task: Task) -> dict[str, object]:
    """What the figures depend on."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "sacrebleu", "trl-relay")
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "test_examples": len(task.test),
        "decoding": "greedy" if recipe.eval.num_beams == 1 else f"beam search, {recipe.eval.num_beams} beams",
        "max_new_tokens": recipe.eval.max_new_tokens or recipe.ppo.response_length,
        "n_bootstrap": recipe.eval.n_bootstrap,
        "confidence": recipe.eval.confidence,
        "rewards": [f"{r.name} x {r.weight:g}" for r in recipe.ppo.rewards] if recipe.ppo else [],
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
