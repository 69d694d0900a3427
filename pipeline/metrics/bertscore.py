"""BERTScore: Zhang et al., BERTScore: Evaluating Text Generation with BERT (2020), by the package bert-score."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from pipeline.metrics.checks import check_examples, check_options
from pipeline.metrics.resampling import resampled_means, score_with_interval
from pipeline.metrics.types import Rows, Score
from pipeline.runtime.messages import one_line

OPTIONS = {"model": (str,), "num_layers": (int, type(None))}
INSTALL = "pip install 'trl-relay[bertscore]', or pip install bert-score"
Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class BERTScoreMetric:
    """F1 of the tokens' embeddings, the best over the references; corpus scores are 100 times the mean.

    The model is loaded with the first texts, and the scores of texts are kept: the tests of a report ask again.
    """

    name: str
    signature: str
    model: str
    num_layers: int | None
    higher_is_better: bool = True
    known: dict[Key, float] = field(default_factory=dict, repr=False, compare=False)

    def sample_scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return one number in [0, 1] for each example; see `Metric`."""
        check_examples(predictions, references)
        keys = [(text, tuple(texts)) for text, texts in zip(predictions, references, strict=True)]
        if missing := [key for key in dict.fromkeys(keys) if key not in self.known]:
            scored = [key for key in missing if key[0].strip() and any(text.strip() for text in key[1])]
            self.known.update(dict.fromkeys(missing, 0.0))  # an empty text has no token that could match
            if scored:
                texts, lists = [text for text, _ in scored], [list(texts) for _, texts in scored]
                try:
                    f1 = _scorer(self.model, self.num_layers).score(texts, lists)[2].clamp(0, 1).tolist()
                except Exception as error:  # of a model, a tokenizer or the Hub
                    problem = f"{type(error).__name__}: {one_line(error)}"
                    raise ValueError(f"metric {self.name!r} failed with {self.model!r} ({problem})") from error
                self.known.update(zip(scored, f1, strict=True))
        return [self.known[key] for key in keys]

    def resampled_scores(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], indices: Rows
    ) -> np.ndarray:
        """Return the score [R], 0 to 100, of each row of `indices` [R, N]; see `Metric`."""
        return 100 * resampled_means(self.sample_scores(predictions, references), indices)

    def corpus_score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Score:
        """Return the score over all examples, 0 to 100, with its bootstrap interval; see `Metric`."""
        return score_with_interval(self, predictions, references, n_bootstrap, confidence, seed)


def load(name: str, language: str | None = None, **options: Any) -> BERTScoreMetric:
    """Make BERTScore with the embeddings of `model`, a directory or Hub id, without rescaling.

    `num_layers` says which layer's; bert-score knows it for the models of its own list.

    Raises:
        ValueError: the package is not installed, no model is named, or its layer is not known.
    """
    check_options(name, options, OPTIONS)
    try:
        package = version("bert-score")
    except PackageNotFoundError as error:
        raise ValueError(f"metric {name} needs the package bert-score: {INSTALL}") from error
    if "model" not in options:
        raise ValueError(f"metric {name}: name its model, such as {{name: {name}, model: roberta-large}}")
    from bert_score.utils import model2layers  # slow to import, rarely needed

    model, num_layers = options["model"], options.get("num_layers")
    if num_layers is None and model not in model2layers:
        raise ValueError(
            f"metric {name}: bert-score does not know which layer of {model!r} to use; set the option num_layers"
        )
    layer = model2layers[model] if num_layers is None else num_layers
    return BERTScoreMetric(name, f"model:{model}|layer:{layer}|idf:no|version:bert-score-{package}", model, num_layers)


@cache
def _scorer(model: str, num_layers: int | None) -> Any:
    """Load the model, once in a process."""
    from bert_score import BERTScorer

    return BERTScorer(model_type=model, num_layers=num_layers)
