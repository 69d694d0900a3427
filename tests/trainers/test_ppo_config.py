"""Every key of the `ppo:` section: what it refuses, and that it changes the run."""

import dataclasses

import pytest
from ppo_toys import read_metrics

from pipeline.models import generation
from pipeline.recipe import load_recipe
from pipeline.rewards import RewardConfig, build_rewards
from pipeline.stages.directory import RunDirectory
from pipeline.stages.inputs import sft_model_path
from pipeline.trainers.ppo.config import PPOConfig

REWARDS = (RewardConfig("constant"),)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("rewards", {"rewards": ()}),
        ("total_episodes", {"total_episodes": 0}),
        ("per_device_train_batch_size", {"per_device_train_batch_size": 0}),
        ("gradient_accumulation_steps", {"gradient_accumulation_steps": 0}),
        ("num_ppo_epochs", {"num_ppo_epochs": 0}),
        ("num_mini_batches", {"num_mini_batches": 0}),
        ("num_mini_batches", {"num_mini_batches": 3, "gradient_accumulation_steps": 4}),
        ("local_rollout_forward_batch_size", {"local_rollout_forward_batch_size": 0}),
        ("learning_rate", {"learning_rate": 0.0}),
        ("learning_rate", {"learning_rate": float("nan")}),
        ("value_learning_rate", {"value_learning_rate": 0.0}),
        ("value_learning_rate", {"value_learning_rate": -1e-3}),
        ("lr_scheduler_type", {"lr_scheduler_type": "polynomial"}),
        ("warmup_steps", {"warmup_steps": -1}),
        ("warmup_steps", {"warmup_steps": 5, "lr_scheduler_type": "constant"}),
        ("adam_beta1", {"adam_beta1": 1.0}),
        ("adam_beta2", {"adam_beta2": -0.1}),
        ("adam_epsilon", {"adam_epsilon": 0.0}),
        ("weight_decay", {"weight_decay": -0.1}),
        ("max_grad_norm", {"max_grad_norm": 0.0}),
        ("response_length", {"response_length": 0}),
        ("num_generations", {"num_generations": 0}),
        ("num_generations", {"num_generations": 3, "per_device_train_batch_size": 4}),
        ("group_baseline", {"group_baseline": True}),
        ("reward_shaping", {"reward_shaping": "suffix"}),
        ("temperature", {"temperature": 0.0}),
        ("top_k", {"top_k": -1}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.1}),
        ("kl_coef", {"kl_coef": -0.1}),
        ("kl_estimator", {"kl_estimator": "k2"}),
        ("cliprange", {"cliprange": 0.0}),
        ("vf_coef", {"vf_coef": -1.0}),
        ("cliprange_value", {"cliprange_value": 0.0}),
        ("gamma", {"gamma": 1.01}),
        ("lam", {"lam": -0.1}),
        ("logging_steps", {"logging_steps": 0}),
        ("eval_steps", {"eval_steps": 0}),
        ("eval_examples", {"eval_examples": 0}),
        ("save_steps", {"save_steps": 0}),
        ("save_total_limit", {"save_total_limit": 0}),
        ("num_sample_generations", {"num_sample_generations": -1}),
        ("value_model", {"value_model": "copy"}),
        ("value_model", {"value_model": "adapter", "use_peft": False}),
        ("value_warmup_steps", {"value_warmup_steps": -1}),
        ("value_warmup_steps", {"value_warmup_steps": 1, "vf_coef": 0.0}),
        ("min_new_tokens", {"min_new_tokens": -1}),
        ("min_new_tokens", {"min_new_tokens": 53}),
        ("stop_strings", {"stop_strings": ("",)}),
        ("kl_placement", {"kl_placement": "nowhere"}),
        ("kl_placement", {"kl_placement": "loss"}),
        ("kl_target", {"kl_target": 0.0}),
        ("kl_target", {"kl_target": 6.0, "kl_coef": 0.0}),
        ("kl_horizon", {"kl_horizon": 0}),
        ("kl_horizon", {"kl_horizon": 5}),
        ("target_kl", {"target_kl": 0.0}),
        ("cliprange_high", {"cliprange_high": 0.0}),
        ("dual_clip", {"dual_clip": 1.0}),
        ("dual_clip", {"dual_clip": 1.5, "cliprange_high": 0.5}),
        ("entropy_coef", {"entropy_coef": -0.1}),
        ("score_scaling", {"score_scaling": "batch"}),
        ("score_clip", {"score_clip": 0.0}),
        ("missing_eos_penalty", {"missing_eos_penalty": 0.0}),
        ("missing_eos_score", {"missing_eos_score": float("nan")}),
        ("missing_eos_score", {"missing_eos_score": -1.0, "missing_eos_penalty": 1.0}),
        ("on_reward_error", {"on_reward_error": "ignore"}),
        ("reward_timeout", {"reward_timeout": 0.0}),
        ("max_kl", {"max_kl": 0.0}),
        ("max_skipped_steps", {"max_skipped_steps": 0}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value,
)
def test_bad_values_are_refused_by_name(key, settings):
    with pytest.raises(ValueError, match=rf"^ppo\.{key}: "):
        PPOConfig(**{"rewards": REWARDS, **settings})


