"""Exact match of the last number of a text: the reward and the metric of gsm8k.yaml.

```yaml
ppo:
  rewards:
    - {name: "last_number.py:reward"}
eval:
  metrics:
    - {name: "last_number.py:metric"}
```
"""

import re
from collections.abc import Sequence

from pipeline.metrics.mean_metric import MeanMetric

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def reward(completions: list, references: list[list[str]], **columns: object) -> list[float]:
    """Return 1 for each completion whose last number is that of a reference, else 0."""
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in completions]
    return [right_number(*example) for example in zip(texts, references, strict=True)]


def metric() -> MeanMetric:
    """Make the metric: the completions with the right number, in per cent."""
    return MeanMetric("last_number", "match:last-number", right_number)


def right_number(text: str, references: Sequence[str]) -> float:
    """Return 1 where the last number of a text is that of a reference; `1,000.0` is `1000`."""
    number = last_number(text)
    return float(number is not None and number in map(last_number, references))


def last_number(text: str) -> float | None:
    """Return the last number of a text, None where it has none."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
