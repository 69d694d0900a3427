"""Guess from the first rows of a data set which of its columns make an example."""

from collections.abc import Callable, Sequence

from datasets import Dataset

from pipeline.tasks.chats import read_messages, split_answer
from pipeline.tasks.examples import Unusable
from pipeline.tasks.text_rows import Row
from pipeline.tasks.types import TaskError

# Names of columns in the order in which they are taken; capitals do not matter.
PROMPTS = ("prompt", "question", "instruction", "query", "input", "source", "src", "document", "article", "dialogue")
PROMPTS += ("problem", "passage", "text")
ANSWERS = ("references", "completion", "response", "responses", "answer", "answers", "output", "target", "tgt")
ANSWERS += ("summary", "highlights", "solution", "translation", "chosen")
CHATS = ("messages", "conversations", "conversation", "chat", "dialog")
LOOKED_AT = 200  # rows, for a value where the first has none
CONTEXTS = ("input", "context")  # what an instruction or a question is about, where a data set has it apart


def guess_columns(data: Dataset) -> dict[str, str]:
    """Return the keys of a task over columns that fit the first row: `messages`, or a prompt and its answer.

    Where the first row has no value, the first value of the column counts.

    Raises:
        TaskError: no columns are known by their names or by what they hold, or a chat cannot be read.
    """
    row = data[0]
    for name in [name for name, value in row.items() if value is None]:
        values = data.select_columns(name)[:LOOKED_AT][name]
        row[name] = next((value for value in values if value is not None), None)
    texts = [name for name, value in row.items() if isinstance(value, str) and value.strip()]
    pair = row.get("translation")
    if isinstance(pair, dict) and len(pair) == 2:
        source, target = pair
        return {"prompt": f"{{translation[{source}]}}\n", "references": f"{{translation[{target}]}}"}
    chats = [name for name in row if _holds_answered_chat(name, row)]
    if named := [name for name in chats if name.lower() in CHATS]:
        return {"messages": named[0]}
    prompt = _first(PROMPTS, row, _is_prompt)
    answer = _first(ANSWERS, row, _is_answer, without=prompt)
    if prompt is not None and answer is not None:
        return _prompt_key(prompt, row) | _answer_key(answer, row[answer])
    if chats:
        return {"messages": chats[0]}
    if any("rejected" in name.lower() for name in row):
        raise TaskError(
            f"task: the rows are pairs of answers without a column of the prompt ({', '.join(row)}); they belong in "
            "reward.pairs, and the task needs rows with a prompt and its answer"
        )
    if len(texts) == 2:
        return {"prompt": f"{{{texts[0]}}}\n", "completion": texts[1]}
    for name in row:
        if name.lower() in CHATS and isinstance(row[name], list):
            _read_chat(name, row)
    raise TaskError(
        f"task: cannot tell which columns hold prompts and answers among {', '.join(row)}; say it, such as "
        f"prompt={next(iter(row))} references={list(row)[-1]}"
    )


def _first(names: Sequence[str], row: Row, fits: Callable[[object], bool], without: str | None = None) -> str | None:
    """Return the first of the names that is a column with a fitting value."""
    columns = {column.lower(): column for column in row if column != without}
    return next((columns[name] for name in names if name in columns and fits(row[columns[name]])), None)


def _is_prompt(value: object) -> bool:
    is_chat = isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]
    return is_chat or (isinstance(value, str) and bool(value.strip()))


def _is_answer(value: object) -> bool:
    if isinstance(value, dict):  # as SQuAD has them
        value = value.get("text")
    return isinstance(value, str) or (isinstance(value, list) and bool(value))


def _prompt_key(column: str, row: Row) -> dict[str, str]:
    """Return the prompt: a column of chats, or a template that ends the line, with the context before or after it."""
    if isinstance(row[column], list):
        return {"prompt": column}
    context = _first(CONTEXTS, row, lambda value: isinstance(value, str), without=column)
    if context is None:
        return {"prompt": f"{{{column}}}\n"}
    order = (column, context) if column.lower() == "instruction" else (context, column)
    return {"prompt": "".join(f"{{{name}}}\n" for name in order)}


def _answer_key(column: str, value: object) -> dict[str, str]:
    """Return the answer: one text or chat that SFT learns, or a list of texts of which each is right."""
    if isinstance(value, dict):
        return {"references": f"{{{column}[text]}}"}
    is_texts = isinstance(value, list) and isinstance(value[0], str)
    return {"references" if is_texts else "completion": column}


def _holds_answered_chat(column: str, row: Row) -> bool:
    try:
        _read_chat(column, row)
    except TaskError:
        return False
    return True


def _read_chat(column: str, row: Row) -> None:
    try:
        split_answer(read_messages(column, row), column)
    except Unusable as reason:
        raise TaskError(f"task.messages: {reason}") from reason
