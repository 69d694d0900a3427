"""The constant-reward control: a finished run whose PPO was rewarded only by a constant, shown in the report."""

import re
from pathlib import Path

from pipeline.evaluation.config import AUTO
from pipeline.recipe import Recipe
from pipeline.stages.digests import directory_state
from pipeline.stages.directory import FINISHED, RunDirectory, read_record


def control_run(recipe: Recipe) -> Path | None:
    """Return the run directory of the control: the one that `eval.control` names, or one next to this run.

    `auto` picks a finished run next to this one whose only reward was `constant` and whose SFT model is this run's; it
    prefers the same seed, then the most recent.
    """
    chosen = recipe.eval.control
    if chosen is None or recipe.ppo is None or "ppo" not in recipe.eval.systems:
        return None
    if chosen != AUTO:
        return Path(chosen).expanduser()
    this_run, preference = RunDirectory.of(recipe).path, {}
    for file in sorted(this_run.parent.glob(f"*/ppo/{FINISHED}")):
        record, run = read_record(file), file.parent.parent
        settings = record.get("settings", {})
        rewards = {value for key, value in settings.items() if re.fullmatch(r"ppo\.rewards\.\d+\.name", key)}
        if run != this_run and rewards == {"constant"} and control_problem(recipe, run) is None:
            preference[run] = (settings.get("seed") == recipe.seed, str(record.get("finished_at")))
    return max(preference, key=preference.get, default=None)


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
