"""Which settings of the `ppo:` section go together; `args` is a PPOConfig."""

from typing import Any

from pipeline.trainers.ppo.ranges import require

Rule = tuple[Any, str, str, Any]  # whether it is broken, the option, the sentence about it, the value that is wrong


def check_sizes(args: Any) -> None:
    """Refuse batches that do not divide, and a shortest completion that is not shorter than the longest."""
    accumulation = args.gradient_accumulation_steps
    episodes = args.per_device_train_batch_size * accumulation
    for holds, name, rule in (
        (
            accumulation % args.num_mini_batches == 0,
            "num_mini_batches",
            f"must divide gradient_accumulation_steps ({accumulation})",
        ),
        (
            episodes % args.num_generations == 0,
            "num_generations",
            f"must divide per_device_train_batch_size x gradient_accumulation_steps ({episodes})",
        ),
        (
            None in (args.response_length, args.soft_punish_cache) or args.soft_punish_cache <= args.response_length,
            "soft_punish_cache",
            f"must be at most response_length ({args.response_length})",
        ),
        (
            args.response_length is None or args.min_new_tokens < args.response_length,
            "min_new_tokens",
            f"must be below response_length ({args.response_length})",
        ),
    ):
        require(holds, name, rule, getattr(args, name))


def check_steps(args: Any, num_processes: int) -> None:
    """Refuse keys that count steps and reach beyond the run, which is shorter with more processes."""
    steps, updates = args.num_steps(num_processes), args.num_optimizer_steps(num_processes)
    syncs, run = args.sync_ref_model, f"{steps} PPO steps of this run"
    for holds, name, rule in (
        (args.value_warmup_steps < steps, "value_warmup_steps", f"the {run}, or only the value function learns"),
        (
            args.warmup_steps < updates,
            "warmup_steps",
            f"the {updates} optimizer steps of this run, or learning_rate is never reached",
        ),
        (
            not syncs or args.ref_model_sync_steps < steps,
            "ref_model_sync_steps",
            f"the {run}, or sync_ref_model never moves the reference (TRL counts optimizer steps)",
        ),
    ):
        require(holds, name, f"must be below {rule}; lower it, or make the run longer", getattr(args, name))


def check_combinations(args: Any) -> None:
    """Refuse options that need another one, exclude it, or would do nothing."""
    for rules in (_run_rules, _group_rules, _reference_rules, _kl_rules, _value_rules, _score_rules):
        for is_broken, name, rule, value in rules(args):
            require(not is_broken, name, rule, value)


def _run_rules(args: Any) -> list[Rule]:
    """Return the rules of the length of a run, its learning rate, and the clip of its loss."""
    counts_twice = args.max_steps is not None and args.total_episodes != type(args).total_episodes
    is_constant = args.lr_scheduler_type == "constant"
    largest_ratio = 1 + (args.cliprange_high or args.cliprange)
    return [
        (counts_twice, "max_steps", "does nothing beside total_episodes; keep one", args.max_steps),
        (
            args.warmup_steps and is_constant,
            "warmup_steps",
            "does nothing with lr_scheduler_type constant; use constant_with_warmup",
            args.warmup_steps,
        ),
        (
            args.dual_clip is not None and args.dual_clip <= largest_ratio,
            "dual_clip",
            "must be above 1 + cliprange_high, or the clip below it never acts",
            args.dual_clip,
        ),
        (
            args.target_kl is not None and args.num_ppo_epochs * args.num_mini_batches == 1,
            "target_kl",
            "does nothing where a rollout has one optimizer step (num_ppo_epochs x num_mini_batches): it ends those "
            "after the first; use kl_target or max_kl",
            args.target_kl,
        ),
    ]


def _group_rules(args: Any) -> list[Rule]:
    """Return the rules of several completions of one prompt."""
    return [
        (
            args.group_baseline and args.num_generations < 2,
            "group_baseline",
            "needs num_generations of at least 2",
            args.num_generations,
        ),
        (
            args.scale_rewards == "group" and not args.group_baseline,
            "scale_rewards",
            "group needs group_baseline, and num_generations of at least 2",
            args.scale_rewards,
        ),
        (
            args.dynamic_sampling_rounds and args.num_generations < 2,
            "dynamic_sampling_rounds",
            "needs num_generations of at least 2: completions of one prompt are compared",
            args.dynamic_sampling_rounds,
        ),
    ]


