"""Metrics of packages that need not be installed: BERTScore, and COMET, which cannot be."""

import importlib.util
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
from transformers import BertConfig, BertModel

from pipeline.metrics import bertscore, load_metric
from pipeline.models.from_scratch import train_tokenizer

installed = pytest.mark.skipif(importlib.util.find_spec("bert_score") is None, reason="bert-score is not installed")


def test_a_package_that_is_missing_is_named_with_the_command(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(bertscore, "version", missing)
    with pytest.raises(ValueError, match=r"metric bertscore needs .*pip install 'trl-relay\[bertscore\]'"):
        load_metric("bertscore", model="roberta-large")


def test_comet_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"metric 'comet': .*transformers below 5.*pip install unbabel-comet"):
        load_metric("comet")


def test_a_pairwise_judge_is_no_metric_of_single_texts():
    with pytest.raises(ValueError, match=r"metric 'judge': .*recipes/judge_pairs.py"):
        load_metric("judge")


@installed
def test_bertscore_needs_a_model_whose_layer_is_known():
    with pytest.raises(ValueError, match="name its model"):
        load_metric("bertscore")
    with pytest.raises(ValueError, match="num_layers"):
        load_metric("bertscore", model="./mine")


@installed
def test_bertscore_of_a_tiny_model(tmp_path):
    """Equal texts score 1, the best reference counts, an empty text 0, and the corpus score is the mean."""
    tokenizer = train_tokenizer(["the cat sat on the mat", "a dog ran"], 300)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    metric = load_metric("bertscore", model=str(tmp_path), num_layers=2)
    texts, references = ["the cat sat", "a dog", ""], [["a dog ran", "the cat sat"], ["the mat"], ["the mat"]]
    same, other, empty = metric.sample_scores(texts, references)
    assert same == pytest.approx(1.0, abs=1e-5) and 0 <= other < 1 and empty == 0.0
    score = metric.corpus_score(texts, references, n_bootstrap=20)
    assert score.value == pytest.approx(100 * (same + other) / 3) and score.low <= score.value <= score.high
    assert metric.resampled_scores(texts, references, np.array([[0, 0, 1]]))[0] == pytest.approx(
        100 * (2 * same + other) / 3
    )
