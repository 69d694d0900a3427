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
from pipeline.trainers.ppo.config_checks import check_steps

REWARDS = (RewardConfig("constant"),)


# Values that are wrong whatever else is set.
BAD_VALUES: dict[str, tuple] = {
    **dict.fromkeys(
        [
            "total_episodes",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_ppo_epochs",
            "num_mini_batches",
            "local_rollout_forward_batch_size",
            "response_length",
            "num_generations",
            "kl_horizon",
            "logging_steps",
            "eval_steps",
            "eval_examples",
            "save_steps",
            "save_total_limit",
            "max_skipped_steps",
            "max_steps",
            "num_generations_eval",
            "soft_punish_cache",
            "ref_model_sync_steps",
        ],
        (0,),
    ),
    **dict.fromkeys(
        [
            "adam_epsilon",
            "max_grad_norm",
            "temperature",
            "cliprange",
            "cliprange_value",
            "cliprange_high",
            "kl_target",
            "target_kl",
            "score_clip",
            "missing_eos_penalty",
            "reward_timeout",
            "max_kl",
        ],
        (0.0,),
    ),
    **dict.fromkeys(
        [
            "weight_decay",
            "kl_coef",
            "vf_coef",
            "entropy_coef",
            "ptx_coef",
            "value_warmup_steps",
            "warmup_steps",
            "top_k",
            "num_sample_generations",
            "dynamic_sampling_rounds",
        ],
        (-1,),
    ),
    **dict.fromkeys(["learning_rate", "value_learning_rate"], (0.0, -1e-3, float("nan"))),
    **dict.fromkeys(
        [
            "kl_placement",
            "reward_shaping",
            "score_scaling",
            "value_model",
            "on_reward_error",
            "scale_rewards",
            "loss_type",
            "importance_sampling_level",
            "algorithm",
            "group_baseline",
        ],
        ("no such thing",),
    ),
    "lr_scheduler_type": ("polynomial",),
    "kl_estimator": ("k4",),
    "adam_beta1": (1.0,),
    "adam_beta2": (-0.1,),
    "ref_model_mixup_alpha": (0.0, 1.1),
    "top_p": (0.0, 1.1),
    "min_p": (-0.1, 1.1),
    "repetition_penalty": (0.0, float("inf")),
    "suppress_tokens": ((-1,),),
    "generation_kwargs": (
        {"num_beams": 4},
        {"do_sample": False},
        {"no_repeat_ngram_size": 3},
        {"num_return_sequences": 2},
        {"temperature": "high"},
        {"temperature": None},
        {"suppress_tokens": 3},
        {"stop_strings": [3]},
    ),
    "gamma": (1.01,),
    "lam": (-0.1,),
    "value_lam": (1.1,),
    "dual_clip": (1.0,),
    "min_new_tokens": (-1,),
    "stop_strings": (("",),),
    "missing_eos_score": (float("nan"),),
}
# Values that are wrong beside others; the key that is named stands first.
BAD_COMBINATIONS: tuple[dict, ...] = (
    {"num_mini_batches": 3, "gradient_accumulation_steps": 4},
    {"warmup_steps": 5, "lr_scheduler_type": "constant"},
    {"num_generations": 3, "per_device_train_batch_size": 4},
    {"group_baseline": True},
    {"value_lam": 0.9, "vf_coef": 0.0},
    {"sync_ref_model": True, "kl_coef": 0.0},
    {"ref_model_mixup_alpha": 1.0},
    {"ref_model_sync_steps": 2},
    {"dynamic_sampling_rounds": 1},
    {"soft_punish_cache": 9, "response_length": 8},
    {"scale_rewards": "group"},
    {"vf_coef": 0.0, "algorithm": "ppo"},
    {"lam": 0.5, "algorithm": "grpo"},
    {"scale_rewards": "batch", "algorithm": "grpo"},
    {"kl_estimator": "k3", "kl_placement": "score"},
    {"value_model": "adapter", "use_peft": False},
    {"value_model": "reward_model"},
    {"value_warmup_steps": 1, "vf_coef": 0.0},
    {"kl_placement": "loss"},
    {"kl_placement": "loss", "kl_estimator": "k2", "kl_coef": 0.0},
    {"target_kl": 0.01},
    {"value_learning_rate": 1e-4, "vf_coef": 0.0},
    {"value_learning_rate": 1e-4, "algorithm": "grpo"},
    {"cliprange_value": 0.1, "num_generations": 2, "group_baseline": True},
    {"kl_estimator": "k3"},
    {"kl_estimator": "k2", "kl_placement": "reward"},
    {"kl_target": 6.0, "kl_coef": 0.0},
    {"kl_horizon": 5},
    {"dual_clip": 1.5, "cliprange_high": 0.5},
    {"missing_eos_score": -1.0, "missing_eos_penalty": 0.5},
    {"min_new_tokens": 53, "response_length": 53},
    {"value_model": "adapter", "num_generations": 2, "group_baseline": True},
    {"reward_model_path": "runs/other/reward"},
    {"shuffle_scores": True, "reward_shaping": "prefix"},
    {"reward_shaping": "prefix", "gamma": 0.99},
    {"max_steps": 5, "total_episodes": 100},
    {"greater_is_better": False},
)


