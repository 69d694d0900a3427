"""Arguments of TRL's GRPO and RLOO trainers and configs that there are not here, each with what to use instead."""

from collections.abc import Iterable, Mapping
from dataclasses import fields

from transformers import TrainingArguments

from pipeline.runtime.messages import did_you_mean

_WRITER = "completions are written by Relay's own decode loop or by transformers; leave it out"
_ONE_LOSS = "the losses here are those of ppo.algorithm; leave it out, or train with TRL's GRPOTrainer"
_TURNS = "completions here are one turn without calls; train with TRL's GRPOTrainer"
_TEXT = "PPO here reads text alone; train with TRL's GRPOTrainer"
_MODEL = "give PPOTrainer a model that is loaded as you want it"
_SAMPLES = "samples.jsonl has the completions of ppo.num_sample_generations steps; leave it out"
TRAINER_ARGUMENTS = {
    "tools": _TURNS,
    "environment_factory": _TURNS,
    "rollout_func": "write the loop yourself: PPOTrainer.collect_rollout, compute_advantages and update are public",
    "callbacks": "PPOTrainer has none; write the loop yourself with collect_rollout, compute_advantages and update",
    "optimizers": "PPO makes its AdamW from ppo.learning_rate, ppo.adam_... and ppo.lr_scheduler_type",
    "quantization_config": _MODEL,
    "tokenizer": "use processing_class",
    "reward_model": "use reward_funcs",
    "reward_weights": "use Reward(name, function, weight) in reward_funcs",
    "value_model": "the value function is set by PPOConfig(value_model=...)",
    "ref_model": "the reference is the model that PPO starts from; leave it out",
    "data_collator": "prompts are not collated; leave it out",
    "dataset": "use train_dataset",
    "config": "use args",
    "images": _TEXT,
}
CONFIG_ARGUMENTS = {
    "max_completion_length": "use response_length",
    "max_prompt_length": "prompts are never cut; filter the data set",
    "beta": "use kl_coef",
    "epsilon": "use cliprange",
    "epsilon_high": "use cliprange_high",
    "delta": "use dual_clip, which bounds the ratio where the advantage is negative",
    "num_iterations": "use num_ppo_epochs",
    "steps_per_generation": "use gradient_accumulation_steps and num_mini_batches",
    "generation_batch_size": "a rollout is per_device_train_batch_size x gradient_accumulation_steps x processes",
    "num_train_epochs": "use total_episodes or max_steps",
    "reward_weights": "use Reward(name, function, weight) in reward_funcs, or weight in ppo.rewards",
    "multi_objective_aggregation": "use score_scaling of a reward in ppo.rewards",
    "reward_clip_range": "use score_clip",
    "normalize_advantages": "use scale_rewards: batch",
    "use_bias_correction_kl": "it is what kl_estimator: k3 with kl_placement: loss does; leave it out",
    "output_dir": "use PPOTrainer(output_dir=...), or the recipe's name",
    "seed": "use PPOTrainer(seed=...), or seed at the top of the recipe",
    "fp16": "use bf16, or leave it out",
    "model_init_kwargs": _MODEL,
    "trust_remote_code": _MODEL,
    "cast_lm_head_to_fp32": "log-probs are always computed in float32; leave it out",
    "disable_dropout": "dropout is always off; leave it out",
    "remove_unused_columns": "every column reaches the rewards; leave it out",
    "shuffle_dataset": "prompts are always shuffled, by the seed; leave it out",
    "pad_to_multiple_of": "use padding_free",
    "cache_implementation": _WRITER,
    "use_transformers_paged": _WRITER,
    "use_transformers_continuous_batching": _WRITER,
    "transformers_continuous_batching_config": _WRITER,
    "top_entropy_quantile": _ONE_LOSS,
    "off_policy_mask_threshold": _ONE_LOSS,
    "router_aux_loss_coef": "the router of a mixture of experts is not trained; leave it out",
    "max_tool_calling_iterations": _TURNS,
    "log_completions": _SAMPLES,
    "num_completions_to_print": _SAMPLES,
    "log_unique_prompts": _SAMPLES,
    "log_completions_hub_repo": "training uploads nothing; leave it out",
    "log_multimodal": _TEXT,
    "use_adaptive_entropy": "use entropy_coef, which may be a list of [episodes, value]",
}
PREFIXES = {
    "vllm_": _WRITER,
    "use_vllm": _WRITER,
    "ds3_": "completions are written with whole weights; leave it out",
    "sapo_": _ONE_LOSS,
    "vespo_": _ONE_LOSS,
    "entropy_": "use entropy_coef, which may be a list of [episodes, value]",
    "hub_": "training uploads nothing; use `relay push` after it",
    "push_to_hub": "training uploads nothing; use `relay push` after it",
}


def refuse_trainer_arguments(args: object, unknown: Mapping[str, object]) -> None:
    """Refuse arguments of PPOTrainer that there are not, and settings of another class.

    Raises:
        ValueError: naming the argument and what to use.
    """
    if args is not None and type(args).__name__ != "PPOConfig":
        raise ValueError(f"args: expected a PPOConfig, found a {type(args).__name__}; its keys are in docs/recipe.md")
    for name in unknown:
        names = ("model", "args", "processing_class", "reward_funcs", "train_dataset", "eval_dataset", "peft_config")
        reason = TRAINER_ARGUMENTS.get(name) or CONFIG_ARGUMENTS.get(name)
        raise ValueError(
            f"PPOTrainer: no argument {name}: {reason}" if reason else _unknown("PPOTrainer", name, names)
        )


def refuse_config_arguments(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse settings that PPOConfig does not have; `known` are those that it has.

    Raises:
        ValueError: naming the setting and what to use.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(
                f"ppo.{name}: {config_reason(name)}" if config_reason(name) else _unknown("ppo", name, known)
            )


def config_reason(name: str) -> str | None:
    """Say what to use instead of a setting of TRL's or of transformers'; None: it is no setting of theirs."""
    if name in CONFIG_ARGUMENTS:
        return f"no key of PPO: {CONFIG_ARGUMENTS[name]}"
    for prefix, reason in PREFIXES.items():
        if name.startswith(prefix):
            return f"no key of PPO: {reason}"
    if name in {field.name for field in fields(TrainingArguments)}:
        return "no key of PPO, whose loop is not that of transformers.Trainer; leave it out"
    return None


def _unknown(where: str, name: str, known: Iterable[str]) -> str:
    return f"{where}: unknown argument {name!r}{did_you_mean(name, known) or '; see docs/from-trl.md'}"