def test_the_defaults_are_complete():
    assert PPOConfig(REWARDS).batch_size(2) == 256


@pytest.mark.parametrize(("episodes", "steps"), [(1, 1), (8, 1), (9, 2), (16, 2)])
def test_sizes(episodes, steps):
    args = PPOConfig(
        REWARDS,
        total_episodes=episodes,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_mini_batches=2,
        num_ppo_epochs=3,
    )
    assert args.batch_size(num_processes=2) == 8
    assert args.num_steps(num_processes=2) == steps
    assert args.num_optimizer_steps(num_processes=2) == steps * 3 * 2


def scripted():
    """A held-out metric that is best after the first step, and one that is best after the last."""
    values = iter([0.0, 3.0, 2.0, 1.0])

    def compute(completions, rows):
        value = next(values)
        return {"scripted": value, "opposite": -value}

    return compute


# What is changed, and what both runs need beside it to make a difference possible.
CHANGES: dict[str, tuple[object, dict]] = {
    "use_peft": (False, {}),
    "total_episodes": (17, {}),
    "per_device_train_batch_size": (2, {}),
    "gradient_accumulation_steps": (4, {}),
    "num_ppo_epochs": (3, {}),
    "num_mini_batches": (2, {}),
    "learning_rate": (1e-3, {}),
    "value_learning_rate": (1e-1, {}),
    "lr_scheduler_type": ("cosine", {}),
    "warmup_steps": (2, {}),
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.9, {}),
    "adam_epsilon": (1e-2, {}),
    "weight_decay": (0.5, {}),
    "max_grad_norm": (1e-3, {}),
    "bf16": (True, {}),
    "response_length": (3, {}),
    "num_generations": (2, {}),
    "group_baseline": (True, {"num_generations": 2}),
    "reward_shaping": ("prefix", {}),
    "temperature": (0.5, {}),
    "top_k": (2, {}),
    "top_p": (0.5, {}),
    "kl_coef": (1.0, {}),
    "kl_estimator": ("k3", {"kl_coef": 1.0}),
    "cliprange": (1e-3, {}),
    "vf_coef": (10.0, {}),
    "cliprange_value": (1e-3, {}),
    "gamma": (0.5, {}),
    "lam": (0.5, {}),
    "whiten_rewards": (True, {}),
    "whiten_advantages": (False, {}),
    "missing_eos_penalty": (1.0, {}),
    "missing_eos_score": (-1.0, {}),
    "value_model": ("adapter", {}),
    "value_warmup_steps": (1, {}),
    "min_new_tokens": (3, {}),
    "stop_strings": (("r",), {}),
    "kl_placement": ("loss", {"kl_coef": 1.0, "kl_estimator": "k3"}),
    "kl_target": (1.0, {}),
    "kl_horizon": (100, {"kl_target": 1.0}),
    "target_kl": (1e-6, {}),
    "cliprange_high": (1e-3, {}),
    "dual_clip": (1.3, {"num_ppo_epochs": 6, "learning_rate": 5e-2}),
    "entropy_coef": (0.1, {}),
    "score_scaling": ("running", {}),
    "score_clip": (0.1, {}),
    "logging_steps": (2, {}),
    "eval_steps": (2, {"eval_steps": 1}),
    "eval_examples": (2, {"eval_steps": 1}),
    "save_steps": (1, {"eval_steps": 2, "save_total_limit": 2}),
    "save_total_limit": (1, {"eval_steps": 1, "total_episodes": 24}),
    "metric_for_best_model": ("eval_opposite", {"eval_steps": 1, "metric_for_best_model": "eval_scripted"}),
    "greater_is_better": (False, {"eval_steps": 1, "metric_for_best_model": "eval_scripted"}),
    "load_best_model_at_end": (False, {"eval_steps": 1, "metric_for_best_model": "eval_scripted"}),
    "report_to": (("tensorboard",), {}),
    "run_name": ("mine", {"report_to": ("tensorboard",)}),
}
TESTED_APART = {
    "rewards",
    "sft_model_path",
    "reward_model_path",
    "gradient_checkpointing",
    "padding_free",
    "num_sample_generations",
    "local_rollout_forward_batch_size",
    "on_reward_error",  # these in tests/faults
    "reward_timeout",
    "max_kl",
    "max_skipped_steps",
}


