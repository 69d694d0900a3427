"""Read parallel text: for each split a file of source lines and a file of target lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.tasks.augment import AugmentConfig
from pipeline.tasks.chats import Message, as_user_turn, with_system
from pipeline.tasks.encoding import decode_text
from pipeline.tasks.types import SPLITS, Task, TaskError, check_chat, check_limits, hold_out, make_split, render


@dataclass(frozen=True)
class Config:
    """Name the files of each split, and the template of a prompt.

    `source` and `target` are paths with `{split}` in them, below `data_dir`. A relative `data_dir` starts at the
    current folder; in a recipe, `{recipe_dir}` in it stands for the folder of the recipe's file.
    """

    source: str  # file with {split} in its name, a text in each line
    target: str  # likewise, the answers
    data_dir: str = "."  # where relative paths start; {recipe_dir} is the folder of the recipe
    prompt: str = "{source}\n"  # what the model reads
    train: str = "train"  # what {split} stands for
    validation: str = "validation"  # likewise
    test: str = "test"  # likewise
    language: str | None = None  # of the completions, such as de: metrics choose their tokenizer by it
    max_train_examples: int | None = None  # keep the first rows only
    max_validation_examples: int | None = None  # likewise
    max_test_examples: int | None = None  # likewise
    ppo_examples: int | None = None  # the last training rows, which SFT does not see and PPO answers
    augment: tuple[AugmentConfig, ...] = ()  # of SFT's training examples: word_dropout, source_noise, or functions
    chat: bool | str = "auto"  # a prompt is a user's turn; auto: where a pretrained model has a chat template
    system: str | None = None  # the system message of such chats
    strip_thoughts: bool = False  # rewards and metrics do not see a <think>...</think> at the start of a completion
    skip_broken_rows: bool = False  # leave out and count rows that the model cannot take, instead of stopping

    def __post_init__(self) -> None:
        for key in ("source", "target"):
            if "{split}" not in getattr(self, key):
                raise TaskError(
                    f"task.{key}: {getattr(self, key)!r} has no {{split}} in it, such as data/{{split}}.en"
                )
        if not self.prompt.strip():
            raise TaskError("task.prompt: empty; give a text with {source} in it")
        render(self.prompt, {"source": ""})
        check_chat(self.chat, self.system)
        check_limits(
            max_train_examples=self.max_train_examples,
            max_validation_examples=self.max_validation_examples,
            max_test_examples=self.max_test_examples,
            ppo_examples=self.ppo_examples,
        )

    def path(self, key: str, split: str) -> Path:
        """Return the file with the lines of `key` ("source" or "target") of a split."""
        file = render(getattr(self, key), {"split": getattr(self, split)}, f"task.{key}")
        return Path(self.data_dir).expanduser() / file


def files(config: Config) -> list[Path]:
    """Return every local file the task reads: a changed file makes a finished stage out of date.

    Raises:
        TaskError: one of them does not exist.
    """
    paths = [(key, config.path(key, split)) for split in SPLITS for key in ("source", "target")]
    for key, path in paths:
        if not path.is_file():
            raise TaskError(f"task.{key}: no file {str(path)!r}; set task.data_dir to the folder that holds the data")
    return [path for _, path in paths]


def load(config: Config) -> Task:
    """Read the six files into the three splits; pairs with an empty side are left out."""
    limits = {split: getattr(config, f"max_{split}_examples") for split in SPLITS}
    splits, left_out, places = {}, [], {}
    for split in SPLITS:
        source, target = read_sides(config, split)
        numbered = list(enumerate(zip(source, target, strict=True), 1))
        empty = [number for number, sides in numbered if not all(sides)]
        left_out += [f"line {number} of {_names(config, split)}: a side is empty" for number in empty]
        rows = [
            {"prompt": prompt_of_source(config, s), "completion": t, "references": [t], "source": s}
            for _, (s, t) in numbered
            if s and t
        ]
        splits[split] = make_split(rows, split, limits[split])
        lines = [number for number, sides in numbered if all(sides)]
        places[split] = partial(_place, lines, _names(config, split))
    task = Task(
        **splits,
        language=config.language,
        left_out=tuple(left_out),
        places=places,
        system=config.system,
        strip_thoughts=config.strip_thoughts,
        skip_broken_rows=config.skip_broken_rows,
    )
    return hold_out(task, config.ppo_examples)


def prompt_of_source(config: Config, source: str) -> str | list[Message]:
    """Return what the model reads of a source text: a plain text, or a chat where `config.chat` is True."""
    prompt = render(config.prompt, {"source": source})
    return with_system(as_user_turn(prompt), config.system) if config.chat is True else prompt


def _place(lines: Sequence[int], names: str, rows: Sequence[int]) -> str:
    numbers = ", ".join(str(lines[row]) for row in rows[:3])
    return f"line{'s' * (len(rows) > 1)} {numbers}{f' and {len(rows) - 3} more' * (len(rows) > 3)} of {names}"


def training_rows(config: Config) -> int:
    """Count the pairs that SFT and PPO have.

    Raises:
        TaskError: as `read_sides`.
    """
    rows = sum(1 for source, target in zip(*read_sides(config, "train"), strict=True) if source and target)
    return min(rows, config.max_train_examples or rows)


def read_sides(config: Config, split: str) -> list[list[str]]:
    """Return the lines of a split's two files, without the white space around them.

    Raises:
        TaskError: a file that is missing or not UTF-8, sides of unequal length, or no line with text on both.
    """
    files(config)
    source, target = (read_lines(config.path(key, split)) for key in ("source", "target"))
    if len(source) != len(target):
        raise TaskError(
            f"task: {str(config.path('source', split))!r} has {len(source)} lines and "
            f"{str(config.path('target', split))!r} has {len(target)}: parallel files must match line by line"
        )
    if not any(s and t for s, t in zip(source, target, strict=True)):
        raise TaskError(f"task: {_names(config, split)} have no line with a text on both sides ({len(source)} lines)")
    return [source, target]


def _names(config: Config, split: str) -> str:
    return " and ".join(repr(str(config.path(key, split))) for key in ("source", "target"))


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file, without the white space around them.

    Raises:
        TaskError: it is not UTF-8.
    """
    # Not splitlines(): it also breaks at U+2028 and its kin, which would shift one side against the other.
    lines = decode_text(path, "task").replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.strip() for line in lines]
