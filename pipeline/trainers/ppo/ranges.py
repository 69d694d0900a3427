"""The range of each number in the `ppo:` section."""

import math

from pipeline.runtime.messages import yaml_text
from pipeline.runtime.schedules import check_schedule

SCHEDULES = ("temperature", "entropy_coef")  # keys that may change during a run

AT_LEAST_ONE = (
    "total_episodes per_device_train_batch_size gradient_accumulation_steps num_ppo_epochs num_mini_batches "
    "local_rollout_forward_batch_size num_generations response_length logging_steps save_total_limit kl_horizon "
    "eval_steps eval_examples save_steps max_skipped_steps max_steps num_generations_eval soft_punish_cache "
    "ref_model_sync_steps"
)
ABOVE_ZERO = (
    "learning_rate value_learning_rate temperature max_grad_norm adam_epsilon cliprange cliprange_value "
    "repetition_penalty cliprange_high kl_target target_kl score_clip missing_eos_penalty reward_timeout max_kl"
)
NOT_NEGATIVE = (
    "kl_coef vf_coef entropy_coef ptx_coef weight_decay top_k warmup_steps value_warmup_steps min_new_tokens "
    "num_sample_generations dynamic_sampling_rounds"
)


def check_ranges(args: object) -> None:
    """Refuse numbers of PPO's settings that are wrong by themselves; None stands for a default or for off."""
    rules = (
        (AT_LEAST_ONE, "must be at least 1", lambda v: v >= 1),
        (ABOVE_ZERO, "must be above 0", lambda v: v > 0),
        (NOT_NEGATIVE, "must not be negative", lambda v: v >= 0),
        ("top_p", "must be in (0, 1]", lambda v: 0 < v <= 1),
        ("min_p", "must be in [0, 1]", lambda v: 0 <= v <= 1),
        ("suppress_tokens", "must be token ids from 0 on", lambda v: all(token >= 0 for token in v)),
        ("adam_beta1 adam_beta2", "must be in [0, 1)", lambda v: 0 <= v < 1),
        ("gamma lam value_lam", "must be in [0, 1]", lambda v: 0 <= v <= 1),
        ("ref_model_mixup_alpha", "must be in (0, 1]", lambda v: 0 < v <= 1),
        ("dual_clip", "must be above 1", lambda v: v > 1),
        ("missing_eos_score", "must be finite", math.isfinite),
    )
    for names, rule, holds in rules:
        for name in names.split():
            value = getattr(args, name)
            if name in SCHEDULES:
                check_schedule(f"ppo.{name}:", value, rule, lambda v, holds=holds: holds(v) and v != math.inf)
                continue
            endless = value == math.inf and name != "max_grad_norm"  # whose inf switches clipping off
            require(value is None or (holds(value) and not endless), name, rule, value)


def require(holds: bool, name: str, rule: str, found: object) -> None:
    """Raise a ValueError that names the key of the `ppo:` section, unless `holds`."""
    if not holds:
        raise ValueError(f"ppo.{name}: {rule}, found {yaml_text(found)}")
