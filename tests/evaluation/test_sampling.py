"""Best of n by hand and by counting, and samples that do not depend on the processes."""

from itertools import combinations
from statistics import fmean

import pytest

from pipeline.evaluation.sampling import decode_rows, draw_samples, expected_best
from pipeline.models.generation import Decoding


def test_expected_best_by_hand():
    """Of 0, 1, 4 the best of two is 1 once and 4 twice."""
    assert expected_best([[4, 0, 1]]) == pytest.approx([5 / 3, 3, 4])
    assert expected_best([[4, 0, 1], [1, 1, 1]]) == pytest.approx([4 / 3, 2, 2.5])


def test_expected_best_is_the_mean_over_all_draws():
    scores = [0.3, 0.1, 0.9, 0.4, 0.4, -1.0]
    curve = expected_best([scores])
    for k in range(1, 7):
        assert curve[k - 1] == pytest.approx(fmean(map(max, combinations(scores, k))))


def test_samples_are_the_same_for_any_number_of_processes(taught, tokenizer, examples):
    model, rows, decoding = taught().eval(), examples.select(range(7)), Decoding(5, temperature=1.0)

    def draw(world: int, seed: int = 0) -> list:
        found = [
            t for rank in range(world) for t in draw_samples(model, tokenizer, rows, 3, decoding, 6, seed, rank, world)
        ]
        return sorted(found, key=lambda text: text.index)

    assert [text.index for text in draw(1)] == [i for i in range(7) for _ in range(3)]
    assert draw(1) == draw(2) == draw(5)
    assert draw(1) != draw(1, seed=1)
    assert len({text.completion for text in draw(1)}) > 3


def test_no_rows_give_no_texts(taught, tokenizer, examples):
    assert decode_rows(taught().eval(), tokenizer, examples, [], Decoding(5), 4) == []
