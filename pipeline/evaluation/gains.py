"""Gains of one system on another: example by example, in shares, by length, by the first system's score."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from pipeline.metrics.text import words

NUM_EXAMPLES = 10
NUM_BUCKETS = 4
ROUNDING = 1e-5  # of a score's size: what float32 leaves open


@dataclass(frozen=True)
class Gain:
    """One test example: its number, both systems' scores of it, and `gain` = b - a."""

    index: int
    score_a: float
    score_b: float
    gain: float


@dataclass(frozen=True)
class Bucket:
    """A group of examples: what they share, how many, both systems' mean scores and the mean gain."""

    label: str
    count: int
    score_a: float
    score_b: float
    gain: float


@dataclass(frozen=True)
class Gains:
    """System b's gains on system a by the sentence scores of one metric, higher is better.

    `best` and `worst` hold the largest gains and losses, `typical` the examples nearest to the median of those where
    the scores differ. `by_quality` groups by a's own score: even between two runs of equal quality its low groups gain
    and its high groups lose, because a score that is low by chance is higher the next time.
    """

    a: str
    b: str
    metric: str
    changed: float
    best: list[Gain]
    worst: list[Gain]
    typical: list[Gain]
    by_length: list[Bucket]
    by_quality: list[Bucket]


@dataclass(frozen=True)
class Shares:
    """The shares of the examples on which B is better, and worse."""

    wins: float
    losses: float

    @property
    def better(self) -> float:
        """Return P(better): the chance that B is better on an example drawn at random; ties count half."""
        return (1 + self.wins - self.losses) / 2


def paired_shares(values_a: Sequence[float], values_b: Sequence[float]) -> Shares:
    """Count on which examples B is better than A, by values [N] where more is better.

    A difference that rounding explains is none: a learned reward gives one text other last digits in another batch.
    """
    before, after = (np.asarray(values, dtype=np.float64) for values in (values_a, values_b))
    rounding = ROUNDING * np.maximum(1.0, np.maximum(np.abs(before), np.abs(after)))
    return Shares(float((after - before > rounding).mean()), float((before - after > rounding).mean()))


def find_gains(
    a: str,
    b: str,
    metric: str,
    scores_a: Sequence[float],
    scores_b: Sequence[float],
    texts: tuple[Sequence[str], Sequence[str]],
    references: Sequence[str],
) -> Gains:
    """Find the gains of b's texts on a's by the N sentence scores of both."""
    gains = [Gain(i, x, y, y - x) for i, (x, y) in enumerate(zip(scores_a, scores_b, strict=True))]
    moved = sorted((g for g in gains if abs(g.gain) > 1e-9), key=lambda g: g.gain)
    middle = median(g.gain for g in moved) if moved else 0.0
    lengths = [float(len(words(reference))) for reference in references]
    return Gains(
        a,
        b,
        metric,
        changed=fmean(x != y for x, y in zip(*texts, strict=True)),
        best=[g for g in reversed(moved) if g.gain > 0][:NUM_EXAMPLES],
        worst=[g for g in moved if g.gain < 0][:NUM_EXAMPLES],
        typical=sorted(moved, key=lambda g: (abs(g.gain - middle), g.index))[:NUM_EXAMPLES],
        by_length=buckets(lengths, gains, ".0f", " words"),
        by_quality=buckets(scores_a, gains, ".2f"),
    )


def buckets(keys: Sequence[float], gains: Sequence[Gain], form: str, unit: str = "") -> list[Bucket]:
    """Group the gains by `keys` into up to four groups of about equal size; equal keys stay together.

    The label of a group is its range of keys in this form, or the one key that all have, and the unit.
    """
    edges = np.unique(np.quantile(np.asarray(keys), np.linspace(0, 1, NUM_BUCKETS + 1)[1:-1]))
    groups = np.searchsorted(edges, keys, side="left")
    rows = []
    for number in sorted(set(groups.tolist())):
        members = [i for i, group in enumerate(groups) if group == number]
        inside = [keys[i] for i in members]
        means = [fmean(getattr(gains[i], name) for i in members) for name in ("score_a", "score_b", "gain")]
        ends = dict.fromkeys(format(end(inside), form) for end in (min, max))
        label = " to ".join(ends) + (unit.removesuffix("s") if list(ends) == ["1"] else unit)
        rows.append(Bucket(label, len(members), *means))
    return rows
