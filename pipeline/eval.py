"""Score base, SFT, PPO and others on the test split by the same decoding, and say whether PPO beat SFT.

accelerate launch pipeline/eval.py recipes/quickstart.yaml eval.num_beams=4
python pipeline/eval.py compare runs/quickstart runs/control
"""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console

from pipeline.evaluation.assemble import all_samples, assemble_report, decoding_name, outputs_of
from pipeline.evaluation.config import CONTROL
from pipeline.evaluation.curves import read_cost, read_panels
from pipeline.evaluation.inspection import Inspection, chosen_examples, inspect_examples
from pipeline.evaluation.pages.render import Details, print_report, write_report
from pipeline.evaluation.pages.runs_pages import compare_command
from pipeline.evaluation.report import EvaluationReport, Outputs, StageCost, TestSet
from pipeline.evaluation.scoring import JudgedAnswers, Judges, Rewarded, read_judged, with_statistics, write_judged
from pipeline.evaluation.systems import Answers, Source, answer
from pipeline.metrics import load_metric
from pipeline.models.loading import load_model, load_tokenizer, plain_model_directory
from pipeline.models.reward_model import RewardNetwork, check_base
from pipeline.models.text import plain_text
from pipeline.recipe import Recipe, parse_stage_arguments
from pipeline.rewards import Handling, Reward, RewardFunction, as_completions, build_rewards, compute_rewards
from pipeline.rewards.learned import AdapterReward
from pipeline.rewards.rows import count_failures
from pipeline.runtime.distributed import on_main, part_files
from pipeline.runtime.memory import peak_memory_mib
from pipeline.runtime.messages import say
from pipeline.stages.control import control_run
from pipeline.stages.directory import RunDirectory, versions
from pipeline.stages.inputs import base_model_path, learned_reward, left_out_record, load_recipe_task, sft_model_path
from pipeline.stages.stage import run_stage
from pipeline.tasks import Task
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.objective import compute_gae, kl_penalty, spread_scores, token_rewards


def main(argv: Sequence[str]) -> int:
    """Run the stage, or `compare`; 0 when the report is written."""
    if argv and argv[0] == "compare":
        return compare_command(argv[1:])
    recipe = parse_stage_arguments(argv, __doc__)
    return run_stage(recipe, "eval", evaluate)


def evaluate(recipe: Recipe, run: RunDirectory) -> dict[str, object]:
    """Predict with every system and score, each process its share; compare and report on the main process."""
    began = time.monotonic()
    task = load_recipe_task(recipe)
    sources = system_sources(recipe, run, task)
    with part_files(run.eval / "parts") as parts:
        answers = answer_all(recipe, run, task, sources)
        judges, references = report_judges(recipe, run, task), list(task.test["references"])
        for name, found in answers.items():
            write_judged(parts, name, found, references, judges)
        parts.wait()

        def report() -> dict[str, object]:
            everything = {name: read_judged(parts, name, found) for name, found in answers.items()}
            return write(recipe, run, task, sources, everything, judges, began)

        return on_main(report)


def write(
    recipe: Recipe,
    run: RunDirectory,
    task: Task,
    sources: Sequence[Source],
    answers: Mapping[str, JudgedAnswers],
    judges: Judges,
    began: float,
) -> dict[str, object]:
    """The report on disk and on the screen; what stage.json says of it."""
    say_failures(answers, recipe.ppo)
    report, details = build_report(recipe, run, task, sources, answers, judges, began)
    write_report(report, details, run.eval)
    print_report(report, Console(stderr=True))
    return {"verdict": report.verdict, "tokens": report.cost[-1].tokens, **left_out_record(task)}


def system_sources(recipe: Recipe, run: RunDirectory, task: Task) -> list[Source]:
    """Where each system is, in the report's order; a control run stands last."""
    sft = sft_model_path(recipe, run)
    own = {"sft": Source("sft", sft), "ppo": Source("ppo", run.ppo, sft)}
    sources = []
    for system in recipe.eval.systems:
        if system == "base":
            sources.append(Source("base", base_model_path(recipe, run, task)))
        else:
            sources.append(own[system] if isinstance(system, str) else Source(system.name, system.path))
    control = control_run(recipe)
    return sources if control is None else [*sources, Source(CONTROL, control / "ppo", sft)]


