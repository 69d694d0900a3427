"""Write the sentence pairs of the quickstart as parallel text files.

python -m tools.phrasebook recipes/phrasebook
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tools.phrasebook.sentences import phrase_pairs

SIZES = {"test": 2000, "validation": 256, "train": 8000}  # in the order in which the sentences are handed out
POOL = 8768  # the pairs drawn first; further pairs come after these, so that a larger file begins like a smaller one


def quickstart_pairs() -> dict[str, list[tuple[str, str]]]:
    """Return the (English, German) pairs of each split; no sentence occurs twice."""
    pool = phrase_pairs(POOL, seed=0)
    known = set(pool)
    pairs = pool + [pair for pair in phrase_pairs(sum(SIZES.values()), seed=0) if pair not in known]
    splits, start = {}, 0
    for split, size in SIZES.items():
        splits[split] = pairs[start : start + size]
        start += size
    return splits


def write_pairs(folder: Path) -> None:
    """Write `{train,validation,test}.{en,de}` into `folder`, one sentence a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in quickstart_pairs().items():
        for suffix, sentences in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
            text = "".join(f"{sentence}\n" for sentence in sentences)
            (folder / f"{split}.{suffix}").write_text(text, encoding="utf-8", newline="\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files into the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Write the sentence pairs of the quickstart as text files.")
    parser.add_argument("folder", type=Path, help="where the six files go, such as recipes/phrasebook")
    write_pairs(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
