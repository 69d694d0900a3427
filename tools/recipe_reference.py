"""Write the tables of docs/recipe.md from the config classes: keys, types, defaults, and the comments beside them.

python -m tools.recipe_reference
python -m tools.recipe_reference --check     # exit code 1 where the page is out of date; writes nothing
"""

import ast
import dataclasses
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

from pipeline.evaluation import config as evaluation
from pipeline.models import config as models
from pipeline.recipe import refused
from pipeline.rewards import config as rewards
from pipeline.rewards.pairs import settings as pairs
from pipeline.tasks import columns, parallel, preferences, speech
from pipeline.trainers.huggingface import reward as reward_trainer
from pipeline.trainers.huggingface import sft as sft_trainer
from pipeline.trainers.ppo import config as ppo

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipe.md"
CLASSES = {
    "model": models.ModelConfig,
    "from_scratch": models.FromScratchConfig,
    "parallel": parallel.Config,
    "columns": columns.Config,
    "speech": speech.Config,
    "ppo": ppo.PPOConfig,
    "rewards": rewards.RewardConfig,
    "eval": evaluation.EvalConfig,
    "sampled pairs": pairs.SampledPairs,
    "preference data": preferences.Config,
}
CHOICES: dict[type, Mapping[str, tuple[str, ...]]] = {
    ppo.PPOConfig: ppo.CHOICES,
    models.ModelConfig: {"dtype": models.DTYPES, "bnb_4bit_quant_type": models.QUANT_TYPES},
    models.FromScratchConfig: {"architecture": models.FROM_SCRATCH_ARCHITECTURES},
}
RECIPE_NAMES = {(pairs.SampledPairs, "origins"): "from"}  # where the recipe's key is not the field's name
WORDS = {str: "text", bool: "true or false", int: "whole number", float: "number", NoneType: "null"}


def field_comments(cls: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass: those on the lines just above it, and the one on its line."""
    source = textwrap.dedent(inspect.getsource(cls)) + "\n"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    lines = {row: (column, text) for (row, column), text in comments.items()}
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    by_field = {}
    for field in fields:
        above, row = [], field.lineno - 1
        while row in lines and lines[row][0] == field.col_offset:  # a line that is nothing but a comment
            above.insert(0, lines[row][1])
            row -= 1
        on_it = [lines[field.end_lineno][1]] if field.end_lineno in lines else []
        by_field[field.target.id] = " ".join(above + on_it)
    return by_field


def type_words(hint: object, choices: tuple[str, ...]) -> str:
    """Return a type as a recipe's author thinks of it."""
    if choices:
        return " or ".join(f"`{choice}`" for choice in choices)
    options = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    return " or ".join(option_words(option) for option in options)


def option_words(option: object) -> str:
    """Return one of the types that a key may have."""
    if get_origin(option) in (list, tuple):
        item = get_args(option)[0]
        if get_origin(item) is tuple:
            return "list of `[episodes, value]`"
        return "list of names or mappings" if item not in WORDS else f"list of {WORDS[item]}s"
    return WORDS.get(option, "mapping")


def default_words(field: dataclasses.Field) -> str:
    """Return a default as a recipe writes it."""
    if field.default is dataclasses.MISSING:
        return "none" if field.default_factory is not dataclasses.MISSING else "required"
    return plain(field.default)


def plain(value: object) -> str:
    """Return a value as a recipe writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return ", ".join(plain(getattr(item, "name", item)) for item in value) or "none"
    if isinstance(value, float):
        return f"`{value:g}`" if abs(value) >= 1e-3 or value == 0 else f"`{value:.0e}`".replace("e-0", "e-")
    return f"`{value}`" if value != "" else '`""`'


def fields_table(cls: type) -> list[str]:
    """Return a table with a row for each key of a section."""
    hints, comments = get_type_hints(cls), field_comments(cls)
    rows = ["| key | type | default | what it does |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        key = RECIPE_NAMES.get((cls, field.name), field.name)
        words = type_words(hints[field.name], tuple(CHOICES.get(cls, {}).get(field.name, ())))
        comment = re.sub(r"\bNone\b", "null", comments.get(field.name, "")).replace("|", "\\|")
        comment = re.sub(r"<([^>]*)>", r"`<\1>`", comment)
        rows.append(f"| `{key}` | {words} | {default_words(field)} | {comment} |")
    return rows


def refused_table(reasons: Mapping[str, str]) -> list[str]:
    """Return a table of the reasons why keys of TRL's class are refused, with the keys of each."""
    groups: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        groups.setdefault(reason, []).append(f"`{key}`")
    rows = ["| refused keys | why |", "| --- | --- |"]
    return rows + [f"| {', '.join(keys)} | {reason[:1].upper() + reason[1:]} |" for reason, keys in groups.items()]


def defaults_table(defaults: Mapping[str, object]) -> list[str]:
    """Return a table of the defaults that differ from those of TRL's class."""
    rows = ["| key | Relay's default |", "| --- | --- |"]
    return rows + [f"| `{key}` | {plain(value)} |" for key, value in sorted(defaults.items())]


def blocks() -> dict[str, list[str]]:
    """Return the lines of every generated part of the page by its name."""
    for_reward_only = {k: v for k, v in refused.REFUSED_REWARD_KEYS.items() if refused.REFUSED_SFT_KEYS.get(k) != v}
    return {name: fields_table(cls) for name, cls in CLASSES.items()} | {
        "refused sft keys": refused_table(refused.REFUSED_SFT_KEYS),
        "refused for encoder-decoders": refused_table(refused.REFUSED_FOR_ENCODER_DECODERS),
        "refused reward keys": refused_table(for_reward_only),
        "sft defaults": defaults_table(sft_trainer.DEFAULTS),
        "reward defaults": defaults_table(reward_trainer.DEFAULTS),
    }


def filled(page: str) -> str:
    """Return the page with every generated part made again.

    Raises:
        KeyError: the page asks for a part that does not exist.
    """
    contents = blocks()

    def fill(match: re.Match) -> str:
        name = match[1]
        return f"<!-- begin {name} -->\n\n" + "\n".join(contents[name]) + f"\n\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (.*?) -->.*?<!-- end \1 -->", fill, page, flags=re.S)


def main(arguments: list[str]) -> int:
    """Write the page, or only check it; return the exit code."""
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page)
    if arguments == ["--check"]:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