def test_generation_kwargs_are_the_keys_of_sampling():
    """And go before them, as in TRL."""
    names = {
        "max_new_tokens": 7,
        "top_k": 5,
        "top_p": None,
        "stop_strings": "x",
        "suppress_tokens": [3],
        "num_beams": 1,
    }
    args = PPOConfig(REWARDS, top_k=9, top_p=0.5, generation_kwargs={**names, "do_sample": True, "temperature": 0.5})
    keys = {"response_length": 7, "top_k": 5, "stop_strings": ("x",), "suppress_tokens": (3,), "temperature": 0.5}
    assert args == PPOConfig(REWARDS, **keys) and dataclasses.replace(args, top_k=4).top_k == 4
    decoding = PPOConfig(REWARDS, min_p=0.1, repetition_penalty=1.2, suppress_tokens=(3,))
    assert (decoding.sampling.min_p, decoding.sampling.repetition_penalty) == (0.1, 1.2)
    assert (decoding.greedy.min_p, decoding.greedy.repetition_penalty) == (0.0, 1.0)  # the likeliest of all tokens
    assert decoding.greedy.suppress_tokens == decoding.sampling.suppress_tokens == (3,)


def refuses(settings: dict) -> bool:
    """Whether the settings are refused, by the name of the first of them."""
    try:
        PPOConfig(**{"rewards": REWARDS, **settings})
    except ValueError as error:
        return str(error).startswith(f"ppo.{next(iter(settings))}: ")
    return False


def test_bad_values_are_refused_by_name():
    accepted = [(key, value) for key, values in BAD_VALUES.items() for value in values if not refuses({key: value})]
    assert accepted == []


@pytest.mark.parametrize("settings", BAD_COMBINATIONS, ids=",".join)
def test_bad_combinations_are_refused_by_name(settings):
    assert refuses(settings)


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"value_warmup_steps": 3}, 4),
        ({"warmup_steps": 7, "num_ppo_epochs": 2}, 4),  # of two optimizer steps each
        ({"ref_model_sync_steps": 3, "sync_ref_model": True}, 4),
        ({"sync_ref_model": True}, 513),
    ],
)
def test_steps_beyond_the_run_are_refused_by_name(settings, least):
    key = "ref_model_sync_steps" if "sync_ref_model" in settings else next(iter(settings))
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **settings}
    with pytest.raises(ValueError, match=rf"^ppo\.{key}: must be below the \d+ .* of this run"):
        check_steps(PPOConfig(REWARDS, total_episodes=8 * (least - 1), **batch), 2)
    check_steps(PPOConfig(REWARDS, total_episodes=8 * least, **batch), 2)
    with pytest.raises(ValueError, match=rf"^ppo\.{key}: .*; lower it, or make the run longer, found \d+$"):
        check_steps(PPOConfig(REWARDS, total_episodes=8 * least, **batch), 4)


def test_a_trainer_refuses_steps_beyond_its_run(make_trainer):
    with pytest.raises(ValueError, match=r"^ppo\.value_warmup_steps: must be below the 3 PPO steps of this run"):
        make_trainer(value_warmup_steps=3)


