"""relay export: write a model of a run as a folder that transformers loads by itself, with its model card."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.cli.finished_models import TRAINED, FinishedModel, find_model, report_of
from pipeline.evaluation.pages.model_card import model_card
from pipeline.runtime.libraries import quiet_libraries
from pipeline.stages.model_cards import card_facts

EXAMPLE = """\
examples:
  relay export runs/quickstart my_model
  relay export runs/quickstart sft_model --system sft
"""


def export_command(argv: Sequence[str]) -> int:
    """Write the model; return 2 where there is none, or where the folder has files in it."""
    arguments = parse_export_arguments(argv)
    quiet_libraries()
    target = arguments.directory
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{str(target)!r} exists; give a folder that is new or empty")
        finished = find_model(arguments.run, arguments.system, TRAINED)
        if finished.recipe is None:
            raise ValueError(f"{str(arguments.run)!r} is no run directory (it has no recipe.yaml)")
        export_model(finished, target)
    except (ValueError, OSError) as error:
        print(f"error: export: {error}", file=sys.stderr)
        return 2
    print(target)
    return 0


def export_model(finished: FinishedModel, target: Path) -> None:
    """Write plain weights, an adapter merged into its base, the tokenizer, and the card."""
    model, tokenizer = finished.source.load()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    facts = card_facts(finished.recipe, finished.run, finished.source.name)
    facts = replace(facts, is_adapter=False, path=str(target))
    (target / "README.md").write_text(model_card(facts, report_of(finished.run)), encoding="utf-8")


def parse_export_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words after `relay export`."""
    parser = argparse.ArgumentParser(
        prog="relay export",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, such as runs/quickstart")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a folder that is new or empty")
    parser.add_argument("--system", choices=TRAINED, help="default: ppo, or sft where there is no ppo")
    return parser.parse_args(argv)
