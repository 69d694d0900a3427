"""The clips of a task as its model hears them: their features, and the language that the decoder is told."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.models.clips import make_clips
from pipeline.models.speech import CLIP, SPEECH_MODELS, is_multilingual, language_token, reads_sound
from pipeline.runtime.messages import did_you_mean
from pipeline.stages.rows import splits_of, without_rows
from pipeline.tasks import Task, TaskError
from pipeline.tasks.speech import LANGUAGE


def spoken_languages(task: Task) -> list[str]:
    """Return the languages of the training rows, which a speech model from scratch learns to be told."""
    return [] if task.sound is None else sorted({language for language in task.train[LANGUAGE] if language})


def with_clips(task: Task, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Task:
    """Give every row the features of its sound in place of it; clips beyond the model's window are left out.

    Raises:
        TaskError: as `_check_kind`; a clip that cannot be used or a language that the model does not know, unless
            `task.skip_broken_rows` leaves such rows out.
    """
    _check_kind(task, config)
    if task.sound is None:
        return task
    for split in splits_of(task):
        task = _with_clips(task, split, tokenizer, config)
    return replace(task, sound=None)


def _check_kind(task: Task, config: PretrainedConfig) -> None:
    """Refuse speech for a model that reads text, and text for one that hears.

    Raises:
        TaskError: naming the task and the type of the model.
    """
    if task.sound is not None and not reads_sound(config):
        raise TaskError(
            f"task.name: speech needs a model that hears ({', '.join(SPEECH_MODELS)}), and this one is a "
            f"{config.model_type!r}; name another model, or another task"
        )
    if task.sound is None and reads_sound(config):
        raise TaskError(f"task.name: a {config.model_type!r} hears sound and reads no text; use task.name: speech")


def _with_clips(task: Task, split: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Task:
    rows, told = getattr(task, split), is_multilingual(config, tokenizer)
    features, languages = make_clips(rows, task.sound, config), rows[LANGUAGE][:]
    problems = dict.fromkeys(range(len(rows)))
    if told:
        problems |= _language_problems(languages, tokenizer)
    problems |= {row: f"the clip {rows[row]['prompt']!r} {problem}" for row, problem in features.problems.items()}
    too_long = [problems[row] if row in features.too_long else None for row in problems]
    others = [problem for row, problem in problems.items() if row not in features.too_long]
    clips = [
        None if clip is None else {**clip, "language": language if told else None}
        for clip, language in zip(features.clips, languages, strict=True)
    ]
    heard = rows.remove_columns([task.sound, LANGUAGE]).add_column(CLIP, clips)
    task = without_rows(replace(task, **{split: heard}), split, too_long, always=True)
    return without_rows(task, split, others)


def _language_problems(languages: Sequence[str | None], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Say by row which languages a multilingual model is not told, or does not know."""
    vocabulary, problems = tokenizer.get_vocab(), {}
    for row, language in enumerate(languages):
        if language is None:
            problems[row] = (
                "task.language: missing, and this model is told what is spoken; set it, such as en, or "
                "task.language_column"
            )
        elif language_token(language) not in vocabulary:
            codes = [token[2:-2] for token in vocabulary if token.startswith("<|") and len(token) in (6, 7)]
            hint = did_you_mean(language, codes) or ";"
            problems[row] = f"task.language: {language!r} is no language of this model{hint} use a code such as en"
    return problems