def test_keys_that_act_are_taken():
    for passes in ({"num_ppo_epochs": 2}, {"num_mini_batches": 2}):
        assert PPOConfig(REWARDS, target_kl=0.01, **passes).target_kl
    values = {"value_learning_rate": 1e-4, "cliprange_value": 0.1, "vf_coef": 0.1}
    assert PPOConfig(REWARDS, num_generations=2, group_baseline=True, **values).value_loss_weight
    assert PPOConfig(REWARDS, algorithm="dapo").kl_placement == "loss"  # which sets kl_coef 0 itself


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
    "min_p": (0.5, {}),
    "repetition_penalty": (1.5, {}),
    "suppress_tokens": (tuple(range(5, 200)), {}),
    "generation_kwargs": ({"top_k": 2}, {}),
    "kl_coef": (1.0, {}),
    "kl_estimator": ("k2", {"kl_coef": 1.0, "kl_estimator": "k3", "kl_placement": "loss"}),
    "cliprange": (1e-3, {}),
    "vf_coef": (10.0, {}),
    "cliprange_value": (1e-3, {}),
    "gamma": (0.5, {}),
    "lam": (0.5, {}),
    "value_lam": (0.5, {}),
    "whiten_rewards": (True, {}),
    "scale_rewards": ("none", {}),
    "loss_type": ("grpo", {}),
    "importance_sampling_level": ("sequence", {}),
    "mask_truncated_completions": (True, {}),
    "algorithm": ("reinforce", {"num_ppo_epochs": 1}),
    "missing_eos_penalty": (1.0, {}),
    "missing_eos_score": (-1.0, {}),
    "soft_punish_cache": (2, {}),
    "dynamic_sampling_rounds": (2, {"num_generations": 2, "group_baseline": True}),
    "value_model": ("adapter", {}),
    "value_warmup_steps": (1, {}),
    "min_new_tokens": (3, {}),
    "stop_strings": (("r",), {}),
    "kl_target": (1.0, {}),
    "ref_model_mixup_alpha": (0.1, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "ref_model_sync_steps": (1, {"sync_ref_model": True, "ref_model_sync_steps": 2, "total_episodes": 24}),
    "kl_horizon": (100, {"kl_target": 1.0}),
    "target_kl": (1e-6, {}),
    "cliprange_high": (1e-3, {}),
    "dual_clip": (1.3, {"num_ppo_epochs": 6, "learning_rate": 5e-2}),
    "entropy_coef": (0.1, {}),
    "ptx_coef": (0.5, {}),
    "score_scaling": ("running", {}),
    "score_clip": (0.1, {}),
    "shuffle_scores": (True, {}),
    "logging_steps": (2, {}),
    "eval_steps": (2, {"eval_steps": 1}),
    "eval_examples": (2, {"eval_steps": 1}),
    "num_generations_eval": (2, {"eval_steps": 1}),
    "save_steps": (1, {"eval_steps": 2, "save_total_limit": 2}),
    "save_total_limit": (1, {"eval_steps": 1, "total_episodes": 24}),
    "metric_for_best_model": ("eval_opposite", {"eval_steps": 1, "metric_for_best_model": "eval_scripted"}),
    "greater_is_better": (False, {"eval_steps": 1, "metric_for_best_model": "eval_scripted"}),
    "load_best_model_at_end": (False, {"eval_steps": 1, "metric_for_best_model": "eval_scripted"}),
    "report_to": (("tensorboard",), {}),
    "run_name": ("mine", {"report_to": ("tensorboard",)}),
}
TESTED_APART = {
    "sync_ref_model",  # needs a second run of its own: in test_moving_reference.py
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
    "max_steps",  # these in test_trainer_interface.py
    "chat_template_kwargs",
    "kl_placement",  # needs another kl_estimator: in test_reference.py and test_ppo_options.py
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


def test_max_steps_counts_ppo_steps():
    args = PPOConfig(REWARDS, max_steps=3, per_device_train_batch_size=4)
    assert args.num_steps(1) == args.num_steps(4) == 3 and args.num_optimizer_steps(2) == 3 * args.num_ppo_epochs


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
    """Not where rows are refilled either, as on a GPU."""
    sizes, states, originals = [], [], (generation.decode_batch, generation.decode_static)

    def counted(model, prompts, *args, **given):
        sizes[-1].append(len(prompts))
        return originals[bool(given)](model, prompts, *args, **given)

    for name in ("decode_batch", "decode_static"):
        monkeypatch.setattr(generation, name, counted)
    for size, devices in ((128, set()), (3, set()), (2, {"cpu"})):
        monkeypatch.setattr(generation, "STATIC_DEVICES", devices)
        sizes.append([])
        trainer = make_trainer(str(size), total_episodes=8, local_rollout_forward_batch_size=size)
        trainer.train()
        states.append({name: tensor.tolist() for name, tensor in trainer.shared.trainable_state().items()})
    assert sizes == [[8], [3, 3, 2], [8]]
    assert states[0] == states[1] == states[2]


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
