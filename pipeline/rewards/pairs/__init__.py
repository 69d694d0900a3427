"""Pairs of a better and a worse text: made from samples and references, checked, counted, written and read."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TypeVar

from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.runtime.seeds import derive_seed

T = TypeVar("T")
TRAIN, CHOICE, HELD_OUT = "train", "choice", "held_out"
DATA = "data"
# Why a pair is not used, in words that follow "12 pairs: ".
EMPTY = "chosen or rejected is an empty text"
EQUAL = "chosen and rejected are the same text"
NARROW = "the margin is below reward.pairs.min_margin"
LONG = "prompt and text are longer than the context"
SWAPPED = "the same two texts are also there the other way round"
REPEATED = "the same pair is there before"
BROKEN = "the row is broken (reward.pairs.skip_broken_rows)"
KNOWN = "the prompt is one of the held-out pairs"


@dataclass(frozen=True)
class Pair:
    """A prompt (text or chat) with a better and a worse text, the latter two also as the token ids that are scored.

    `split` is train, choice (the held-out pairs that choose the checkpoint) or held_out (those that judge it), `row`
    the prompt's row in the data of the split, `origin` sft, references or data.
    """

    split: str
    row: int
    prompt: str | list
    chosen: str
    rejected: str
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None
    origin: str


@dataclass(frozen=True)
class RankedText:
    """One text with the token ids it is scored by, and its value by the ranking metric."""

    text: str
    ids: list[int]
    value: float = 0.0


@dataclass(frozen=True)
class PairCounts:
    """How many pairs were found, kept for each split, and dropped for each reason."""

    found: int
    kept: dict[str, int]
    dropped: dict[str, int]

    def sentences(self) -> list[str]:
        """Say what was kept and what was dropped, in lines."""
        choice = f", {self.kept[CHOICE]} to choose the checkpoint" if CHOICE in self.kept else ""
        kept = f"pairs: {self.kept.get(TRAIN, 0)} for training{choice} and {self.kept.get(HELD_OUT, 0)} held out"
        return [f"{kept}, of {self.found}", *(f"dropped {count}: {why}" for why, count in self.dropped.items())]


def prompt_pairs(
    settings: SampledPairs,
    prompt: str | list,
    split: str,
    row: int,
    samples: Sequence[RankedText],
    references: Sequence[RankedText],
) -> list[Pair]:
    """Make the pairs of one prompt, unchecked; equal samples count once."""

    def pair(better: RankedText, worse: RankedText, origin: str) -> Pair:
        margin = max(0.0, better.value - worse.value)
        return Pair(split, row, prompt, better.text, worse.text, better.ids, worse.ids, margin, origin)

    distinct = list({sample.text: sample for sample in samples}.values())  # in the order of sampling
    pairs: list[Pair] = []
    if "sft" in settings.origins:
        ranked = sorted(distinct, key=lambda sample: -sample.value)  # stable: ties stay in the order of sampling
        candidates = [pair(better, worse, "sft") for better, worse in combinations(ranked, 2)]
        pairs += sorted(candidates, key=lambda p: -p.margin)[: settings.pairs_per_prompt]
    if "references" in settings.origins:
        reference_texts = {reference.text for reference in references}
        others = [sample for sample in distinct if sample.text not in reference_texts]
        pairs += [pair(references[0], sample, "references") for sample in others[: settings.pairs_per_prompt]]
    return pairs


def check_pairs(
    pairs: Sequence[Pair], fits: Callable[[Pair], bool], min_margin: float
) -> tuple[list[Pair], PairCounts]:
    """Keep the pairs that can be learnt from, and count why the others cannot.

    `fits` tells whether the model's context holds a pair. Two orders of one pair contradict each other: both go.

    Raises:
        ValueError: nothing is left to train on, or to hold out.
    """
    held_out = {prompt_key(pair.prompt) for pair in pairs if pair.split == HELD_OUT}
    orders = {(prompt_key(pair.prompt), pair.chosen, pair.rejected) for pair in pairs}
    seen: set[tuple[str, str, str]] = set()
    dropped: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        key = (prompt_key(pair.prompt), pair.chosen, pair.rejected)
        reasons = {
            EMPTY: not pair.chosen.strip() or not pair.rejected.strip(),
            EQUAL: pair.chosen.strip() == pair.rejected.strip(),
            NARROW: pair.margin is not None and pair.margin < min_margin,
            LONG: not fits(pair),
            SWAPPED: (key[0], pair.rejected, pair.chosen) in orders,
            KNOWN: pair.split == TRAIN and key[0] in held_out,
            REPEATED: key in seen,
        }
        why = next((reason for reason, holds in reasons.items() if holds), None)
        seen.add(key)
        if why is None:
            kept.append(pair)
        else:
            dropped[why] += 1
    counts = PairCounts(len(pairs), dict(Counter(pair.split for pair in kept)), dict(dropped.most_common()))
    for split in (TRAIN, HELD_OUT):
        if not counts.kept.get(split):
            where = "to train on" if split == TRAIN else "held out"
            raise ValueError(f"reward.pairs: no pair is left {where}; {'; '.join(counts.sentences())}")
    return kept, counts


def split_held_out(pairs: Sequence[Pair], counts: PairCounts, seed: int) -> tuple[list[Pair], PairCounts]:
    """Let the pairs of half of the held-out prompts choose the checkpoint; those of the other half judge it.

    Raises:
        ValueError: all held-out pairs have one prompt.
    """
    prompts = list(dict.fromkeys(prompt_key(pair.prompt) for pair in pairs if pair.split == HELD_OUT))
    if len(prompts) < 2:
        raise ValueError(
            "reward.pairs: all held-out pairs have one prompt, and two are needed: one whose pairs choose the "
            "checkpoint, one whose pairs judge it; hold out more prompts, or set reward.load_best_model_at_end: false"
        )
    chosen = set(random.Random(derive_seed(seed, "choice of the checkpoint")).sample(prompts, len(prompts) // 2))
    divided = [
        replace(pair, split=CHOICE) if pair.split == HELD_OUT and prompt_key(pair.prompt) in chosen else pair
        for pair in pairs
    ]
    return divided, replace(counts, kept=dict(Counter(pair.split for pair in divided)))


def prompt_key(prompt: str | list) -> str:
    """Return a text that equal prompts, as texts or chats, have in common."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def write_lines(items: Iterable[object], file: Path) -> None:
    """Write dataclasses as JSON lines."""
    file.write_text("".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


def read_records(kind: type[T], file: Path) -> list[T]:
    """Read the dataclasses of a file that `write_lines` wrote."""
    return [kind(**json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n") if line]


def scaled_margins(pairs: Sequence[Pair], weight: float) -> list[Pair]:
    """Scale margins so that their mean over the training pairs is `weight`; None for all if any pair has none.

    A metric's margins are below 1 and human ones may be 20: the loss asks for a difference of scores of `weight` on
    average.
    """
    margins = [pair.margin for pair in pairs if pair.split == TRAIN]
    if not weight or any(pair.margin is None for pair in pairs) or not sum(margins):
        return [replace(pair, margin=None) for pair in pairs]
    factor = weight * len(margins) / sum(margins)
    return [replace(pair, margin=pair.margin * factor) for pair in pairs]
