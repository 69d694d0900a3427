"""What the plan says of PPO: the values that the recipe leaves to Relay, and choices that often go wrong."""

from pipeline.models.completion_lengths import reference_length
from pipeline.models.loading import load_config, load_tokenizer
from pipeline.recipe import Recipe
from pipeline.recipe.document import Document
from pipeline.stages.lengths import missing_length
from pipeline.stages.task import task_config
from pipeline.tasks import TaskError, load_task, task_module
from pipeline.trainers.ppo.config import LEARNED, PPOConfig

MANY_EPOCHS = 2  # in more passes the rollout is of a policy that has moved on


def ppo_choices(recipe: Recipe) -> str:
    """Describe what Relay chooses where the recipe says nothing: learning rates, value function and lengths.

    Raises:
        RecipeError: the rows are read for a length, and no stage could use them.
    """
    ppo = recipe.ppo
    value = "no value function"
    if ppo.value_loss_weight:
        value = f"value function {ppo.value_function_learning_rate:g} (vf_coef {ppo.value_loss_weight:g})"
    kind = "LoRA" if ppo.use_peft else "all weights"
    return f"learning_rate {ppo.policy_learning_rate:g} ({kind}), {value}; {_lengths(recipe)}"


def _lengths(recipe: Recipe) -> str:
    """Describe where completions end; data that is not on this machine is not loaded for it, nor a tokenizer built."""
    if recipe.ppo.response_length is not None:
        return f"response_length {recipe.ppo.response_length}"
    later = "response_length by the length of the references, once they are loaded"
    from_scratch = recipe.model.from_scratch is not None and not recipe.sft_is_external
    if from_scratch or not task_module(recipe.task.name).files(recipe.task.config):
        return later
    try:
        path = recipe.ppo.sft_model_path or recipe.model.model_name_or_path
        tokenizer, config = load_tokenizer(path, recipe.model), load_config(path, recipe.model)
        task = load_task(recipe.task.name, task_config(recipe))
        length = reference_length(tokenizer, config, task.prompts, missing_length(recipe))
    except TaskError as error:
        raise (recipe.source or Document("recipe")).restate(error) from error
    except (ValueError, OSError):  # of a tokenizer or a chat template: the stage says what is wrong
        return later
    return f"response_length {length}, by the length of the references"


def ppo_notes(ppo: PPOConfig, metric: str) -> list[str]:
    """Return what a user should know of the settings before hours of training; `metric` is one of the evaluation."""
    notes = []
    if ppo.num_ppo_epochs > MANY_EPOCHS and ppo.target_kl is None:
        notes.append(
            f"ppo.num_ppo_epochs: {ppo.num_ppo_epochs} passes over a rollout, and nothing ends them where the policy "
            "has moved far from the one that wrote it; set ppo.target_kl, such as 0.01, or at most "
            f"{MANY_EPOCHS} passes"
        )
    learned_alone = {reward.name for reward in ppo.rewards} == {LEARNED}
    if learned_alone and ppo.load_best_model_at_end and ppo.metric_for_best_model == "eval_reward":
        notes.append(
            "ppo.metric_for_best_model: eval_reward keeps the checkpoint that the learned reward likes best, which "
            f"may be the one that fools it most; name a metric that PPO is not rewarded for, such as eval_{metric}"
        )
    return notes
