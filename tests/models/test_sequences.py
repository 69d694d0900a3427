"""Padding, masks and row order."""

import pytest
import torch

from pipeline.models.sequences import length_sorted_chunks, make_sequences, pad_left, pad_right

PAD = 0
PROMPTS = [[5], [6, 7, 8], [9, 10]]
COMPLETIONS = [[11, 12], [13], [14, 15, 16, 17]]


def test_padding_sides_and_masks():
    ids, mask = pad_left(PROMPTS, PAD)
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8], [0, 9, 10]]
    assert mask.tolist() == [[False, False, True], [True, True, True], [False, True, True]]
    ids, mask = pad_right(COMPLETIONS, PAD)
    assert ids.tolist() == [[11, 12, 0, 0], [13, 0, 0, 0], [14, 15, 16, 17]]
    assert mask.sum(1).tolist() == [2, 1, 4]
    assert mask.dtype == torch.bool


def test_masks_come_from_lengths_not_from_ids():
    sequences = make_sequences([[PAD, 5]], [[PAD, PAD]], PAD)  # a model may write its pad token
    assert sequences.prompt_mask.all() and sequences.completion_mask.all()
    assert sequences.lengths.tolist() == [4]


def test_rows_are_trimmed_to_the_longest_among_them():
    sequences = make_sequences(PROMPTS, COMPLETIONS, PAD)
    assert len(sequences) == 3
    assert sequences.lengths.tolist() == [3, 4, 6]
    part = sequences.rows(torch.tensor([2, 0]))
    assert part.prompt_ids.tolist() == [[9, 10], [0, 5]]
    assert part.completion_ids.tolist() == [[14, 15, 16, 17], [11, 12, 0, 0]]
    assert part.prompt_mask.tolist() == [[True, True], [False, True]]
    assert part.completion_mask.sum(1).tolist() == [4, 2]
    single = sequences.rows(torch.tensor([1]))
    assert single.completion_ids.tolist() == [[13]] and single.prompt_ids.tolist() == [[6, 7, 8]]


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [([[1], []], [[2], [3]], "prompt 1 has no tokens"), ([[1], [2]], [[], [3]], "completion 0 has no tokens")],
)
def test_empty_rows_are_refused(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        make_sequences(prompts, completions, PAD)


def test_chunks_hold_every_row_once_in_order_of_length():
    lengths = torch.tensor([3, 1, 2, 3, 1])
    chunks = [chunk.tolist() for chunk in length_sorted_chunks(lengths, 2)]
    assert chunks == [[1, 4], [2, 0], [3]]  # rows of one length keep their order
