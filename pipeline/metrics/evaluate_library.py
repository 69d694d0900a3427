"""Score with any metric of Hugging Face's `evaluate` library, by its name on the Hub or the path of a local copy."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np

from pipeline.metrics.checks import check_examples, check_options
from pipeline.metrics.resampling import resampled_means, score_with_interval
from pipeline.metrics.types import Rows, Score
from pipeline.runtime.hub import ask_hub
from pipeline.runtime.messages import one_line

Texts, Lists, TEXT = Sequence[str], Sequence[Sequence[str]], (str, type(None))
OPTIONS = {"key": TEXT, "higher_is_better": (bool,), "config_name": TEXT, "trust_remote_code": (bool,)}
# Modules of the library of which less is better. They do not say it themselves.
ERRORS = {"brier_score", "character", "charcut_mt", "cer", "mae", "mahalanobis", "mape", "mase", "mse", "perplexity"}
ERRORS |= {"smape", "ter", "wer"}


@dataclass(frozen=True)
class EvaluateMetric:
    """A module of the library, on that module's scale; `key` chooses a number of its result, None the only one."""

    name: str
    signature: str
    higher_is_better: bool
    module: evaluate.EvaluationModule
    key: str | None
    options: Mapping[str, Any]  # of the module's `compute`

    def sample_scores(self, predictions: Texts, references: Lists) -> list[float]:
        """Score each example by itself, with the sign turned where lower is better; see `Metric`."""
        check_examples(predictions, references)
        values = self._compute(predictions, references) if self.key else None
        if not isinstance(values, list):  # BERTScore and its kind give a list, with a number for each example
            values = [self._compute([p], [texts]) for p, texts in zip(predictions, references, strict=True)]
        return [float(value if self.higher_is_better else -value) for value in values]

    def resampled_scores(self, predictions: Texts, references: Lists, indices: Rows) -> np.ndarray:
        """Compute the corpus score [R] of each row of `indices` [R, N]; by means where the module's score is one."""
        try:
            values = np.array(self.sample_scores(predictions, references)) * (1 if self.higher_is_better else -1)
        except ValueError:  # some modules, such as correlations, are not defined for a single example
            values = np.array([np.nan])
        if abs(values.mean() - np.mean(self._compute(predictions, references))) <= 1e-9:
            return resampled_means(values, indices)
        return np.array([self._compute([predictions[i] for i in r], [references[i] for i in r]) for r in indices])

    def corpus_score(
        self, predictions: Texts, references: Lists, n_bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> Score:
        """Score all examples together, with a bootstrap interval; see `Metric`."""
        return score_with_interval(self, predictions, references, n_bootstrap, confidence, seed)

    def _compute(self, predictions: Texts, references: Lists) -> float | list[float]:
        features = self.module.features if isinstance(self.module.features, list) else [self.module.features]
        if all(isinstance(choice["references"], datasets.Value) for choice in features):  # one text, not a list
            if any(len(texts) > 1 for texts in references):
                raise ValueError(f"metric {self.name!r} takes one reference, and an example has several")
            references = [texts[0] for texts in references]
        try:
            result = self.module.compute(predictions=predictions, references=references, **self.options)
        except Exception as error:  # a module is a script of anyone
            raise ValueError(f"metric {self.name!r} failed with {type(error).__name__}: {one_line(error)}") from error
        numbers = [key for key, value in result.items() if isinstance(value, Real)]
        value = result.get(self.key or (numbers[0] if len(numbers) == 1 else None))
        if not isinstance(value, Real | list):
            raise ValueError(f"metric {self.name!r}: choose by the option `key` one of {', '.join(result)}")
        if isinstance(value, list) and (len(value) != len(predictions) or not all(isinstance(x, Real) for x in value)):
            problem = f"{self.key!r} is a list, but not of one number for each prediction"
            raise ValueError(f"metric {self.name!r}: {problem}; choose by `key` another of {', '.join(result)}")
        return value


def load(name: str, **options: Any) -> EvaluateMetric:
    """Load the metric `evaluate:NAME_OR_PATH`, or raise a ValueError; other options than OPTIONS go to `compute`."""
    ours = {option: value for option, value in options.items() if option in OPTIONS}
    check_options(name, ours, OPTIONS)
    path = os.path.expanduser(name.removeprefix("evaluate:"))
    local = "give the path of a local copy: evaluate:path/to/metric"
    if not (path.startswith((".", "/")) or path.endswith(".py") or Path(path, f"{Path(path).name}.py").is_file()):
        if not ours.get("trust_remote_code"):
            problem = f"metric {name!r} is a script of the Hugging Face Hub, which runs with your rights; read it, and"
            raise ValueError(f"{problem} if you trust it write {{name: {name}, trust_remote_code: true}}; or {local}")
        hub = ask_hub(path if "/" in path else f"evaluate-metric/{path}", "space")
        if not hub.answered and not evaluate.config.HF_EVALUATE_OFFLINE:
            problem = f"metric {name!r} cannot be loaded: the Hugging Face Hub does not answer ({hub.problem})"
            raise ValueError(f"{problem}; {local}, or set HF_EVALUATE_OFFLINE=1 to use a cached one")
    try:
        module = evaluate.load(path, ours.get("config_name"), keep_in_memory=True)
    except Exception as error:  # as above
        raise ValueError(f"metric {name!r} cannot be loaded ({one_line(error)}); {local}") from error
    inputs = set(module.features[0] if isinstance(module.features, list) else module.features)
    if inputs != {"predictions", "references"}:
        raise ValueError(f"metric {name!r} needs {', '.join(sorted(inputs))}; there are predictions and references")
    settings = [f"{option}:{value}" for option, value in options.items() if option != "trust_remote_code"]
    signature = "|".join([*settings, f"version:evaluate-{evaluate.__version__}"])
    higher = ours.get("higher_is_better", Path(path).stem not in ERRORS)
    rest = {key: options[key] for key in options if key not in OPTIONS}
    return EvaluateMetric(name, signature, higher, module, ours.get("key"), rest)
