"""relay push: upload a model of a run, with its model card, to the Hugging Face Hub."""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from pipeline.cli.export_command import export_model, find_model_of_run
from pipeline.cli.finished_models import FAILURES, TRAINED
from pipeline.cli.parsers import make_parser
from pipeline.evaluation.pages.page import visible
from pipeline.runtime.libraries import quiet_libraries
from pipeline.runtime.messages import one_line, redact

EXAMPLE = """\
examples:
  relay push runs/quickstart my-name/my-model --dry-run    # shows what would be sent; needs no network
  relay push runs/quickstart my-name/my-model
  relay push runs/quickstart my-name/my-sft-model --system sft

A repository that is not there yet is made, and is private. Log in before with: hf auth login
"""
CARD = "README.md"
CARD_LINES = 40  # that are shown before anything is sent
# An absolute path, or one below a home; what follows a word, a colon or a bracket is part of a URL or a tag.
PATH = re.compile(r"(?<![\w.:/<>~-])(?:~/?|/(?=[^/\s]))[^\s\"'`|,;()<>\[\]]*")


def push_command(argv: Sequence[str]) -> int:
    """Show what is sent, and send it; return 2 where it must not be sent, 1 where the Hub does not take it."""
    arguments = push_parser().parse_args(argv)
    quiet_libraries()
    try:
        validate_repo_id(arguments.id)
        finished = find_model_of_run(arguments.run, arguments.system)
        with tempfile.TemporaryDirectory(dir=arguments.run, prefix="push-") as made:
            folder = Path(made)
            export_model(finished, folder, arguments.adapter, arguments.id)
            hidden = hide_local_paths(folder / CARD)
            refuse_local_paths(folder)
            print(visible("\n".join(describe_upload(folder, arguments.id, hidden))))
            if arguments.dry_run:
                print("nothing was sent (--dry-run)")
                return 0
            return upload(folder, arguments.id, f"{finished.source.name} model, with its card")
    except FAILURES as error:
        print(f"error: push: {one_line(error)}", file=sys.stderr)
        return 2


def upload(folder: Path, repository: str, message: str) -> int:
    """Send a folder; return 1 where that fails."""
    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:  # the network and the library raise errors of many kinds
        advice = "log in with hf auth login, and see that the id begins with your name or your organisation's"
        print(f"error: push: {repository!r} was not uploaded ({one_line(error)[:300]}); {advice}", file=sys.stderr)
        return 1
    print(url)
    return 0


def hide_local_paths(card: Path) -> list[str]:
    """Cut paths of this machine in a card to their last part, remove secrets, and return the paths that were cut."""
    text = card.read_text(encoding="utf-8")
    paths = local_paths(text)
    for path in sorted(paths, key=len, reverse=True):
        is_home = Path(path).expanduser() in (Path.home(), *Path.home().parents)
        text = text.replace(path, "~" if is_home else f".../{Path(path).name}")
    card.write_text(redact(text), encoding="utf-8")
    return paths


def local_paths(text: str) -> list[str]:
    """Return the absolute paths in a text that begin with a folder of this machine, and those below a home."""
    paths = (match[0].rstrip(".:") for match in PATH.finditer(text))
    return list(dict.fromkeys(path for path in paths if len(path) > 1 and _is_here(path)))


def _is_here(path: str) -> bool:
    return path.startswith("~/") or Path("/", path.lstrip("/").partition("/")[0]).is_dir()


def refuse_local_paths(folder: Path) -> None:
    """Refuse settings that name a path of this machine.

    Raises:
        ValueError: naming the file, the path and what to do.
    """
    for file in sorted(folder.glob("*config.json")):
        if paths := local_paths(file.read_text(encoding="utf-8")):
            raise ValueError(
                f"{file.name} names {paths[0]!r}, a path of this machine that no one else has; push the whole model, "
                "without --adapter"
            )


def describe_upload(folder: Path, repository: str, hidden: Sequence[str]) -> list[str]:
    """Return the lines that show a repository, its files with their sizes, and the beginning of the card."""
    files = {
        str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()
    }
    width = max(map(len, files))
    lines = [f"repository: {repository} (model)"]
    lines += [f"  {name:<{width}}  {bytes_text(size):>9}" for name, size in files.items()]
    lines += [f"  {'total':<{width}}  {bytes_text(sum(files.values())):>9}", f"{CARD} begins with:"]
    lines += [f"  {line}" for line in (folder / CARD).read_text(encoding="utf-8").splitlines()[:CARD_LINES]]
    if hidden:
        lines.append(f"paths of this machine that the card does not show: {', '.join(hidden)}")
    return lines


def bytes_text(size: float) -> str:
    """Write a number of bytes with a unit that fits it."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def push_parser() -> argparse.ArgumentParser:
    """Make the parser of the words after `relay push`."""
    parser = make_parser("push", __doc__, EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, such as runs/quickstart")
    parser.add_argument("id", metavar="ID", help="the repository, such as my-name/my-model")
    parser.add_argument("--system", choices=TRAINED, help="default: ppo, or sft of a recipe without ppo")
    parser.add_argument("--adapter", action="store_true", help="the adapter alone; its base has to be on the Hub")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")
    return parser