def _reference_rules(args: Any) -> list[Rule]:
    """Return the rules of a reference that follows the policy."""
    return [
        (
            args.sync_ref_model and not args.kl_coef,
            "sync_ref_model",
            "does nothing with kl_coef 0: the reference is what the KL is measured to",
            args.sync_ref_model,
        ),
        (
            args.ref_model_mixup_alpha != type(args).ref_model_mixup_alpha and not args.sync_ref_model,
            "ref_model_mixup_alpha",
            "does nothing without sync_ref_model",
            args.ref_model_mixup_alpha,
        ),
        (
            args.ref_model_sync_steps != type(args).ref_model_sync_steps and not args.sync_ref_model,
            "ref_model_sync_steps",
            "does nothing without sync_ref_model",
            args.ref_model_sync_steps,
        ),
    ]


def _kl_rules(args: Any) -> list[Rule]:
    """Return the rules of the KL: where it counts, how it is estimated, and what moves its coefficient."""
    has_horizon = args.kl_horizon != type(args).kl_horizon
    return [
        (
            args.kl_placement == "loss" and args.kl_estimator == "k1",
            "kl_placement",
            "loss needs kl_estimator k3 or k2 (the gradient of k1 is 0 on average)",
            args.kl_estimator,
        ),
        (
            args.kl_placement != "loss" and args.kl_estimator != "k1",
            "kl_estimator",
            "as a reward it hardly holds the policy (near the reference k3 has 1 % of the KL's gradient); "
            "use k1, or kl_placement: loss",
            args.kl_estimator,
        ),
        (
            args.kl_placement != "reward" and not args.kl_coef and args.algorithm is None,  # which sets both
            "kl_placement",
            "does nothing with kl_coef 0; remove it",
            args.kl_placement,
        ),
        (
            args.kl_target is not None and not args.kl_coef,
            "kl_target",
            "needs a kl_coef above 0 to start from",
            args.kl_coef,
        ),
        (args.kl_target is None and has_horizon, "kl_horizon", "does nothing without kl_target", args.kl_horizon),
    ]


def _value_rules(args: Any) -> list[Rule]:
    """Return the rules of the value function."""
    is_adapter, is_trained = args.value_model != "head", bool(args.value_loss_weight)
    own_clip = args.cliprange_value != type(args).cliprange_value
    idle = "does nothing without a value function; set vf_coef"
    return [
        (
            args.algorithm == "ppo" and args.vf_coef == 0,
            "vf_coef",
            "algorithm ppo learns a value function; use rloo, grpo or reinforce++ without one",
            args.vf_coef,
        ),
        (
            is_adapter and not args.use_peft,
            "value_model",
            "adapter and reward_model need ppo.use_peft: true",
            args.value_model,
        ),
        (
            args.value_model == "reward_model" and args.rewards and args.learned_reward is None,
            "value_model",
            "reward_model needs the reward learned in ppo.rewards; use adapter",
            args.value_model,
        ),
        (args.value_warmup_steps and not is_trained, "value_warmup_steps", idle, args.value_warmup_steps),
        (args.value_lam is not None and not is_trained, "value_lam", idle, args.value_lam),
        (is_adapter and not is_trained, "value_model", idle, args.value_model),
        (
            args.value_learning_rate is not None and not is_trained,
            "value_learning_rate",
            idle,
            args.value_learning_rate,
        ),
        (own_clip and not is_trained, "cliprange_value", idle, args.cliprange_value),
    ]


def _score_rules(args: Any) -> list[Rule]:
    """Return the rules of rewards, and of what makes scores of them."""
    own_penalty = args.missing_eos_penalty not in (None, type(args).missing_eos_penalty)
    return [
        (
            own_penalty and args.missing_eos_score is not None,
            "missing_eos_score",
            "replaces the score that missing_eos_penalty would be subtracted from; keep one",
            args.missing_eos_score,
        ),
        (
            args.reward_shaping == "prefix" and args.gamma < 1,
            "reward_shaping",
            "prefix needs gamma 1: with a discount the shaping changes which completions are best",
            args.gamma,
        ),
        (
            args.shuffle_scores and args.reward_shaping != "none",
            "shuffle_scores",
            "needs reward_shaping none: only scores of whole completions can change places",
            args.shuffle_scores,
        ),
        (
            args.reward_model_path is not None and args.learned_reward is None,
            "reward_model_path",
            "does nothing without the reward learned in ppo.rewards",
            args.reward_model_path,
        ),
        (
            args.metric_for_best_model == "eval_reward" and not args.greater_is_better,
            "greater_is_better",
            "must be true for eval_reward, which PPO raises: the worst policy would be kept",
            args.greater_is_better,
        ),
        ("" in args.stop_strings, "stop_strings", "must not hold an empty text", args.stop_strings),
    ]