def test_every_key_is_tested():
    assert CHANGES.keys() | TESTED_APART == {field.name for field in dataclasses.fields(PPOConfig)}
    assert not CHANGES.keys() & TESTED_APART


@pytest.fixture(scope="module")
def outcomes() -> dict:
    """The results of the runs that several tests compare with, by their settings."""
    return {}


def outcome(make_trainer, examples, name: str, settings: dict):
    """What a run of two steps leaves: weights, metrics.jsonl and the names of all other files."""
    evaluates = "eval_steps" in settings
    trainer = make_trainer(
        name,
        **{"total_episodes": 16, **settings},
        validation=examples.select(range(12)) if evaluates else None,
        compute_metrics=scripted() if evaluates else None,
    )
    trainer.train()
    weights = {name: tensor.tolist() for name, tensor in trainer.shared.trainable_state().items()}
    files = sorted(
        str(path.relative_to(trainer.output_dir).parent if "events.out" in path.name else path.name)
        for path in trainer.output_dir.rglob("*")
    )
    return weights, read_metrics(trainer.output_dir), files


@pytest.fixture(params=["llama", "t5"])
def make_any_trainer(request, make_trainer, taught_t5, t5_tokenizer):
    """The trainer of either family."""
    if request.param == "llama":
        return make_trainer
    return lambda name, **settings: make_trainer(name, model=taught_t5(), processing_class=t5_tokenizer, **settings)


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_changes_the_run(make_any_trainer, request, examples, outcomes, key):
    if key in ("report_to", "run_name"):
        pytest.importorskip("tensorboard")
    value, needed = CHANGES[key]
    if key == "padding_free" and "t5" in request.node.name:
        pytest.skip("an encoder-decoder's passes are padded")
    before = f"{request.node.callspec.params['make_any_trainer']} {needed}"
    if before not in outcomes:
        outcomes[before] = outcome(make_any_trainer, examples, "before", needed)
    assert outcome(make_any_trainer, examples, "after", {**needed, key: value}) != outcomes[before]


def test_two_runs_without_a_change_are_equal(make_trainer, examples):
    runs = [outcome(make_trainer, examples, name, {"eval_steps": 1}) for name in ("first", "second")]
    assert runs[0] == runs[1]  # or the test above would show nothing


def test_gradient_checkpointing_computes_twice_and_changes_nothing(make_trainer):
    calls, states = [], []
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        trainer = make_trainer(name, total_episodes=8, gradient_checkpointing=checkpointing)
        count = []
        attention = trainer.shared.language_model.base_model.layers[0].self_attn
        attention.register_forward_hook(lambda *_, count=count: count.append(1))
        trainer.train()
        calls.append(len(count))
        states.append({name: tensor.tolist() for name, tensor in trainer.shared.trainable_state().items()})
    assert calls[1] == calls[0] + 4  # 2 PPO epochs of 2 micro-batches
    assert states[0] == states[1]


def test_the_rollout_batch_size_bounds_memory_and_changes_nothing(make_trainer, monkeypatch):
    sizes, states, original = [], [], generation.decode_batch

    def counted(model, prompts, *args):
        sizes[-1].append(len(prompts))
        return original(model, prompts, *args)

    monkeypatch.setattr(generation, "decode_batch", counted)
    for size in (128, 3):
        sizes.append([])
        trainer = make_trainer(str(size), total_episodes=8, local_rollout_forward_batch_size=size)
        trainer.train()
        states.append({name: tensor.tolist() for name, tensor in trainer.shared.trainable_state().items()})
    assert sizes == [[8], [3, 3, 2]]
    assert states[0] == states[1]


def test_samples_are_shown(make_trainer, capsys):
    for count in (0, 2):
        make_trainer(str(count), num_sample_generations=count, total_episodes=16).train()
        shown = capsys.readouterr().err
        assert shown.count("(score ") == count
    assert "step 2: say " in shown


def test_rewards_and_the_sft_model_are_read_from_the_recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: demo\n"
        "model: {from_scratch: {hidden_size: 32, num_attention_heads: 2, vocab_size: 400}}\n"
        'task: {name: parallel, source: "{split}.en", target: "{split}.de"}\n'
        "ppo: {rewards: [{name: constant, weight: 2}, chrf], response_length: 8}\n"
    )
    own = load_recipe(file)
    rewards = build_rewards(own.ppo.rewards, own.language)
    assert [(reward.name, reward.weight) for reward in rewards] == [("constant", 2.0), ("chrf", 1.0)]
    run = RunDirectory.of(own)
    assert sft_model_path(own, run) == run.sft
    other = load_recipe(file, [f"ppo.sft_model_path={tmp_path}"])
    assert sft_model_path(other, run) == str(tmp_path)
