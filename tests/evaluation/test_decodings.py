"""Best of n by hand and by counting, and samples that do not depend on the processes."""

import os
from itertools import combinations
from statistics import fmean

import pytest
from accelerate import PartialState
from two_processes import run_in_two

from pipeline.evaluation.decodings import draw_samples, expected_best
from pipeline.models.generation import Decoding
from pipeline.runtime.memory import BatchSize


def test_expected_best_by_hand():
    """Of 0, 1, 4 the best of two is 1 once and 4 twice."""
    assert expected_best([[4, 0, 1]]) == pytest.approx([5 / 3, 3, 4])
    assert expected_best([[4, 0, 1], [1, 1, 1]]) == pytest.approx([4 / 3, 2, 2.5])


def test_expected_best_is_the_mean_over_all_draws():
    scores = [0.3, 0.1, 0.9, 0.4, 0.4, -1.0]
    curve = expected_best([scores])
    for k in range(1, 7):
        assert curve[k - 1] == pytest.approx(fmean(map(max, combinations(scores, k))))


def test_samples_are_the_same_for_any_number_of_processes(taught, tokenizer, examples, tmp_path, fresh_accelerate):
    model, rows, decoding = taught().eval(), examples.select(range(7)), Decoding(5, temperature=1.0)

    def draw(seed: int = 0) -> list:
        return draw_samples(model, tokenizer, rows, 3, decoding, BatchSize(6), seed)

    def body() -> None:
        PartialState(cpu=True)
        (tmp_path / os.environ["RANK"]).write_text(repr(draw()))

    run_in_two(body, tmp_path)
    one = draw()
    assert [text.index for text in one] == [i for i in range(7) for _ in range(3)]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == repr(one)
    assert one == draw() != draw(seed=1)
    assert len({text.completion for text in one}) > 3
