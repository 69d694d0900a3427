"""How often a test finds a difference where there is none: Relay's and sacreBLEU's paired bootstrap.

python tests/benchmarks/type_one_error.py --trials 1000 --seed 0

BLEU: two of the 16 systems in `wmt17`, sentences drawn with replacement, and for each sentence a coin says which
system wrote which of its two translations. Exact match: for each example the chance to be right is drawn from 0 to 1,
and both systems are right by that chance. So both systems are equally good, and a test at 5 % should find a difference
in at most 5 % of the trials.

Relay's p is the one that decides (`compare_texts`, `compare_values`), with 1,000 resamples. sacreBLEU's is that of
`--paired-bs`, computed for all trials at once as its `_paired_bs_test` does; the first trials of every cell are
computed by that function as well, and have to agree.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from sacrebleu.metrics.bleu import BLEU, BLEUScore
from sacrebleu.significance import Result, _paired_bs_test
from wmt17 import CountedBleu, corpus_bleu, load_statistics, resampled_counts

from pipeline.evaluation.significance import compare_texts, compare_values

SIZES, LEVELS, RESAMPLES, CHECKED = (50, 300, 2000), (0.05, 0.01), 1000, 3
LIMITS = {0.05: 0.06, 0.01: 0.013}
METRICS = ("BLEU", "exact match")
Pair = tuple[np.ndarray, np.ndarray]  # the counts [N, K] of both systems


@dataclass(frozen=True)
class Cell:
    """The shares of false differences of one metric at one size, by level."""

    metric: str
    examples: int
    trials: int
    test: str
    relay: dict[float, float]
    sacrebleu: dict[float, float]


def equal_translations(systems: Sequence[np.ndarray], size: int, rng: np.random.Generator) -> Pair:
    """Draw the counts of two equally good systems: each sentence's two translations in random order."""
    first, second = rng.choice(len(systems), size=2, replace=False)
    rows, swapped = rng.integers(len(systems[0]), size=size), rng.random(size) < 0.5
    a, b = systems[first][rows], systems[second][rows]
    return np.where(swapped[:, None], b, a), np.where(swapped[:, None], a, b)


def equal_answers(size: int, rng: np.random.Generator) -> Pair:
    """Draw the answers of two equally good systems: right or wrong, and a 1 to count the examples by."""
    chance = rng.random(size)
    a, b = (np.column_stack([rng.random(size) < chance, np.ones(size, bool)]).astype(np.int64) for _ in range(2))
    return a, b


def accuracy(totals: np.ndarray) -> np.ndarray:
    """Compute the share of right answers in percent [R] of summed counts [R, 2]."""
    return 100 * totals[:, 0] / totals[:, 1]


def relay_test(metric: str, a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, str]:
    """Compute the p-value that decides in Relay, and name its test."""
    if metric == "BLEU":
        size = len(a)
        rows = [str(row) for row in range(2 * size)]
        bleu = CountedBleu(np.vstack([a, b]))
        tests = compare_texts(bleu, rows[:size], rows[size:], [[""]] * size, RESAMPLES, seed)
    else:
        tests = compare_values(a[:, 0].astype(float).tolist(), b[:, 0].astype(float).tolist(), RESAMPLES, seed)
    return tests.p_value, tests.test


def sacrebleu_p(score: Callable[[np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray, seed: int) -> float:
    """Compute the p-value of sacreBLEU's paired bootstrap, all resamples at once."""
    indices = np.random.default_rng(seed).choice(len(a), size=(RESAMPLES, len(a)), replace=True)
    resampled = np.abs(score(resampled_counts(b, indices)) - score(resampled_counts(a, indices)))
    observed = abs(float((score(b.sum(axis=0, keepdims=True)) - score(a.sum(axis=0, keepdims=True)))[0]))
    return (1 + int((resampled - resampled.mean() > observed).sum())) / (RESAMPLES + 1)


def sacrebleu_own_p(metric: str, a: np.ndarray, b: np.ndarray, seed: int) -> float:
    """Compute the same by sacreBLEU's own function, which reads texts: here these are the counts already."""
    bleu = BLEU(tokenize="none", force=True)

    def score(totals: np.ndarray) -> SimpleNamespace | BLEUScore:
        if metric == "BLEU":
            return bleu._compute_score_from_stats(totals.tolist())
        return SimpleNamespace(score=float(accuracy(totals[None])[0]))

    scorer = SimpleNamespace(
        _extract_corpus_statistics=lambda counts, references: counts,
        _aggregate_and_compute=lambda counts: score(np.asarray(counts).sum(axis=0)),
        _compute_score_from_stats=score,
    )
    baseline = {metric: (a, Result(scorer._aggregate_and_compute(a).score))}
    _, results = _paired_bs_test(baseline, "b", b, None, {metric: scorer}, RESAMPLES, seed=seed)
    return results[metric].p_value


def simulate(metric: str, size: int, trials: int, seed: int) -> Cell:
    """Compute how often each test finds a difference between two equally good systems.

    Raises:
        ValueError: sacreBLEU's own function gives another p-value.
    """
    systems = list(load_statistics().values())
    ours, theirs, test = [], [], ""
    for trial in range(trials):
        rng = np.random.default_rng([seed, METRICS.index(metric), size, trial])
        a, b = equal_translations(systems, size, rng) if metric == "BLEU" else equal_answers(size, rng)
        number = int(rng.integers(2**31))
        p_value, test = relay_test(metric, a, b, number)
        ours.append(p_value)
        theirs.append(sacrebleu_p(corpus_bleu if metric == "BLEU" else accuracy, a, b, number))
        # A tie between a resample and the observed difference may fall to either side in another precision.
        if trial < CHECKED and abs(theirs[-1] - sacrebleu_own_p(metric, a, b, number)) > 0.02:
            raise ValueError(f"{metric}, {size} examples, trial {trial}: sacreBLEU's own p is another")
    shares = [{level: float(np.mean(np.array(values) < level)) for level in LEVELS} for values in (ours, theirs)]
    return Cell(metric, size, trials, test, *shares)


def table(cells: Sequence[Cell]) -> str:
    """Write the cells as a Markdown table."""
    names = [f"{name} at {level:g}" for level in LEVELS for name in ("Relay", "`--paired-bs`")]
    lines = ["| metric | examples | Relay's test | " + " | ".join(names) + " |", "| --- " * 7 + "|"]
    for cell in cells:
        shares = [f"{side[level]:.1%}" for level in LEVELS for side in (cell.relay, cell.sacrebleu)]
        lines.append(f"| {cell.metric} | {cell.examples:,} | {cell.test} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> list[Cell]:
    """Simulate every cell and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    cells = []
    for metric in METRICS:
        for size in options.sizes:
            began = time.monotonic()
            cells.append(simulate(metric, size, options.trials, options.seed))
            seconds = time.monotonic() - began
            print(f"{metric}, {size} examples: {cells[-1].relay} in {seconds:.0f} s", file=sys.stderr, flush=True)
    print(table(cells))
    over = [
        f"{c.metric}, {c.examples} examples, level {level:g}: {c.relay[level]:.1%} is above {limit:.1%}"
        for c in cells
        for level, limit in LIMITS.items()
        if c.relay[level] > limit
    ]
    print("\n".join(over) or "Relay is below its limits everywhere.", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n", encoding="utf-8")
    return cells


if __name__ == "__main__":
    main(sys.argv[1:])
