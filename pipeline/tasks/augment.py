"""More training examples for SFT: prompts with words left out or misspelt, or what a user's function makes of each.

Sources: Gal and Ghahramani, A Theoretically Grounded Application of Dropout in Recurrent Neural Networks (2016), for
word dropout; Belinkov and Bisk, Synthetic and Natural Noise Both Break Neural Machine Translation (2018), for noise.
"""

import inspect
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset, Features, Value

from pipeline.runtime.messages import did_you_mean
from pipeline.runtime.seeds import derive_seed
from pipeline.runtime.user_code import FORMS, UserCodeError, is_user_code, load_user_object
from pipeline.tasks.types import TaskError

Example = dict[str, Any]
Growth = Callable[[Example, random.Random], Sequence[Example]]
ROW = "augmented_row"  # the row of the training split that an example was made of


@dataclass(frozen=True)
class AugmentConfig:
    """One line of `task.augment`: a change of prompts, or a function from an example to a list of examples.

    `word_dropout` leaves out each word with probability `rate`; `source_noise` swaps, leaves out or doubles a letter
    of it. Both add `copies` changed copies to each example. A function gets the example (`prompt`, `completion` and
    the columns of the data), and a `random.Random` where it has an argument `rng`; what it returns takes the place of
    the example.
    """

    name: str  # word_dropout, source_noise, or the dotted path of a function
    rate: float = 0.1  # of the first two: the share of the words that change
    copies: int = 1  # likewise: changed copies of each example

    def __post_init__(self) -> None:
        if self.name not in CHANGES and not is_user_code(self.name):
            hint = did_you_mean(self.name, CHANGES) or ";"
            names = f"there are {', '.join(CHANGES)} and functions of your own ({FORMS})"
            raise TaskError(f"task.augment: unknown name {self.name!r}{hint} {names}")
        if is_user_code(self.name) and (self.rate, self.copies) != (AugmentConfig.rate, AugmentConfig.copies):
            raise TaskError(f"task.augment: rate and copies would do nothing: {self.name!r} decides what it returns")
        if not 0 < self.rate < 1:
            raise TaskError(f"task.augment: rate must be between 0 and 1, found {self.rate}")
        if self.copies < 1:
            raise TaskError(f"task.augment: copies must be at least 1, found {self.copies}")


def word_dropout(text: str, rate: float, rng: random.Random) -> str:
    """Leave out each word with probability `rate`, but not all of them."""
    words = re.findall(r"\S+\s*", text)
    return "".join([word for word in words if rng.random() >= rate] or words[:1]).rstrip()


def source_noise(text: str, rate: float, rng: random.Random) -> str:
    """Misspell each word of two letters or more with probability `rate`."""
    return re.sub(r"\S{2,}", lambda word: _misspelt(word[0], rng) if rng.random() < rate else word[0], text)


def _misspelt(word: str, rng: random.Random) -> str:
    """Swap two neighbouring letters of a word, leave out the first of them, or double it."""
    i = rng.randrange(len(word) - 1)
    first, second = word[i], word[i + 1]
    return word[:i] + rng.choice((second + first, second, first + first + second)) + word[i + 2 :]


CHANGES: Mapping[str, Callable[[str, float, random.Random], str]] = {
    "word_dropout": word_dropout,
    "source_noise": source_noise,
}


def growth_factor(steps: Sequence[AugmentConfig]) -> int | None:
    """Return how many examples become of one; None where a function of the user decides that."""
    factor = 1
    for step in steps:
        if step.name not in CHANGES:
            return None
        factor *= 1 + step.copies
    return factor


def augment_examples(
    steps: Sequence[AugmentConfig], examples: Dataset, fields: Sequence[str], seed: int
) -> tuple[Dataset, list[int]]:
    """Make the augmented examples, one step after the other; return them and the row that each was made of.

    The random numbers of an example depend on the seed and its row alone, so every process and every restart makes the
    same examples. `fields` are the columns that the prompt is made of, whose texts change in it; without any, or where
    the prompt holds none of them, all of it changes, in a chat the last message of the user.

    Raises:
        TaskError: a function that cannot be loaded, fails, or returns no list of examples; no example is left.
    """
    functions = [_growth(step, fields) for step in steps]

    def grow(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        grown: list[Example] = []
        for i, row in enumerate(rows):
            made = [{name: column[i] for name, column in batch.items()}]
            for number, function in enumerate(functions):
                rng = random.Random(derive_seed(seed, f"augmentation {number}", row))
                made = [new for old in made for new in function(old, rng)]
            grown += [{**example, ROW: row} for example in made]
        return {name: [example[name] for example in grown] for name in ("prompt", "completion", ROW)}

    features = {name: examples.features[name] for name in ("prompt", "completion")} | {ROW: Value("int64")}
    augmented = examples.map(
        grow,
        batched=True,
        with_indices=True,
        remove_columns=examples.column_names,
        features=Features(features),
        load_from_cache_file=False,  # an edit of a user's function is no part of the cache's key
        desc="Augmenting",
    )
    if not len(augmented):
        raise TaskError("task.augment: it leaves no training example")
    return augmented.remove_columns(ROW), list(augmented[ROW])


def _growth(step: AugmentConfig, fields: Sequence[str]) -> Growth:
    if step.name in CHANGES:
        change = partial(CHANGES[step.name], rate=step.rate)
        return lambda example, rng: [example, *(_changed(example, fields, change, rng) for _ in range(step.copies))]
    try:
        function = load_user_object(step.name)
        takes_rng = "rng" in inspect.signature(function).parameters
    except (UserCodeError, TypeError, ValueError) as error:
        raise TaskError(f"task.augment: {step.name!r}: {error}") from error
    return partial(_call, step.name, function, takes_rng)


def _call(name: str, function: Callable, takes_rng: bool, example: Example, rng: random.Random) -> list[Example]:
    """Call a user's function on an example, and check what it returns."""
    try:
        made = function(example, rng=rng) if takes_rng else function(example)
    except Exception as error:  # a user's function may raise anything
        raise TaskError(f"task.augment: {name!r} raised {type(error).__name__}: {error}") from error
    kinds = {key: type(example[key]) for key in ("prompt", "completion")}
    right = isinstance(made, list) and all(
        isinstance(new, dict) and all(isinstance(new.get(key), kind) and new[key] for key, kind in kinds.items())
        for new in made
    )
    if not right:
        shape = ", ".join(f"{key}: {'a text' if kind is str else 'messages'}" for key, kind in kinds.items())
        raise TaskError(f"task.augment: {name!r} must return a list of examples {{{shape}}}, found {str(made)[:80]!r}")
    return made


def _changed(example: Example, fields: Sequence[str], change: Callable[..., str], rng: random.Random) -> Example:
    """Return a copy of an example with another prompt."""
    prompt, texts = example["prompt"], [example[f].strip() for f in fields if isinstance(example.get(f), str)]
    if isinstance(prompt, str):
        return {**example, "prompt": _changed_text(prompt, texts, change, rng)}
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None or not isinstance(prompt[last]["content"], str):
        return example
    content = _changed_text(prompt[last]["content"], texts, change, rng)
    return {**example, "prompt": [*prompt[:last], {**prompt[last], "content": content}, *prompt[last + 1 :]]}


def _changed_text(text: str, texts: Sequence[str], change: Callable[..., str], rng: random.Random) -> str:
    """Change those of `texts` that a prompt holds, or all of it; white space around it stays."""
    for field in [field for field in texts if field and field in text] or [text.strip()]:
        text = text.replace(field, change(field, rng=rng), 1)
    return text
