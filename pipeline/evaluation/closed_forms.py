"""What needs no resampling: McNemar's test, the smallest p of a few differences, and Holm's correction."""

from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr


def mcnemar(values_a: Sequence[float], values_b: Sequence[float]) -> float:
    """Compute the mid-p of McNemar's test, two-sided, of values that are 0 or 1."""
    differences = np.asarray(values_b, dtype=np.float64) - np.asarray(values_a, dtype=np.float64)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    n, fewer = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    below = float(bdtr(fewer - 1, n, 0.5)) if fewer else 0.0
    exactly = float(bdtr(fewer, n, 0.5)) - below
    # Half of what is as extreme as observed counts; with equal wins and losses the two tails share their middle.
    return 1 - exactly / 2 if wins == losses else 2 * below + exactly


def smallest_p(differing: int) -> float:
    """Return the chance that the signs of all differences agree, of so many clusters in which the systems differ.

    No p is below it: from a handful of examples, any difference would be certain.
    """
    return min(1.0, 2.0 ** (1 - differing))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down method (Holm 1979), in the order given.

    Rejecting those below a level keeps the chance of any false rejection among all of them below that level.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
