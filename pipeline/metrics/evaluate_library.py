"""Any metric of Hugging Face's `evaluate` library, by its name on the Hub or the path of a local copy."""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np

from pipeline.metrics.checks import check_examples, check_options
from pipeline.metrics.resampling import resampled_means, score_with_interval
from pipeline.metrics.types import Score

OPTIONS = {
    "key": (str, type(None)),
    "higher_is_better": (bool,),
    "config_name": (str, type(None)),
    "trust_remote_code": (bool,),
}
OFFLINE_VARIABLES = ("HF_EVALUATE_OFFLINE", "HF_HUB_OFFLINE")
PROBE_SECONDS = 4.0


@dataclass(frozen=True)
class EvaluateMetric:
    """A module of the `evaluate` library, on that module's own scale.

    `key` chooses the number in the module's result; None stands for its only one. `flat` modules take one reference
    for each example. `options` go to the module's `compute`.
    """

    name: str
    signature: str
    higher_is_better: bool
    module: evaluate.EvaluationModule
    key: str | None
    flat: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def sample_scores(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """The module's number for each example by itself, with the sign turned where lower is better; see `Metric`.

        Raises:
            ValueError: also where the module fails, or several numbers in its result need the option `key`.
        """
        check_examples(predictions, references)
        whole = self._result(predictions, references)
        values = whole if isinstance(whole, list) else self._sample_values(predictions, references)
        return values if self.higher_is_better else [-value for value in values]

    def resampled_scores(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], indices: np.ndarray
    ) -> np.ndarray:
        """The corpus score [R] of each row of `indices` [R, N]; see `Metric`.

        Where the score is the mean over the examples (to 1e-9), so is that of each resample. Any other module has to
        run R times over the whole corpus.
        """
        check_examples(predictions, references)
        whole = self._result(predictions, references)
        if isinstance(whole, list):
            return resampled_means(whole, indices)
        try:
            values = self._sample_values(predictions, references)
        except ValueError:
            values = [np.nan]  # some modules, correlations for one, are not defined for a single example
        if abs(np.mean(values) - whole) <= 1e-9:
            return resampled_means(values, indices)
        rows = indices.tolist()
        scores = [self._result([predictions[i] for i in row], [references[i] for i in row]) for row in rows]
        return np.array(scores, dtype=np.float64)

    def corpus_score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Score:
        """The module's number for all examples, with its bootstrap interval; see `Metric`."""
        return score_with_interval(self, predictions, references, n_bootstrap, confidence, seed)

    def _sample_values(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        results = [self._result([p], [texts]) for p, texts in zip(predictions, references, strict=True)]
        return [float(np.mean(result)) for result in results]

    def _result(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float | list[float]:
        if self.flat:
            references = [self._only(texts, index) for index, texts in enumerate(references)]
        else:
            references = [list(texts) for texts in references]
        try:
            result = self.module.compute(predictions=list(predictions), references=references, **self.options)
        except Exception as error:  # a module is anyone's script
            reason = " ".join(str(error).split())
            raise ValueError(f"metric {self.name!r} failed with {type(error).__name__}: {reason}") from error
        return self._choose(result, len(predictions))

    def _only(self, texts: Sequence[str], index: int) -> str:
        if len(texts) > 1:
            raise ValueError(f"metric {self.name!r} takes one reference, and example {index} has {len(texts)}")
        return texts[0]

    def _choose(self, result: object, n_examples: int) -> float | list[float]:
        if not isinstance(result, Mapping):
            raise ValueError(f"metric {self.name!r} gave a {type(result).__name__}, not a dictionary of numbers")
        numbers = [key for key, value in result.items() if isinstance(value, Real)]
        key = self.key or (numbers[0] if len(numbers) == 1 else None)
        value = result.get(key)
        if isinstance(value, Real):
            return float(value)
        if isinstance(value, list) and len(value) == n_examples:  # as BERTScore's, one number for each example
            return [float(number) for number in value]
        problem = f"has no number {key!r}" if key else "has no single number"
        raise ValueError(f"metric {self.name!r} {problem}; choose one by the option `key`: {', '.join(result)}")


def load(name: str, **options: Any) -> EvaluateMetric:
    """The metric `evaluate:NAME_OR_PATH`.

    Options: `key` chooses a number where the result has several (a list with a number for each example will do too);
    `higher_is_better` (default true) says which way the number points; `config_name` goes to `evaluate.load`; all
    others go to the module's `compute`. A metric of the Hub is a script: it runs only with `trust_remote_code`.

    Raises:
        ValueError: a script that is not trusted, or there is no such metric, no network and no cached copy, a package
            it needs is missing, or it scores something else than texts against references.
    """
    own = {option: value for option, value in options.items() if option in OPTIONS}
    check_options(name, own, OPTIONS)
    compute_options = {option: value for option, value in options.items() if option not in OPTIONS}
    if not own.get("trust_remote_code") and not _is_local(name):
        raise ValueError(
            f"metric {name!r} is a script of the Hugging Face Hub, which runs with your rights; read it, and if you "
            f"trust it write {{name: {name}, trust_remote_code: true}}, or give the path of a local copy: "
            "evaluate:path/to/metric"
        )
    module = _load_module(name, own.get("config_name"))
    settings = "".join(f"{option}:{value}|" for option, value in options.items() if option != "trust_remote_code")
    return EvaluateMetric(
        name,
        f"{settings}version:evaluate-{evaluate.__version__}",
        own.get("higher_is_better", True),
        module,
        own.get("key"),
        _takes_one_reference(name, module),
        compute_options,
    )


def _path(name: str) -> str:
    return os.path.expanduser(name.removeprefix("evaluate:"))


def _is_local(name: str) -> bool:
    """Whether a name is the path of a script, by its form or because the script is there."""
    path = _path(name)
    there = Path(path).is_file() or Path(path, f"{Path(path).name}.py").is_file()
    return there or path.startswith((".", "/")) or path.endswith(".py")


def _load_module(name: str, config_name: str | None) -> evaluate.EvaluationModule:
    path = _path(name)
    before = evaluate.config.HF_EVALUATE_OFFLINE
    # The library waits up to 100 s for each of several requests; offline it goes straight to its cache.
    if not _is_local(name):
        evaluate.config.HF_EVALUATE_OFFLINE = before or _offline()
    try:
        return evaluate.load(path, config_name, keep_in_memory=True)
    except Exception as error:  # a module is anyone's script
        reason = " ".join(str(error).split())
        raise ValueError(
            f"metric {name!r} cannot be loaded ({reason}); the evaluate library downloads the script of a metric from "
            "the Hugging Face Hub on first use, so without a network give the path of a local copy: "
            "evaluate:path/to/metric"
        ) from error
    finally:
        evaluate.config.HF_EVALUATE_OFFLINE = before


def _offline() -> bool:
    """Whether the environment says so or the Hub does not answer within `PROBE_SECONDS`."""
    if any(os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE") for variable in OFFLINE_VARIABLES):
        return True
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(evaluate.config.HF_ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except OSError:
            return
        answered.set()

    # In a thread, because the time limit of a connection does not cover the look-up of its name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return not answered.is_set()


def _takes_one_reference(name: str, module: evaluate.EvaluationModule) -> bool:
    """Whether the module's references are single texts, where it does not take lists of texts as well."""
    choices = module.features if isinstance(module.features, list) else [module.features]
    inputs = set(choices[0])
    if inputs != {"predictions", "references"}:
        raise ValueError(f"metric {name!r} needs {', '.join(sorted(inputs))}; there are predictions and references")
    choices = [choice for choice in choices if _is_text(choice["predictions"])]
    if not choices:
        raise ValueError(f"metric {name!r} does not score texts: its inputs are {module.features}")
    return all(_is_text(choice["references"]) for choice in choices)


def _is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
