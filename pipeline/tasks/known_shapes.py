"""Say which keys of a recipe read rows of a well-known shape, for messages about columns that are not there."""

from collections.abc import Collection

PROMPTS = ("prompt", "question", "query", "instruction", "source", "document", "article")
ANSWERS = ("completion", "response", "answer", "output", "target", "summary", "highlights")
REFERENCES = ("references", "answers", "summaries", "responses")
PROMPTS_OF_PAIRS = ("prompt", "conversations", "messages", "question", "query", "instruction", "input")
CHATS = ("messages", "conversations")


def task_keys(columns: Collection[str]) -> str | None:
    """Return the keys of `task` that read rows with these columns; None for rows of no known shape."""
    chats = next((name for name in CHATS if name in columns), None)
    references = next((name for name in REFERENCES if name in columns), None)
    if chats is not None:
        return f"messages: {chats}" if references is None else f"prompt: {chats} and references: {references}"
    if {"instruction", "output"} <= set(columns):
        prompt = '"{instruction}\\n{input}"' if "input" in columns else "instruction"
        return f"prompt: {prompt} and completion: output"
    if "chosen" in columns:
        return "prompt: prompt and completion: chosen" if "prompt" in columns else "messages: chosen"
    prompt = next((name for name in PROMPTS if name in columns), None)
    answer = next((name for name in ANSWERS if name in columns), None)
    if prompt is None or (answer or references) is None:
        return None
    return f"prompt: {prompt} and {f'references: {references}' if answer is None else f'completion: {answer}'}"


def pair_keys(columns: Collection[str]) -> str | None:
    """Return the keys of `reward.pairs` that read rows with these columns; None for rows of no known shape."""
    prompt = prompt_of_pairs(columns)
    sides = [next((name for name in columns if side in name), None) for side in ("chosen", "rejected")]
    if None in sides:
        return None
    named = [f"chosen: {sides[0]}", f"rejected: {sides[1]}"]
    return ", ".join(named if prompt is None else [f"prompt: {prompt}", *named])


def prompt_of_pairs(columns: Collection[str]) -> str | None:
    """Return the column that is likely to hold the prompts of pairs."""
    return next((name for name in PROMPTS_OF_PAIRS if name in columns), None)
