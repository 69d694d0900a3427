"""Check what a recipe measures by before a run starts: metrics, rewards, the metric that chooses, trackers."""

from collections.abc import Sequence

from pipeline.metrics import load_metric
from pipeline.recipe.document import Document, KeyPath
from pipeline.recipe.types import Recipe
from pipeline.rewards import build_rewards
from pipeline.rewards.config import RewardConfig
from pipeline.rewards.constant import constant_reward
from pipeline.runtime.messages import did_you_mean
from pipeline.runtime.user_code import is_user_code
from pipeline.trainers import trackers

LOGGED_BY_SFT = ("eval_loss", "eval_mean_token_accuracy")
LOGGED_BY_PPO = ("reward", "length", "finished")


def check_measures(recipe: Recipe, document: Document) -> None:
    """Refuse metrics and rewards that cannot be loaded, and names that nothing is logged by or to.

    Raises:
        RecipeError: naming the key.
    """
    _check_best_metric(recipe, document)
    _check_trackers(recipe, document)
    _check_metrics_and_rewards(recipe, document)


def _check_best_metric(recipe: Recipe, document: Document) -> None:
    """Refuse a metric of the best checkpoint that no evaluation logs."""
    names = {"sft": recipe.sft.arguments.get("metric_for_best_model")}
    names["ppo"] = recipe.ppo.metric_for_best_model if recipe.ppo else None
    for section, name in names.items():
        if name is not None and not name.startswith("eval_"):
            rule = f"must be a logged evaluation metric, which starts with eval_, found {name!r}"
            raise document.error((section, "metric_for_best_model"), f"{rule}; did you mean 'eval_{name}'?")
    if names["sft"] not in (None, *LOGGED_BY_SFT):
        rule = f"must be one of {', '.join(LOGGED_BY_SFT)}, which SFT logs, found {names['sft']!r}"
        advice = "; to choose a checkpoint of SFT by a metric add eval.baselines: [sft_by_metric]"
        raise document.error(("sft", "metric_for_best_model"), rule + advice)


def _check_trackers(recipe: Recipe, document: Document) -> None:
    """Refuse a tracker that does not exist; the stage only warns of one that is not installed."""
    report_to = {"sft": recipe.sft.arguments.get("report_to"), "ppo": recipe.ppo.report_to if recipe.ppo else None}
    report_to["reward"] = recipe.reward.arguments.get("report_to") if recipe.reward else None
    for section, names in report_to.items():
        allowed = trackers.OF_PPO if section == "ppo" else ("all", "none", *trackers.OF_TRAINERS)
        for name in [names] if isinstance(names, str) else names or ():
            if name not in allowed:
                rule = f"must be of {', '.join(allowed)}, found {name!r}{did_you_mean(str(name), allowed)}"
                raise document.error((section, "report_to"), rule)


def _check_metrics_and_rewards(recipe: Recipe, document: Document) -> None:
    """Load the metrics and build the rewards; any function stands for a learned reward, whose model a stage loads."""
    names: list[str] = []
    for index, metric in enumerate(recipe.eval.metrics):
        try:
            loaded = load_metric(metric.name, recipe.language, **metric.options)
        except (ValueError, TypeError) as error:
            raise document.restate(error, ("eval", "metrics", index)) from error
        if loaded.name in names:
            rule = f"a second metric is called {loaded.name!r}, which would take the place of the first"
            raise document.error(
                ("eval", "metrics", index), f"{rule}; keep one, or write a metric with a name of its own"
            )
        names.append(loaded.name)
        chooses = recipe.ppo is not None and recipe.ppo.metric_for_best_model == f"eval_{loaded.name}"
        if chooses and recipe.ppo.greater_is_better != loaded.higher_is_better:
            right = str(loaded.higher_is_better).lower()
            rule = f"{loaded.name} is better where it is {'higher' if loaded.higher_is_better else 'lower'}"
            raise document.error(("ppo", "greater_is_better"), f"must be {right}: {rule}")
    rewards = recipe.ppo.rewards if recipe.ppo is not None else ()
    try:
        built = build_rewards(rewards, recipe.language, constant_reward())
    except (ValueError, TypeError) as error:
        raise document.restate(error, _refused_reward(rewards, recipe.language)) from error
    if recipe.ppo is None:
        return
    name, by_reward = recipe.ppo.metric_for_best_model, [f"eval_reward/{reward.name}" for reward in built]
    if name.startswith("eval_reward/") and name not in by_reward:
        rule = f"must be one of ppo.rewards, so of {', '.join(by_reward)}, found {name!r}"
        raise document.error(("ppo", "metric_for_best_model"), f"{rule}{did_you_mean(name, by_reward)}")
    if not any(is_user_code(reward.name) for reward in rewards):  # which may log others
        logged = [*(f"eval_{each}" for each in (*LOGGED_BY_PPO, *names)), *by_reward]
        if name not in logged:
            rule = f"must be logged by PPO's evaluations, found {name!r}{did_you_mean(name, logged)}"
            raise document.error(("ppo", "metric_for_best_model"), f"{rule}; name a metric of eval.metrics")


def _refused_reward(rewards: Sequence[RewardConfig], language: str | None) -> KeyPath:
    """Return the key path of the reward that cannot be built, or of all of them where each can be built alone."""
    for index, reward in enumerate(rewards):
        try:
            build_rewards([reward], language, constant_reward())
        except (ValueError, TypeError):
            return ("ppo", "rewards", index)
    return ("ppo", "rewards")