def answer_all(recipe: Recipe, run: RunDirectory, task: Task, sources: Sequence[Source]) -> dict[str, Answers]:
    """This process's share of every system's answers, one system in memory beside SFT at a time."""
    sft = Source("sft", sft_model_path(recipe, run)).load(recipe.model)
    answers = {}
    for source in sources:
        if PartialState().is_main_process:
            print(f"{source.name}: writing {len(task.test)} completions", file=sys.stderr, flush=True)
        loaded = sft if source.name == "sft" else source.load(recipe.model)
        answers[source.name] = answer(source, sft, loaded, task.test, recipe.eval, recipe.seed)
    return answers


def report_judges(recipe: Recipe, run: RunDirectory, task: Task) -> Judges:
    """The metrics and rewards, a learned one included, on this process."""
    rewards = build_rewards(recipe.ppo.rewards, task.language, loaded_reward(recipe, run, task)) if recipe.ppo else []
    return Judges(
        metrics=[load_metric(m.name, task.language, **m.options) for m in recipe.eval.metrics],
        score=lambda texts: score_rows(rewards, task.test, texts, recipe.ppo),
        rewards=[reward.name for reward in rewards],
        settings=recipe.eval,
        seed=recipe.seed,
    )


def build_report(
    recipe: Recipe,
    run: RunDirectory,
    task: Task,
    sources: Sequence[Source],
    answers: Mapping[str, JudgedAnswers],
    judges: Judges,
    began: float,
) -> tuple[EvaluationReport, Details]:
    """The report, and what its pages show beside it."""
    test = TestSet([plain_text(prompt) for prompt in task.test["prompt"]], list(task.test["references"]))
    judges = replace(judges, metrics=with_statistics(judges.metrics, answers, test.references))
    outputs = outputs_of(answers, task.test, run.eval)
    costs = read_cost(run.path, ("sft", "reward", "ppo"))
    report = assemble_report(answers, outputs, test, judges, report_settings(recipe, task), costs)
    details = Details(
        samples=all_samples(test, outputs, judges.metrics[0].name),
        panels=read_panels(run.path),
        inspections=inspect(recipe, run, task, sources, outputs, report),
        num_samples=recipe.eval.num_samples,
        num_listed=recipe.eval.num_listed,
    )
    report.cost.append(eval_cost(began, outputs))
    return report, details


def loaded_reward(recipe: Recipe, run: RunDirectory, task: Task) -> RewardFunction | None:
    """The learned reward, with a network of its own; None if the recipe has none."""
    if recipe.ppo.learned_reward is None:
        return None
    base = plain_model_directory(sft_model_path(recipe, run), recipe.model, run.eval / "base")
    tokenizer = load_tokenizer(base, recipe.model)
    reward = learned_reward(recipe, run, task, tokenizer)
    if isinstance(reward, AdapterReward):
        model = load_model(base, recipe.model, frozen=True)
        check_base(reward.record, model, tokenizer, base)
        network = RewardNetwork.load(model, reward.directory).to(PartialState().device).eval()
        reward.attach(network.scores, network.language_model)
    return reward


def score_rows(rewards: Sequence[Reward], rows: Dataset, texts: Sequence, ppo: PPOConfig | None) -> Rewarded:
    """What the rewards say of predictions or texts of `rows`; nothing without rewards.

    Every text has a score here: where `ppo` does not stop at a reward that fails, it pays 0.
    """
    if not rewards:
        return Rewarded()
    rows = rows.select([text.index for text in texts])
    columns = {name: list(rows[name]) for name in rows.column_names if name not in ("prompt", "completion")}
    columns["completion_ids"] = [text.completion_ids for text in texts]
    prompts = list(rows["prompt"])
    completions = as_completions(prompts, [text.completion for text in texts])
    scores = compute_rewards(rewards, prompts, completions, columns, handling(ppo))
    parts = {name: values.tolist() for name, values in scores.parts.items()}
    return Rewarded(scores.total.tolist(), parts, scores.failures)


