"""Score base, SFT, PPO and others on the test split by the same decoding, and say whether PPO beat SFT.

accelerate launch pipeline/eval.py recipes/quickstart.yaml eval.num_beams=4
python pipeline/eval.py compare runs/quickstart runs/control
"""

import pipeline.runtime.versions  # noqa: F401  # first: before an import fails on a version that does not fit

# isort: split
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from pipeline.cli.compare_command import compare_command
from pipeline.evaluation.assemble import build_report
from pipeline.evaluation.pages.render import print_report, write_report
from pipeline.evaluation.scoring import compute_system_rewards
from pipeline.recipe import Recipe, parse_stage_arguments
from pipeline.rewards.rows import count_failures
from pipeline.runtime.distributed import on_main
from pipeline.runtime.messages import say
from pipeline.stages.directory import RunDirectory
from pipeline.stages.eval_inputs import report_predictions, report_scoring, report_settings
from pipeline.stages.stage import run_stage
from pipeline.stages.task import left_out_record, load_recipe_task


def main(argv: Sequence[str]) -> int:
    """Run the stage, or `compare`; return 0 when the report is written."""
    if argv and argv[0] == "compare":
        return compare_command(argv[1:], "eval.py compare")
    return run_stage(parse_stage_arguments(argv, __doc__), "eval", evaluate)


def evaluate(recipe: Recipe, run: RunDirectory) -> dict[str, object]:
    """Predict with every system and compute rewards, each process its share; report on the main process."""
    began, (recipe, task) = time.monotonic(), load_recipe_task(recipe, run)
    sources, predictions = report_predictions(recipe, run, task)
    scoring = report_scoring(recipe, run, task)
    systems = compute_system_rewards(predictions, task.test, scoring)
    if failures := [failure for system in systems.values() for failure in system.failures]:
        say(f"eval: {count_failures(failures, scoring.handling.on_error)}")

    def report() -> dict[str, object]:
        settings = report_settings(recipe, task)
        report, details = build_report(systems, sources, task.test, scoring, settings, run.path, began)
        write_report(report, details, run.eval)
        print_report(report, Console(stderr=True))
        return {"verdict": report.verdict, "tokens": report.cost[-1].tokens, **left_out_record(task)}

    return on_main(report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
