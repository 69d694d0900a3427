"""Find before a run starts whether a recipe's task and its model are both of speech, and what speech cannot have."""

from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_config
from pipeline.models.prompt_lengths import decoder_room
from pipeline.models.speech import MOST_GIVEN, SPEECH_MODELS, reads_sound
from pipeline.recipe.types import Recipe
from pipeline.tasks import TASK_NAMES, speech


def check_speech(recipe: Recipe) -> None:
    """Refuse speech for a model that reads text and the other way round, and stages that speech does not have.

    Raises:
        ValueError: naming the key.
    """
    is_speech, hears = isinstance(recipe.task.config, speech.Config), model_hears(recipe.model)
    if is_speech and not hears:
        raise ValueError(
            f"task.name: speech needs a model that hears ({', '.join(SPEECH_MODELS)}); name one in "
            "model.model_name_or_path, or set model.from_scratch.architecture: whisper"
        )
    if hears and not is_speech and recipe.task.name in TASK_NAMES:
        raise ValueError(f"task.name: the model hears sound, found {recipe.task.name!r}; use speech")
    if not is_speech:
        return
    speech.check_reachable(recipe.task.config)
    if recipe.reward is not None:
        raise ValueError("reward: a reward model reads the prompt as text, and the prompts of speech are sound")
    if recipe.augment:
        raise ValueError(
            "task.augment: it changes the text of prompts, and the prompts of speech are sound; remove it"
        )
    room = _room(recipe)
    lengths = {"eval.max_new_tokens": recipe.eval.max_new_tokens}
    lengths |= {} if recipe.ppo is None else {"ppo.response_length": recipe.ppo.response_length}
    for key, length in lengths.items():
        if length is not None and length > room:
            raise ValueError(
                f"{key}: the decoder writes at most {room} tokens, as its positions hold {MOST_GIVEN} given ones too, "
                f"found {length}; lower it"
            )


def model_hears(config: ModelConfig) -> bool:
    """Tell whether the model of a recipe hears sound, without loading it."""
    if config.from_scratch is not None:
        return config.from_scratch.architecture in SPEECH_MODELS
    return reads_sound(load_config(config.model_name_or_path, config))


def _room(recipe: Recipe) -> int:
    scratch = recipe.model.from_scratch
    if scratch is not None:
        return scratch.max_position_embeddings - MOST_GIVEN
    return decoder_room(load_config(recipe.model.model_name_or_path, recipe.model))
