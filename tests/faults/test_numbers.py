"""Numbers that break a run: NaN and infinity, a policy that runs away, no signal, empty texts, missing precision."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from ppo_toys import read_metrics, saved_tensors, training_steps, weights

from pipeline.trainers.checkpoints import list_checkpoints, newest_checkpoint
from pipeline.trainers.huggingface.reward import reward_arguments
from pipeline.trainers.huggingface.sft import sft_arguments
from pipeline.trainers.ppo.checkpoint import load_checkpoint
from pipeline.trainers.precision import mixed_precision, native_bf16


def first_experience(trainer):
    """What is learnt from in the first step."""
    return trainer.compute_advantages(trainer.collect_rollout(trainer.prompt_rows(0)))[0]


def spoil_updates(trainer, steps):
    """Let the log-probs of training passes be NaN in some PPO steps."""
    forward = trainer.shared.forward

    def spoiled(sequences):
        outputs = forward(sequences)
        if torch.is_grad_enabled() and trainer.state.step + 1 in steps:
            return replace(outputs, logprobs=outputs.logprobs * math.nan)
        return outputs

    trainer.shared.forward = spoiled


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)
def test_a_loss_that_is_not_finite_makes_no_step_and_is_named(make_trainer, capfd, bad):
    trainer = make_trainer(num_mini_batches=2, num_ppo_epochs=1)
    experience, before = first_experience(trainer), weights(trainer)
    advantages = experience.advantages.clone()
    advantages[0, 0] = bad
    stats = trainer.update(replace(experience, advantages=advantages))
    assert stats["policy/skipped_steps"] == 1.0 and stats["policy/optimizer_steps"] == 1.0
    after = weights(trainer)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)  # the other mini-batch was learnt from
    said = capfd.readouterr().err
    assert "step 1, PPO epoch 1, mini-batch " in said and "the loss is not finite (policy loss " in said
    assert "no optimizer step, 1 in a row" in said


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
def test_a_gradient_that_is_not_finite_makes_no_step(make_trainer, capfd):
    trainer = make_trainer(num_ppo_epochs=1)
    experience, before = first_experience(trainer), weights(trainer)
    slope = torch.zeros(()).requires_grad_()  # the root has a value at 0, and no slope
    forward = trainer.shared.forward

    def steep(sequences):
        outputs = forward(sequences)
        parameter = next(p for p in trainer.shared.policy_parameters())
        return replace(outputs, values=outputs.values + torch.sqrt((parameter * 0).sum() + slope * 0))

    trainer.shared.forward = steep
    trainer.update(experience)
    assert "the gradient is not finite" in capfd.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())


def test_several_in_a_row_end_the_run_and_the_last_good_checkpoint_stays(make_trainer):
    """Two passes a step: the third failure in a row is the first pass of step 3."""
    settings = {"max_skipped_steps": 3, "save_steps": 1, "total_episodes": 32}
    trainer = make_trainer(**settings)
    spoil_updates(trainer, {2, 3})
    with pytest.raises(FloatingPointError, match=r"^PPO step 3, PPO epoch 1, mini-batch 1: the loss is .* 3 in a row"):
        trainer.train()
    found, notes = newest_checkpoint(trainer.checkpoints)
    assert found.name == "checkpoint-2" and notes == []
    assert load_checkpoint(found).state.skipped_in_row == 2
    assert all(tensor.isfinite().all() for tensor in saved_tensors(found).values())
    again = make_trainer(**settings)
    spoil_updates(again, {3})
    with pytest.raises(FloatingPointError, match=r"^PPO step 3, PPO epoch 1"):  # a restart does not forget
        again.train()


def test_failures_that_are_not_in_a_row_do_not_end_the_run(make_trainer):
    trainer = make_trainer(max_skipped_steps=3, total_episodes=32)
    spoil_updates(trainer, {1, 3})
    trainer.train()
    lines = training_steps(trainer.output_dir)
    assert [line["policy/skipped_steps"] for line in lines] == [2.0, 2.0, 4.0, 4.0]
    assert [line["policy/optimizer_steps"] for line in lines] == [0.0, 2.0, 0.0, 2.0]
    assert lines[0]["loss/policy_avg"] is None  # in JSON


def test_weights_that_are_not_finite_are_never_saved(make_trainer):
    trainer = make_trainer(save_steps=1)
    update = trainer.update

    def exploding(experience):
        stats = update(experience)
        if trainer.state.step == 1:
            with torch.no_grad():
                next(iter(trainer.shared.policy_parameters()))[0] = math.inf
        return stats

    trainer.update = exploding
    with pytest.raises(FloatingPointError, match=r"step 2: .* is not finite, nothing is saved"):
        trainer.train()
    assert [path.name for path in list_checkpoints(trainer.checkpoints)] == ["checkpoint-1"]


def rising():
    """A held-out metric by which every policy is better than the one before."""
    numbers = itertools.count()
    return lambda completions, rows: {"scripted": float(next(numbers))}


def test_a_policy_that_runs_away_ends_the_run(make_trainer, examples):
    settings = {"learning_rate": 0.5, "kl_coef": 0.0, "num_ppo_epochs": 4, "total_episodes": 80, "save_steps": 1}
    settings |= {"validation": examples.select(range(4)), "eval_steps": 1, "metric_for_best_model": "eval_scripted"}
    free = make_trainer("free", compute_metrics=rising(), **settings)
    free.train()
    distances = [line["objective/kl"] for line in training_steps(free.output_dir)]
    limit = max(distances) * 0.9
    first = next(step for step, kl in enumerate(distances, start=1) if kl > limit)
    assert first > 1 and limit > 1
    bound = make_trainer("bound", max_kl=limit, compute_metrics=rising(), **settings)
    with pytest.raises(FloatingPointError) as raised:
        bound.train()
    best = bound.state.best_step
    assert str(raised.value).startswith(f"PPO step {first}: the KL to the reference is ")
    assert (
        f"nats per episode, beyond ppo.max_kl {limit:g}; the best checkpoint so far is that of step {best}; lower"
        in (str(raised.value))
    )
    kept = {path.name for path in list_checkpoints(bound.checkpoints)}
    assert {f"checkpoint-{best}", f"checkpoint-{first - 1}"} <= kept and f"checkpoint-{first}" not in kept
    assert newest_checkpoint(bound.checkpoints)[1] == []


@pytest.mark.parametrize("settings", [{}, {"num_generations": 2, "group_baseline": True}], ids=["alone", "groups"])
def test_equal_rewards_are_finite_and_said_to_teach_nothing(make_trainer, capfd, settings):
    trainer = make_trainer(
        reward=lambda completions, **_: [0.5] * len(completions),
        whiten_rewards=True,
        score_scaling="running",
        **settings,
    )
    trainer.train()
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    lines = training_steps(trainer.output_dir)
    assert all(line["objective/frac_reward_zero_std"] == 1.0 for line in lines)
    assert all(value is not None for line in lines for value in line.values())
    assert "no learning signal in 100% of the prompts" in capfd.readouterr().err


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("kind", ["all at once", "some at once", "one token"])
def test_texts_of_one_token_are_finite(make_trainer, taught_t5, t5_tokenizer, kind, family):
    model = {"model": taught_t5(), "processing_class": t5_tokenizer} if family == "t5" else {}
    settings = {"whiten_rewards": True, "missing_eos_penalty": 1.0, "num_mini_batches": 2}
    trainer = make_trainer(response_length=1 if kind == "one token" else 4, **settings, **model)
    end, generate = trainer.tokenizer.eos_token_id, trainer.writer.generate
    if kind != "one token":

        def ending(prompts, decoding):
            found = generate(prompts, decoding)
            return [[end] if kind == "all at once" or row % 2 else ids for row, ids in enumerate(found)]

        trainer.writer.generate = ending
    trainer.train()
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    lines = read_metrics(trainer.output_dir)
    assert len(lines) == 3 and all(value is not None for line in lines for value in line.values())
    if kind == "all at once":
        assert lines[0]["objective/length"] == 1.0 and lines[0]["objective/finished"] == 1.0


@pytest.mark.parametrize(
    ("capability", "found", "native"),
    [
        ("AVX512", {"avx512_bf16": True, "amx_bf16": False}, True),
        ("AVX512", {"avx512_bf16": False, "amx_bf16": True}, True),
        ("AVX512", {"avx512_bf16": False, "amx_bf16": False}, False),
        ("AVX2", {"avx512_bf16": True}, False),  # torch was told to leave them alone
        ("DEFAULT", {}, False),
    ],
)
def test_a_cpu_uses_bf16_by_itself_where_it_has_instructions(capability, found, native, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: found)
    assert native_bf16() is native
    assert sft_arguments({}, tmp_path, 0).bf16 is reward_arguments({}, tmp_path, 0).bf16 is native
    assert mixed_precision("ppo", None) == ("bf16" if native else "no")
    assert mixed_precision("ppo", False) == "no"


@pytest.mark.parametrize("arguments", [sft_arguments, reward_arguments], ids=["sft", "reward"])
def test_a_precision_that_is_not_there_is_refused(arguments, tmp_path, make_trainer, monkeypatch, capsys):
    section = arguments.__name__.removesuffix("_arguments")
    with pytest.raises(ValueError, match=rf"^{section}\.fp16: a CPU has no mixed precision in float16; set {section}"):
        arguments({"fp16": True}, tmp_path, 0)
    assert not arguments({}, tmp_path, 0).bf16  # the fallback is float32
    assert arguments({"bf16": True}, tmp_path, 0).bf16  # which any CPU can
    assert f"{section}.bf16: this CPU has no instructions for bfloat16" in capsys.readouterr().err
    assert not arguments({"bf16": False}, tmp_path, 0).bf16 and capsys.readouterr().err == ""
    old = {"is_available": True, "is_bf16_supported": False, "get_device_name": "an old card"}
    for name, value in old.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value, **__: value)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    assert not native_bf16()
    with pytest.raises(
        ValueError, match=rf"^{section}\.bf16: an old card has no bfloat16; set {section}\.bf16: false"
    ):
        arguments({"bf16": True}, tmp_path, 0)
    with pytest.raises(ValueError, match=r"^ppo\.bf16: an old card has no bfloat16"):
        make_trainer(bf16=True)
