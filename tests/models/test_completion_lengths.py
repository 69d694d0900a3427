"""How many tokens the references of the data need."""

import pytest
from datasets import Dataset
from transformers import BartConfig

from pipeline.models.completion_lengths import MAX_ROWS, covering_length, reference_length

KEY = "ppo.response_length"


@pytest.fixture
def config(taught):
    """The configuration of a causal model that reads 64 tokens."""
    return taught().config


def test_99_of_100_lengths_fit_into_a_multiple_of_8():
    assert covering_length([3]) == 8 and covering_length([8]) == 8 and covering_length([9]) == 16
    assert covering_length([5] * 99 + [70]) == 8  # one of a hundred does not fit
    assert covering_length([5] * 98 + [70] * 2) == 72
    assert covering_length([70, 5, 5]) == 72  # a share of few texts is all of them


def test_every_reference_counts_with_its_eos(tokenizer, config):
    words = [" ".join(["red"] * count) for count in (1, 7, 8)]
    lengths = [len(tokenizer(text)["input_ids"]) for text in words]
    assert lengths == [1, 7, 8], "the tiny tokenizer has a token for each word"

    def length(*references, **columns):
        rows = [{"prompt": "say", "references": list(references), **columns}]
        return reference_length(tokenizer, config, Dataset.from_list(rows), KEY)

    assert length(words[1]) == 8  # seven words and EOS
    assert length(words[2]) == 16 == length(words[0], words[2])
    assert length(words[0], completion=words[2]) == 16  # what SFT learns, such as an answer with its thoughts
    plain = Dataset.from_list([{"prompt": "say", "completion": words[2]}])
    assert reference_length(tokenizer, config, plain, KEY) == 16


def test_data_without_references_needs_the_key(tokenizer, config):
    for row in ({"prompt": "say"}, {"prompt": "say", "references": []}):
        with pytest.raises(ValueError, match=rf"^{KEY}: missing: the data has no references .* {KEY}: 256"):
            reference_length(tokenizer, config, Dataset.from_list([row]), KEY)


def test_rows_of_large_data_are_spread_over_it(tokenizer, config):
    rows = [{"prompt": "say", "references": ["red"]}] * (2 * MAX_ROWS)
    late = [{"prompt": "say", "references": ["red " * 20]}] * MAX_ROWS
    assert reference_length(tokenizer, config, Dataset.from_list(rows + late), KEY) == 24


def test_prompts_keep_half_of_what_a_model_reads(tokenizer, config, taught_t5):
    long = Dataset.from_list([{"prompt": "say", "references": ["red " * 90]}])
    assert reference_length(tokenizer, config, long, KEY) == 32
    two_sides = BartConfig(max_position_embeddings=64)
    assert reference_length(tokenizer, two_sides, long, KEY) == 62  # the decoder's start and a language code
    assert reference_length(tokenizer, taught_t5().config, long, KEY) == 96  # no limit
