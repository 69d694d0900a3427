"""The control: PPO without a signal, from this run's own stage or from another run, shown in the report.

A control with `ppo.shuffle_scores` is this run in everything but the signal. One with a constant reward is not: with
`group_baseline` its scores are 0 by construction, and without it whitening raises the error of the value function.
"""

import re
from dataclasses import replace
from pathlib import Path

from pipeline.evaluation.config import AUTO, CONSTANT, CONTROL, SHUFFLED
from pipeline.recipe import Recipe
from pipeline.stages.digests import directory_state
from pipeline.stages.directory import FINISHED, RunDirectory, read_record
from pipeline.trainers.ppo.config import PPOConfig


def ppo_arguments(recipe: Recipe, stage: str) -> PPOConfig:
    """Return the settings of the ppo stage, or of the control stage: the same with shuffled scores."""
    return replace(recipe.ppo, shuffle_scores=True) if stage == CONTROL else recipe.ppo


def control_policy(recipe: Recipe) -> Path | None:
    """Return the directory of the control's policy: of this run's control stage, or of another run; None for none."""
    if recipe.control:
        return RunDirectory.of(recipe).control if "ppo" in recipe.eval.systems else None
    run = control_run(recipe)
    return None if run is None else run / "ppo"


def control_run(recipe: Recipe) -> Path | None:
    """Return the run directory of another run's control: the one that `eval.control` names, or one next to this run.

    `auto` picks a finished run next to this one that started from this run's SFT model, with shuffled scores of the
    same rewards or with `constant` as its only reward; it prefers shuffled scores, then the same seed, then the most
    recent. A run that is a control itself, or makes its own, gets none.
    """
    chosen = recipe.eval.control
    if chosen is None or recipe.ppo is None or recipe.control or "ppo" not in recipe.eval.systems:
        return None
    if chosen != AUTO:
        return Path(chosen).expanduser()
    if recipe.ppo.shuffle_scores:
        return None
    this_run, preference = RunDirectory.of(recipe).path, {}
    for file in sorted(this_run.parent.glob(f"*/ppo/{FINISHED}")):
        record, run = read_record(file), file.parent.parent
        settings, kind = record.get("settings", {}), control_kind(run / "ppo")
        same_rewards = _reward_names(run / "ppo") == [reward.name for reward in recipe.ppo.rewards]
        matches = kind == CONSTANT or (kind == SHUFFLED and same_rewards)
        if run != this_run and matches and control_problem(recipe, run) is None:
            same_seed = settings.get("seed") == recipe.seed
            preference[run] = (kind == SHUFFLED, same_seed, str(record.get("finished_at")))
    return max(preference, key=preference.get, default=None)


def control_kind(policy: Path) -> str:
    """Return what PPO was rewarded by in a control, in words; a control that is named may have any reward."""
    if read_record(policy / FINISHED).get("settings", {}).get("ppo.shuffle_scores"):
        return SHUFFLED
    return CONSTANT if set(_reward_names(policy)) == {"constant"} else "another reward"


def _reward_names(policy: Path) -> list[str]:
    settings = read_record(policy / FINISHED).get("settings", {})
    return [value for key, value in settings.items() if re.fullmatch(r"ppo\.rewards\.\d+\.name", key)]


def control_problem(recipe: Recipe, run: Path) -> str | None:
    """Return why a run is no control of this recipe, or None if it is one."""
    record = read_record(run / "ppo" / FINISHED)
    if not record:
        return "is no run directory with a finished ppo stage; run the control first, or set eval.control=null"
    sft = RunDirectory.of(recipe).sft if recipe.ppo.sft_model_path is None else Path(recipe.ppo.sft_model_path)
    sft = sft.expanduser()
    started_from = Path(record.get("settings", {}).get("ppo.sft_model_path") or run / "sft").expanduser()
    recorded = record.get("inputs", {}).get(str(started_from))
    changed = sft.is_dir() and recorded is not None and recorded != directory_state(sft)
    if started_from.resolve() != sft.resolve() or changed:
        return f"did not start from the SFT model {str(sft)!r} as it is now; run it with ppo.sft_model_path={sft}"
    return None
