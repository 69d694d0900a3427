"""Find before a run starts which of its models cannot be loaded: paths, weights, and tokenizers that do not fit."""

from collections.abc import Iterator

from transformers import PreTrainedModel

from pipeline.models.adapters import ALL_LINEAR, check_targets, fused_experts
from pipeline.models.hub import check_model_path
from pipeline.models.loading import check_weights, load_config, load_tokenizer, lora_config
from pipeline.models.weights import shown_weights
from pipeline.recipe.speech_checks import check_speech
from pipeline.recipe.types import Recipe
from pipeline.trainers.ppo.checks import check_special_tokens


def check_models(recipe: Recipe) -> None:
    """Check every language model from outside of the run that one of its stages loads; no weights are loaded.

    Raises:
        ValueError: as `check_speech`; a model that is not there, lacks weights, or has a tokenizer with special tokens
            that it has no embedding for, or layers that get no adapter; the message names the key.
    """
    models = dict(named_models(recipe))
    for path, key in models.items():
        check_model_path(path, key, recipe.model.revision_of(path))
    for path, key in models.items():
        config = recipe.model.in_own_template() if key == "eval.systems" else recipe.model
        try:
            model = check_weights(path, config)
            if model is not None:
                check_special_tokens(model, load_tokenizer(path, config))
        except ValueError as error:
            raise ValueError(f"{key}: {str(error).removeprefix('processing_class: ')}") from error
        if model is not None and key != "eval.systems" and trains_adapter(recipe):
            check_targets(model, lora_config(recipe.model))
    check_speech(recipe)


def named_models(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the path or Hub id of each language model that a recipe names, with the key that names it."""
    for system in recipe.eval.further_systems:
        yield system.path, "eval.systems"
    if recipe.sft_is_external:
        yield recipe.ppo.sft_model_path, "ppo.sft_model_path"
    if recipe.model.model_name_or_path is not None:
        yield recipe.model.model_name_or_path, "model.model_name_or_path"


def reward_base(recipe: Recipe) -> PreTrainedModel | None:
    """Return the model that PPO starts from, or SFT does, without weights; None where it is built from scratch."""
    path = recipe.ppo.sft_model_path if recipe.sft_is_external else recipe.model.model_name_or_path
    return None if path is None else check_weights(path, recipe.model)


def model_notes(recipe: Recipe) -> list[str]:
    """Return what a user should know of the recipe's model before it is trained."""
    config = recipe.model
    if config.model_name_or_path is None:
        return []
    kinds = load_config(config.model_name_or_path, config).architectures or []
    notes = [
        f"model.model_name_or_path: {config.model_name_or_path!r} was saved as {kind}, and no LM head beside "
        "its input embedding, which is used in its place; give the language model if there is one"
        for kind in kinds
        if kind.endswith("Classification")
    ]
    if config.lora_target_modules != ALL_LINEAR or not trains_adapter(recipe):
        return notes
    model = check_weights(config.model_name_or_path, config)
    if model is None or not (experts := fused_experts(model)):
        return notes
    return [
        *notes,
        f"model.lora_target_modules: {ALL_LINEAR} leaves out the experts of this {model.config.model_type} "
        f"({shown_weights(experts)}), their router and feed-forward layers beside them; the attention gets adapters",
    ]


def trains_adapter(recipe: Recipe) -> bool:
    """Tell whether a stage of the recipe trains an adapter as its `model.lora_*` keys describe it."""
    trains_reward = recipe.reward is not None and recipe.reward.model is None
    return recipe.sft.use_peft or trains_reward or (recipe.ppo is not None and recipe.ppo.use_peft)
