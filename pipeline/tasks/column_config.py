"""The keys of a task that reads columns: where the rows are, and which columns make an example."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.tasks.augment import AugmentConfig
from pipeline.tasks.examples import column_of, placeholders
from pipeline.tasks.parts import check_part
from pipeline.tasks.tables import SUFFIXES
from pipeline.tasks.types import SPLITS, TaskError, check_chat, check_limits


@dataclass(frozen=True)
class Config:
    """Say where the rows are, and which columns make an example.

    `path` is a local file (.json, .jsonl, .csv, .tsv, .parquet; `{split}` in it stands for the name of the split), a
    directory written by `save_to_disk`, or a Hub id, which `subset` and `revision` belong to. Relative paths start at
    `data_dir`; with another `data_dir` than the default, `path` is never a Hub id. In a recipe, `{recipe_dir}` in
    `data_dir` stands for the folder of the recipe's file. `train`, `validation` and `test` name the splits of the
    data, or parts of one: `train[:90%]` and `train[90%:]`. A file without `{split}` is all `train`.

    `prompt` and `completion` are each the name of a column that holds text, or a template with `{column}` in it;
    `{answers[text][0]}` reaches into a column. `references` is such a name or template, of a text or a list of texts.
    Without `completion` the first reference is the completion, without `references` the completion is the reference.

    `messages` is a column of chat messages, each with a role and a content, in place of the three: the last assistant
    message is the completion and those before it are the prompt; what follows it, and keys of a message other than
    those of tool calls, are left out. Messages of `from` and `value` are ShareGPT's; `messages_from` maps other names:
    `{role: speaker, content: text, customer: user}`. `prompt` and `completion` may be columns of messages too, as TRL
    has them. A chat that does not begin with a system message gets the text in the column `system` of its row, or
    `system` where it has none; `tools` is a column of the functions that a chat may call, used where the data have it.

    With `chat` plain prompts become the turn of a user. As `auto` it is what `run.py` decides from the model: true
    where a pretrained model's tokenizer has a chat template.

    Every column of the data travels to the reward functions; one called like what they get anyway (TAKEN_COLUMNS) is
    renamed: `prompt` to `data_prompt`. `language` is that of the completions.

    `cluster` is a column of the test split. Rows with the same value in it belong together, such as the questions of
    one paragraph or the sentences of one document: intervals and tests of the report resample them as a whole.

    `skip_broken_rows` leaves out, reports and counts rows that cannot be parsed or whose values cannot be used;
    without it they are errors.
    """

    path: str  # a file with {split} in its name, a save_to_disk directory, or a Hub id
    data_dir: str = "."  # where relative paths start; {recipe_dir} is the folder of the recipe
    subset: str | None = None  # of a Hub data set
    revision: str | None = None  # branch, tag or commit of a Hub data set
    train: str = "train"  # name of the split, or a part of one such as train[:90%]
    validation: str = "validation"  # likewise
    test: str = "test"  # likewise
    prompt: str | None = None  # a column, or a template such as 'Question: {question}'
    completion: str | None = None  # what SFT learns; None: the first reference
    references: str | None = None  # a text or a list of texts; None: the completion
    messages: str | None = None  # a column of chat messages, in place of the three above
    messages_from: Mapping[str, str] | None = None  # {role: speaker, content: text, customer: user}: names in the data
    tools: str | None = "tools"  # a column of functions that a chat may call, where the data have it
    chat: bool | str = "auto"  # a plain prompt is a user's turn; auto: where a pretrained model has a chat template
    system: str | None = None  # put in front of chats without a system message
    language: str | None = None  # of the completions, such as de: metrics choose their tokenizer by it
    max_train_examples: int | None = None  # keep the first rows only
    max_validation_examples: int | None = None  # likewise
    max_test_examples: int | None = None  # likewise
    ppo_examples: int | None = None  # the last training rows, which SFT does not see and PPO answers
    augment: tuple[AugmentConfig, ...] = ()  # of SFT's training examples: word_dropout, source_noise, or functions
    cluster: str | None = None  # a column: test rows with equal values are resampled together
    strip_thoughts: bool = False  # rewards and metrics do not see a <think>...</think> at the start of a completion
    skip_broken_rows: bool = False  # leave out and count rows that cannot be used, instead of stopping

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise TaskError("task.path: empty; give a file such as data/{split}.jsonl, or a Hub id")
        for split in SPLITS:
            check_part(getattr(self, split), split)
        self._check_columns()
        check_limits(
            max_train_examples=self.max_train_examples,
            max_validation_examples=self.max_validation_examples,
            max_test_examples=self.max_test_examples,
            ppo_examples=self.ppo_examples,
        )

    def _check_columns(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            number = "neither" if self.prompt is None else "both"
            raise TaskError(
                f"task: set exactly one of prompt and messages, found {number}; a column of chats is read by "
                "messages: COLUMN, other rows by prompt: and a column or a template, as '{instruction}\\n{input}'"
            )
        if self.messages is None and self.completion is None and self.references is None:
            raise TaskError("task: set completion or references, or both, found neither")
        if self.messages is not None and self.completion is not None:
            raise TaskError("task.completion: it would do nothing: the last assistant message is the completion")
        if self.messages is not None and self.chat is False:
            raise TaskError("task.chat: false would do nothing: task.messages names chats; remove one of them")
        check_chat(self.chat, self.system)
        if self.messages_from is not None and not {"role", "content"} & set(self.messages_from):
            raise TaskError(
                "task.messages_from: it maps neither role nor content; write {role: ..., content: ...} with the names "
                "that the data have"
            )
        for key in ("prompt", "completion", "references"):
            if (value := getattr(self, key)) is not None:
                placeholders(value, key)
        if self.cluster is not None and placeholders(self.cluster, "cluster"):
            raise TaskError(f"task.cluster: write the name of a column, found the template {self.cluster!r}")

    def local_path(self, split: str) -> Path:
        """Return the path of a split, if the data are local."""
        return Path(self.data_dir).expanduser() / Path(self.path.replace("{split}", split)).expanduser()

    @property
    def prompt_columns(self) -> list[str]:
        """Return the columns of the template that makes the prompt; none where it is one column."""
        return [] if self.prompt is None else [column_of(field) for field in placeholders(self.prompt, "prompt")]

    @property
    def is_local(self) -> bool:
        """Return whether `path` is a file or directory, by its form or because it exists."""
        looks_local = self.path.startswith((".", "/", "~")) or self.path.count("/") > 1 or "{split}" in self.path
        has_suffix = Path(self.path).suffix.lower() in SUFFIXES
        return looks_local or has_suffix or self.data_dir != "." or self.local_path("").exists()
