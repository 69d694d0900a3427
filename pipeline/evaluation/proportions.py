"""Shares of cases with intervals that know which cases belong together.

Sources: Wilson, Probable inference, the law of succession, and statistical inference (1927); Dean and Pagano,
Evaluating Confidence Interval Methods for Binomial Proportions in Clustered Surveys (2015). Cases of one cluster are
alike, so that their number is not what decides how sure a share is. The variance between clusters says how many
independent cases the share is worth, and Wilson's interval is computed for so many, with Student's t.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True)
class Share:
    """How often something holds among `count` cases of so many `clusters`, with its 95 % interval; ties count half."""

    name: str
    value: float
    low: float
    high: float
    count: int
    clusters: int


def share(name: str, wins: Sequence[float], clusters: Sequence[object]) -> Share:
    """Average `wins` (1, 0, or 0.5 for a tie) of N cases, whose clusters have these labels [N]."""
    values, n = np.asarray(wins, dtype=np.float64), len(wins)
    numbers = np.unique([str(label) for label in clusters], return_inverse=True)[1]
    p, count = float(values.mean()), int(numbers.max()) + 1
    if count == 1:  # one cluster says nothing about others
        return Share(name, p, 0.0, 1.0, n, count)
    variance = count / (count - 1) * float((np.bincount(numbers, values - p) ** 2).sum()) / n**2
    # Where all cases agree nothing scatters, and each cluster counts as one case.
    worth = min(p * (1 - p) / variance, n) if variance > 1e-15 else count
    t = float(stdtrit(count - 1, 0.975))
    centre, spread = p + t**2 / (2 * worth), t * (p * (1 - p) / worth + t**2 / (4 * worth**2)) ** 0.5
    scale = 1 + t**2 / worth
    return Share(name, p, (centre - spread) / scale, (centre + spread) / scale, n, count)


def wins(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """Compare each pair of values: 1 where the first is larger, 0.5 where both are equal, else 0."""
    return [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
