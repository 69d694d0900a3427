"""Scores after scaling, clipping and the EOS rule, against numbers worked out by hand."""

import pytest
import torch
from torch import tensor

from pipeline.trainers.ppo.scores import (
    RunningMoments,
    apply_missing_eos_penalty,
    masked_moments,
    transform_scores,
)
from pipeline.trainers.ppo.statistics import prompts_with_equal_scores

moments = RunningMoments.from_sums


def sums(values):
    return masked_moments(values, torch.ones_like(values, dtype=torch.bool))


def test_moments_of_several_batches_are_those_of_all_numbers():
    first, second = tensor([1.0, 2.0, 6.0]), tensor([10.0, -4.0])
    seen = RunningMoments().merged(moments(sums(first))).merged(moments(sums(second)))
    assert (seen.count, seen.mean) == (5, pytest.approx(3.0))
    # deviations from 3: -2, -1, 3, 7, -7; squares 4 + 1 + 9 + 49 + 49 = 112
    assert seen.squares == pytest.approx(112.0)
    assert seen.deviation == pytest.approx((112 / 5) ** 0.5)
    together = moments(sums(first) + sums(second))  # as processes add them up
    assert together.squares == pytest.approx(112.0) and together.mean == pytest.approx(3.0)


def test_scores_without_spread_are_divided_by_1():
    assert RunningMoments().deviation == 1.0
    assert moments(sums(tensor([0.7, 0.7, 0.7]))).deviation == 1.0


def test_scaling_and_clipping_keep_the_tokens_adding_up():
    scores, tokens = tensor([4.0, -1.0, 0.0]), tensor([[1.0, 3.0], [-1.0, 0.0], [2.0, -2.0]])
    scaled, parts = transform_scores(scores, tokens, deviation=2.0, clip=None)
    assert scaled.tolist() == [2.0, -0.5, 0.0] and parts.tolist() == [[0.5, 1.5], [-0.5, 0.0], [1.0, -1.0]]
    clipped, parts = transform_scores(scores, tokens, deviation=2.0, clip=0.5)
    assert clipped.tolist() == [0.5, -0.5, 0.0]
    assert parts.tolist() == [[0.125, 0.375], [-0.5, 0.0], [1.0, -1.0]]  # a quarter of each


def test_unfinished_completions():
    scores, tokens = tensor([1.0, 2.0]), tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 1.5]])
    finished, lengths = tensor([True, False]), tensor([2, 3])
    paid, parts = apply_missing_eos_penalty(scores, tokens, finished, lengths, penalty=0.5, score=None)
    assert paid.tolist() == [1.0, 1.5] and parts.tolist() == [[0.25, 0.75, 0.0], [0.0, 0.5, 1.0]]
    paid, parts = apply_missing_eos_penalty(scores, tokens, finished, lengths, penalty=None, score=-1.0)
    assert paid.tolist() == [1.0, -1.0] and parts.tolist() == [[0.25, 0.75, 0.0], [0.0, 0.0, -1.0]]
    replaced = apply_missing_eos_penalty(scores, tokens, finished, lengths, penalty=1.0, score=-1.0)
    assert torch.equal(replaced[0], paid) and torch.equal(replaced[1], parts)  # not -2
    assert scores.tolist() == [1.0, 2.0] and tokens[1].tolist() == [0.0, 0.5, 1.5]  # the inputs are left alone
    untouched = apply_missing_eos_penalty(scores, tokens, finished, lengths, None, None)
    assert torch.equal(untouched[0], scores) and torch.equal(untouched[1], tokens)


def test_prompts_without_signal():
    scores = tensor([1.0, 1.0, 0.0, 0.5])
    every, some = torch.ones(4, dtype=torch.bool), tensor([True, True, False, True])
    assert prompts_with_equal_scores(scores, every, 2) == (1, 2)
    assert prompts_with_equal_scores(scores, every, 4) == (0, 1)
    assert prompts_with_equal_scores(torch.ones(4), every, 2) == (2, 2)
    assert prompts_with_equal_scores(scores, some, 2) == (2, 2)  # 0.5 alone teaches nothing
    assert prompts_with_equal_scores(scores, ~some, 2) == (1, 1)
