"""Beginning anew from the weights of a checkpoint that has lost the rest: only where that is asked for."""

import os
import shutil
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from pipeline.trainers.checkpoints import MANIFEST, digest, list_checkpoints, missing_files, read_manifest

VARIABLE = "RELAY_WEIGHTS_ONLY"
ENDING = ".safetensors"


def weights_alone(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint, where it lacks files and RELAY_WEIGHTS_ONLY is set, and a sentence on it.

    `directory` is then renamed, so that nothing is lost and the run begins at step 0. Every process calls it. A
    checkpoint that lacks nothing is left to be continued, whatever is set.

    Raises:
        ValueError: its weights are not there or damaged.
    """
    answer: list = [None, [], None]
    if PartialState().is_main_process and os.environ.get(VARIABLE):
        try:
            answer[:2] = _weights_alone(directory)
        except ValueError as error:
            answer[2] = str(error)
    path, notes, problem = broadcast_object_list(answer)
    if problem:
        raise ValueError(problem)
    return path, notes


def _weights_alone(directory: Path) -> tuple[Path | None, list[str]]:
    checkpoints = list_checkpoints(directory)
    missing = missing_files(checkpoints[-1]) if checkpoints else []
    if not missing:
        return None, []
    newest = checkpoints[-1]
    saved = read_manifest(newest)
    files = {path.name: path for path in newest.glob(f"*{ENDING}")}
    lost = [name for name in missing if name.endswith(ENDING)]
    known = MANIFEST not in missing
    damaged = [name for name, path in files.items() if known and digest(path) != saved.get(name, {}).get("sha256")]
    if lost or damaged or not files:
        broken = ", ".join([*lost, *damaged]) or "none there"
        raise ValueError(
            f"{VARIABLE}: the weights of checkpoint {str(newest)!r} are not whole: {broken}; remove the "
            "checkpoint to start from the one before"
        )
    number = 1
    while (aside := directory.with_name(f"{directory.name}.before-{number}")).exists():
        number += 1
    directory.rename(aside)
    log = directory.with_name("metrics.jsonl")
    if log.is_file():
        shutil.copy(log, aside)
    return aside / newest.name, [
        f"{newest} lacks {', '.join(missing)}: beginning at step 0 with its weights alone ({VARIABLE}); optimizer, "
        f"schedule, random state and position are new, and what was there is in {aside}"
    ]
