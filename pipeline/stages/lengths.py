"""Where completions end as far as the recipe leaves it to the data."""

from dataclasses import replace

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.models.completion_lengths import SHARE, reference_length
from pipeline.recipe import Recipe
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.runtime.messages import say
from pipeline.tasks import Task


def missing_length(recipe: Recipe) -> str | None:
    """Return the first key of a length that the recipe leaves to the data; None where it sets all lengths."""
    lengths = {"ppo.response_length": recipe.ppo.response_length} if recipe.ppo is not None else {}
    lengths["eval.max_new_tokens"] = recipe.eval.max_new_tokens
    if recipe.reward is not None and isinstance(recipe.reward.pairs, SampledPairs):
        lengths["reward.pairs.max_new_tokens"] = recipe.reward.pairs.max_new_tokens
    return next((key for key, length in lengths.items() if length is None), None)


def with_lengths(recipe: Recipe, task: Task, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Recipe:
    """Return the recipe with every length set, from the references of the rows that PPO answers; print the length.

    Raises:
        ValueError: as `reference_length`.
    """
    key = missing_length(recipe)
    if key is None:
        return recipe
    length = reference_length(tokenizer, config, task.prompts, key)
    say(f"{key}: {length}, by the length of the references ({SHARE:.0%} fit, or the model reads no more)")
    ppo, reward, evaluation = recipe.ppo, recipe.reward, recipe.eval
    if ppo is not None:
        ppo = replace(ppo, response_length=ppo.response_length or length)
    if reward is not None and isinstance(reward.pairs, SampledPairs):
        pairs = replace(reward.pairs, max_new_tokens=reward.pairs.max_new_tokens or length)
        reward = replace(reward, pairs=pairs)
    evaluation = replace(evaluation, max_new_tokens=evaluation.max_new_tokens or length)
    return replace(recipe, ppo=ppo, reward=reward, eval=evaluation)