def handling(ppo: PPOConfig) -> Handling:
    """What a reward that fails costs the report: all of it, or nothing but its own part."""
    return Handling("stop" if ppo.on_reward_error == "stop" else "zero", ppo.reward_timeout)


def say_failures(answers: Mapping[str, JudgedAnswers], ppo: PPOConfig | None) -> None:
    """How often rewards failed, wherever that was."""
    failures = [
        judged.failure
        for found in answers.values()
        for texts in found.every_kind
        for judged in texts
        if judged.failure is not None
    ]
    if failures:
        say(f"eval: {count_failures(failures, handling(ppo).on_error)}")


def inspect(
    recipe: Recipe,
    run: RunDirectory,
    task: Task,
    sources: Sequence[Source],
    outputs: Mapping[str, Outputs],
    report: EvaluationReport,
) -> list[Inspection]:
    """The examples with the largest gain and loss and typical ones, token by token under SFT and PPO."""
    chosen = chosen_examples(report.gains, recipe.eval.num_inspected)
    if not chosen:
        return []
    by_name = {source.name: source for source in sources}
    (sft, tokenizer), (ppo, _) = (by_name[name].load(recipe.model) for name in ("sft", "ppo"))
    written = tuple([p.completion_ids for p in outputs[name].predictions] for name in ("sft", "ppo"))
    scores = outputs["ppo"].scores

    def advantages(index: int, values: torch.Tensor, *logprobs: torch.Tensor) -> list[float]:
        return token_advantages(recipe, scores[index], values, *logprobs)

    head = run.ppo / "value_head.safetensors"
    return inspect_examples((sft, ppo), tokenizer, task.test, chosen, written, head, advantages)


def token_advantages(
    recipe: Recipe, score: float, values: torch.Tensor, logprobs: torch.Tensor, sft_logprobs: torch.Tensor
) -> list[float]:
    """The advantage of each token [C] of one completion, as PPO computes it; `logprobs` are [1, C]."""
    ppo, mask = recipe.ppo, torch.ones_like(logprobs, dtype=torch.bool)
    kl = kl_penalty(logprobs, sft_logprobs, ppo.kl_estimator)
    rewards = token_rewards(spread_scores(torch.tensor([score]), mask), kl, mask, ppo.kl_coef)
    return compute_gae(rewards, values.unsqueeze(0), mask, ppo.gamma, ppo.lam)[0][0].tolist()


def eval_cost(began: float, outputs: Mapping[str, Outputs]) -> StageCost:
    """What this stage has taken when its report is written; tokens are those of the completions."""
    seconds = round(time.monotonic() - began, 3)
    tokens = sum(len(p.completion_ids) for found in outputs.values() for p in found.predictions)
    processes = PartialState().num_processes
    return StageCost("eval", seconds, processes, None, None, tokens, tokens / seconds, peak_memory_mib())


def report_settings(recipe: Recipe, task: Task) -> dict[str, object]:
    """What the figures depend on."""
    control = control_run(recipe)
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "test_examples": len(task.test),
        **({"rows_left_out": len(task.left_out)} if task.left_out else {}),
        "decoding": decoding_name(recipe.eval.num_beams),
        "max_new_tokens": recipe.eval.max_new_tokens,
        "n_bootstrap": recipe.eval.n_bootstrap,
        "confidence": recipe.eval.confidence,
        "metrics": [{"name": m.name, "options": dict(m.options)} for m in recipe.eval.metrics],
        "language": task.language,
        "rewards": [f"{r.name} x {r.weight:g}" for r in recipe.ppo.rewards] if recipe.ppo else [],
        "control": None if control is None else control.name,
        "versions": versions(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
