"""Find before a run starts which of its models cannot be loaded: paths, weights, and tokenizers that do not fit."""

from collections.abc import Iterator

from pipeline.models.hub import check_model_path
from pipeline.models.loading import check_weights, load_tokenizer
from pipeline.recipe.types import Recipe
from pipeline.trainers.ppo.checks import check_special_tokens


def check_models(recipe: Recipe) -> None:
    """Check every language model from outside of the run that one of its stages loads; no weights are loaded.

    Raises:
        ValueError: a model that is not there, lacks weights, or has a tokenizer with special tokens that it has no
            embedding for; the message names the key.
    """
    models = dict(named_models(recipe))
    for path, key in models.items():
        check_model_path(path, key)
    for path, key in models.items():
        try:
            model = check_weights(path, recipe.model)
            if model is not None:
                check_special_tokens(model, load_tokenizer(path, recipe.model))
        except ValueError as error:
            raise ValueError(f"{key}: {str(error).removeprefix('processing_class: ')}") from error


def named_models(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the path or Hub id of each language model that a recipe names, with the key that names it."""
    for system in recipe.eval.further_systems:
        yield system.path, "eval.systems"
    if recipe.sft_is_external:
        yield recipe.ppo.sft_model_path, "ppo.sft_model_path"
    if recipe.model.model_name_or_path is not None:
        yield recipe.model.model_name_or_path, "model.model_name_or_path"
