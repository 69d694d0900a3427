"""relay export: write a model of a run as a folder that transformers or peft loads by itself, with its model card."""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipeline.cli.finished_models import FAILURES, TRAINED, FinishedModel, find_model, report_of
from pipeline.cli.parsers import make_parser
from pipeline.evaluation.pages.model_card import model_card
from pipeline.models.hub import ADAPTER_FILE
from pipeline.models.loading import load_config, load_tokenizer
from pipeline.models.processors import save_processor
from pipeline.runtime.libraries import quiet_libraries
from pipeline.stages.model_cards import card_facts

EXAMPLE = """\
examples:
  relay export runs/quickstart my_model
  relay export runs/quickstart sft_model --system sft
  relay export runs/quickstart my_adapter --adapter
"""
ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.safetensors")


def export_command(argv: Sequence[str]) -> int:
    """Write the model; return 2 where there is none, or where the folder has files in it."""
    arguments = export_parser().parse_args(argv)
    quiet_libraries()
    target = arguments.directory
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{str(target)!r} exists; give a folder that is new or empty")
        finished = find_model_of_run(arguments.run, arguments.system)
        with whole_or_absent(target) as folder:
            export_model(finished, folder, arguments.adapter, str(target))
    except FAILURES as error:
        print(f"error: export: {error}", file=sys.stderr)
        return 2
    print(target)
    return 0


@contextmanager
def whole_or_absent(target: Path) -> Iterator[Path]:
    """Give a folder beside a new `target`, or in an empty one, whose files go to `target` once the block has ended."""
    exists = target.is_dir()
    beside = target if exists else target.parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".export-") as made:
        folder = Path(made) / "model"
        yield folder
        if not exists:
            folder.rename(target)
            return
        for file in folder.iterdir():  # a folder that is there may be one that cannot be renamed, such as a mount
            file.rename(target / file.name)


def find_model_of_run(run: Path, system: str | None) -> FinishedModel:
    """Find a trained model of a run.

    Raises:
        ValueError: as `find_model`, or it is no run directory, or only its SFT model is finished and not asked for.
    """
    finished = find_model(run, system, TRAINED)
    if finished.recipe is None:
        raise ValueError(f"{str(run)!r} is no run directory (it has no recipe.yaml)")
    if system is None and finished.recipe.ppo is not None and finished.source.name == "sft":
        raise ValueError(f"{str(run)!r}: ppo is not finished; run its recipe again, or name --system sft")
    return finished


def export_model(finished: FinishedModel, target: Path, adapter: bool, name: str) -> None:
    """Write plain weights, or the adapter alone, with the tokenizer and a card; `name` is where the card loads it.

    Raises:
        ValueError: the adapter is asked for, and the model has none.
    """
    if adapter:
        copy_adapter(finished, target)
    else:
        model, tokenizer = finished.source.load()
        model.save_pretrained(target)
        save_processor(tokenizer, model.config, target)
    facts = card_facts(finished.recipe, finished.run, finished.source.name)
    facts = replace(facts, is_adapter=adapter, path=name)
    (target / "README.md").write_text(model_card(facts, report_of(finished.recipe, finished.run)), encoding="utf-8")


def copy_adapter(finished: FinishedModel, target: Path) -> None:
    """Copy the files of an adapter, which name the base as the run has it now, and its tokenizer.

    Raises:
        ValueError: the model has no adapter.
    """
    source = finished.source
    if not all((Path(source.path) / file).is_file() for file in ADAPTER_FILES):
        raise ValueError(f"--adapter: {str(source.path)!r} is a whole model without an adapter; remove --adapter")
    model = source.base or source.path  # not by the adapter, whose settings name the base as it was in training
    tokenizer, config = load_tokenizer(model, source.config), load_config(model, source.config)
    settings = json.loads((Path(source.path) / ADAPTER_FILE).read_text(encoding="utf-8"))
    base = source.base or settings["base_model_name_or_path"]
    settings["base_model_name_or_path"] = str(Path(base).resolve()) if Path(base).is_dir() else str(base)
    target.mkdir(parents=True, exist_ok=True)
    for file in ADAPTER_FILES:
        shutil.copy(Path(source.path) / file, target)
    (target / ADAPTER_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_processor(tokenizer, config, target)


def export_parser() -> argparse.ArgumentParser:
    """Make the parser of the words after `relay export`."""
    parser = make_parser("export", __doc__, EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, such as runs/quickstart")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a folder that is new or empty")
    parser.add_argument("--system", choices=TRAINED, help="default: ppo, or sft of a recipe without ppo")
    parser.add_argument("--adapter", action="store_true", help="PPO's adapter alone, over the SFT model where it is")
    return parser
