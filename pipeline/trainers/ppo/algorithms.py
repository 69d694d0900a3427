"""Policy-gradient algorithms by name: the keys of the `ppo:` section that each of them defines, or only suggests."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.runtime.messages import yaml_text
from pipeline.trainers.ppo.ranges import require


@dataclass(frozen=True)
class Algorithm:
    """What makes an algorithm: values that it `defines`, and values that it `suggests` and a recipe may change."""

    defines: Mapping[str, object]
    suggests: Mapping[str, object]


_KL_IN_REWARD = {"kl_placement": "reward", "kl_estimator": "k1"}
_ONE_PASS = {"num_ppo_epochs": 1, "num_mini_batches": 1}
# In place of PPO's defaults, which the publications do not have: scores as the rewards are, and one clip.
_AS_PUBLISHED = {"score_scaling": "none", "missing_eos_penalty": None, "dual_clip": None}
_NO_VALUE_FUNCTION = {"vf_coef": 0.0, "lam": 1.0, "gamma": 1.0}
# The advantage is the score less the mean of its group, the KL is a term of the loss.
_GROUP = {"group_baseline": "mean", "kl_placement": "loss", "kl_estimator": "k3", **_NO_VALUE_FUNCTION}
_GROUP_SUGGESTIONS = {"num_generations": 8, "importance_sampling_level": "token", "cliprange": 0.2, **_ONE_PASS}
_GROUP_SUGGESTIONS |= _AS_PUBLISHED

ALGORITHMS: Mapping[str, Algorithm] = {
    # Schulman et al. 2017 (arXiv:1707.06347) as for language models in Huang et al. 2024 (arXiv:2403.17031)
    "ppo": Algorithm(
        {"group_baseline": False, "loss_type": "dapo", "importance_sampling_level": "token", **_KL_IN_REWARD},
        {
            "num_generations": 1,
            "scale_rewards": "batch",
            "vf_coef": 0.1,
            "lam": 1.0,
            "gamma": 1.0,
            **_ONE_PASS,
            "cliprange": 0.2,
            "dual_clip": 3.0,
            "score_scaling": "running",
            "missing_eos_penalty": 1.0,
            "kl_coef": 0.05,
        },
    ),
    # Ahmadian et al. 2024 (arXiv:2402.14740), as in TRL's RLOOTrainer
    "rloo": Algorithm(
        {
            "group_baseline": True,
            "scale_rewards": "none",
            "loss_type": "grpo",
            "importance_sampling_level": "completion",
            "kl_placement": "score",
            "kl_estimator": "k1",
            **_NO_VALUE_FUNCTION,
        },
        {"num_generations": 4, "cliprange": 0.2, "kl_coef": 0.05, **_ONE_PASS, **_AS_PUBLISHED},
    ),
    # Shao et al. 2024 (arXiv:2402.03300)
    "grpo": Algorithm(
        {"scale_rewards": "group", "loss_type": "grpo", **_GROUP},
        {"kl_coef": 0.04, **_GROUP_SUGGESTIONS},
    ),
    # Liu et al. 2025 (arXiv:2503.20783)
    "dr_grpo": Algorithm(
        {"scale_rewards": "none", "loss_type": "dr_grpo", **_GROUP},
        {"kl_coef": 0.0, **_GROUP_SUGGESTIONS},
    ),
    # Yu et al. 2025 (arXiv:2503.14476)
    "dapo": Algorithm(
        {"scale_rewards": "group", "loss_type": "dapo", **_GROUP},
        {"kl_coef": 0.0, **_GROUP_SUGGESTIONS, "cliprange_high": 0.28},
    ),
    # Williams 1992: the discounted return from each token on, no baseline; with one pass no ratio is clipped
    "reinforce": Algorithm(
        {
            "group_baseline": False,
            "scale_rewards": "none",
            "loss_type": "sum",
            "importance_sampling_level": "token",
            "vf_coef": 0.0,
            "lam": 1.0,
            **_KL_IN_REWARD,
            **_ONE_PASS,
        },
        {"num_generations": 1, "gamma": 1.0, "kl_coef": 0.0, **_AS_PUBLISHED},
    ),
    # Hu et al. 2025 (arXiv:2501.03262)
    "reinforce++": Algorithm(
        {
            "group_baseline": False,
            "scale_rewards": "batch",
            "loss_type": "dapo",
            "importance_sampling_level": "token",
            **_NO_VALUE_FUNCTION,
            **_KL_IN_REWARD,
        },
        {"num_generations": 1, "cliprange": 0.2, "kl_coef": 0.01, **_ONE_PASS, **_AS_PUBLISHED},
    ),
}


def expand_algorithm(name: str, written: Mapping[str, object]) -> dict[str, object]:
    """Return the keys that an algorithm sets beside those that are `written` with it.

    Raises:
        ValueError: a key is written with another value than the algorithm defines.
    """
    algorithm = ALGORITHMS[name]
    for key, value in algorithm.defines.items():
        rule = f"ppo.algorithm {name} defines it as {yaml_text(value, quotes=False)}; remove one of both keys"
        require(written.get(key) in (None, value), key, rule, written.get(key))
    suggested = {key: value for key, value in algorithm.suggests.items() if key not in written}
    return {**algorithm.defines, **suggested}


def describe_algorithm(args: object) -> str:
    """Write an algorithm with every key that it sets, as they are in the settings `args`."""
    algorithm = ALGORITHMS[args.algorithm]
    keys = [*algorithm.defines, *algorithm.suggests]
    return f"{args.algorithm}: " + ", ".join(f"{key} {yaml_text(getattr(args, key), quotes=False)}" for key in keys)
