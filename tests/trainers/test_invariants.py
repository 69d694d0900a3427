"""What must not change a PPO step, in float64, where only rounding of 1e-16 is left; and what a step must do."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from ppo_toys import read_metrics, training_steps, weights
from torch import Tensor

from pipeline.models.kernels import lm_head as head
from pipeline.models.sequences import Sequences
from pipeline.rewards import RewardConfig
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.rollout import Rollout
from pipeline.trainers.ppo.trainer import PPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler")
TIGHT = {"rtol": 1e-9, "atol": 1e-10}
JUNK = 7.25  # what stands behind the end of an episode, and must never count
HARD = {  # several epochs with clipping, so that a difference of the first one grows
    "num_ppo_epochs": 3,
    "learning_rate": 2e-2,
    "cliprange": 0.05,
    "cliprange_value": 0.05,
    "kl_coef": 0.2,
    "response_length": 6,
}


@pytest.fixture
def make_exact(make_trainer, taught, float64_norms):
    """Trainers in float64 whose policy is some way from the reference, all the same way."""

    def make(name: str = "ppo", **settings) -> PPOTrainer:
        trainer = make_trainer(name, model=taught().double(), **{**HARD, **settings})
        move(trainer)
        return trainer

    return make


def move(trainer: PPOTrainer) -> None:
    """Change everything that is trained, as an update would."""
    generator = torch.Generator().manual_seed(1)
    noise = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in weights(trainer).items()}
    moved = {n: p + 0.03 * noise[n].to(p.dtype) for n, p in weights(trainer).items()}
    trainer.shared.load_trainable_state(moved)


def rollout_of(trainer: PPOTrainer) -> Rollout:
    return trainer.collect_rollout(trainer.prompt_rows(trainer.state.step))


def learn(trainer: PPOTrainer, rollout: Rollout) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Statistics and weights after one step on a rollout."""
    experience, stats = trainer.compute_advantages(rollout)
    return stats | trainer.update(experience), weights(trainer)


def assert_same(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-6)  # some statistics are summed in float32
    torch.testing.assert_close(found[1], expected[1], **TIGHT)


@pytest.mark.parametrize("mini_batches", [1, 2])
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_micro_batches_change_nothing(make_exact, use_peft, mini_batches):
    settings = {"use_peft": use_peft, "num_mini_batches": mini_batches}
    whole = make_exact("4x2", **settings)
    rollout = rollout_of(whole)
    before = weights(whole)
    expected = learn(whole, rollout)
    assert expected[0]["policy/clipfrac_avg"] > 0 and expected[0]["val/clipfrac_avg"] > 0
    assert all((expected[1][name] - before[name]).abs().max() > 1e-3 for name in before)
    for size in (1, 2):
        parts = make_exact(
            f"{size}x", per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings
        )
        assert_same(learn(parts, rollout), expected)


ONE_MICRO_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def count_passes(trainer: PPOTrainer) -> list[int]:
    """Gets the rows of each of the policy's passes."""
    forward, passes = trainer.shared.forward, []

    def counted(sequences: Sequences):
        passes.append(len(sequences))
        return forward(sequences)

    trainer.shared.forward = counted
    return passes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_peft": False},
        {"value_model": "adapter"},
        {"gradient_checkpointing": True},
        {"entropy_coef": 0.01},
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
    ],
    ids=str,
)
def test_the_first_step_takes_the_gradient_of_the_pass_that_scored_the_rollout(make_exact, settings):
    kept, anew = (make_exact(name, **ONE_MICRO_BATCH, **settings) for name in ("kept", "anew"))
    rollouts = [rollout_of(trainer) for trainer in (kept, anew)]
    anew.learner._scored = None
    passes = [count_passes(trainer) for trainer in (kept, anew)]
    found, expected = learn(kept, rollouts[0]), learn(anew, rollouts[1])
    assert len(passes[0]) == len(passes[1]) - 1
    assert found[0] == expected[0] and found[0]["val/ratio_first"] == 1.0
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in found[1].items())


def test_a_pass_is_learnt_from_once_and_only_by_its_own_rollout(make_exact):
    twice, other, parts = (make_exact(name, **ONE_MICRO_BATCH) for name in ("twice", "other", "parts"))
    experience, _ = twice.compute_advantages(rollout_of(twice))
    passes = count_passes(twice)
    assert twice.update(experience)["val/ratio_first"] == 1.0 and len(passes) == 2
    assert twice.update(experience)["val/ratio_first"] != 1.0 and len(passes) == 2 + 3
    rollout = rollout_of(other)
    own = rollout_of(parts)  # which has the same shape
    passes = count_passes(parts)
    learn(parts, rollout)
    assert len(passes) == 3 and len(own.sequences) == 8
    rollout_of(parts)
    parts.evaluate(parts.train_dataset.select(range(2)))  # which needs the memory
    assert parts.learner._scored is None


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_gradient_checkpointing_changes_nothing(make_exact, use_peft):
    plain = make_exact("plain", use_peft=use_peft)
    rollout = rollout_of(plain)
    expected = learn(plain, rollout)
    saving = make_exact("saving", use_peft=use_peft, gradient_checkpointing=True)
    calls, layer = [], saving.shared.language_model.base_model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert_same(learn(saving, rollout), expected)
    assert len(calls) == 2 * 3 * 2  # forward and again on the way back, in 3 epochs of 2 micro-batches


def widened(rollout: Rollout) -> Rollout:
    """The same episodes with two more columns of padding before the prompts and three behind the completions."""
    width = rollout.sequences.completion_mask.shape

    def pad(value: object) -> object:
        if isinstance(value, Tensor) and value.shape == width:
            return torch.nn.functional.pad(value, (0, 3), value=JUNK)
        return value

    sequences = Sequences(
        torch.nn.functional.pad(rollout.sequences.prompt_ids, (2, 0), value=9),
        torch.nn.functional.pad(rollout.sequences.prompt_mask, (2, 0), value=False),
        torch.nn.functional.pad(rollout.sequences.completion_ids, (0, 3), value=11),
        torch.nn.functional.pad(rollout.sequences.completion_mask, (0, 3), value=False),
    )
    fields = {field.name: pad(getattr(rollout, field.name)) for field in dataclasses.fields(rollout)}
    return dataclasses.replace(rollout, **{**fields, "sequences": sequences})


@pytest.mark.parametrize("settings", [{}, {"whiten_rewards": True}, {"num_mini_batches": 2}], ids=str)
def test_padding_changes_nothing(make_exact, settings):
    narrow, wide = make_exact("narrow", **settings), make_exact("wide", **settings)
    rollout = rollout_of(narrow)
    assert widened(rollout).logprobs.shape[1] == rollout.logprobs.shape[1] + 3
    assert_same(learn(wide, widened(rollout)), learn(narrow, rollout))


def test_the_order_of_the_episodes_changes_nothing(make_exact):
    first, second = make_exact("first"), make_exact("second")
    rollout = rollout_of(first)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])

    def reorder(value: object) -> object:
        if isinstance(value, Tensor):
            return value[order]
        if isinstance(value, dict):
            return {name: reorder(part) for name, part in value.items()}
        return [value[i] for i in order.tolist()] if isinstance(value, list) and value else value

    fields = {field.name: reorder(getattr(rollout, field.name)) for field in dataclasses.fields(rollout)}
    sequences = rollout.sequences.rows(order)
    assert_same(
        learn(second, dataclasses.replace(rollout, **{**fields, "sequences": sequences})), learn(first, rollout)
    )


def test_the_schedule_is_in_optimizer_steps(make_trainer):
    trainer = make_trainer(
        total_episodes=20, num_mini_batches=2, warmup_steps=3, learning_rate=0.01, value_learning_rate=0.01
    )
    rates, step = [], trainer.optimizer.step

    def watched() -> None:
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        step()

    trainer.optimizer.step = watched
    trainer.train()
    # 20 episodes are 3 rollouts of 8; each is 2 epochs of 2 mini-batches: 12 steps, the last rollout's included
    expected = [0, 1 / 3, 2 / 3, *(left / 9 for left in range(9, 0, -1))]
    assert rates == [pytest.approx([0.01 * share] * 2) for share in expected]


def test_the_critic_has_its_own_learning_rate(make_trainer):
    # Adam's first step is the rate itself wherever the gradient is well above epsilon.
    trainer = make_trainer(value_learning_rate=0.03, learning_rate=0.001, num_ppo_epochs=1, adam_epsilon=1e-12)
    before = weights(trainer)
    learn(trainer, rollout_of(trainer))
    moved = {name: (after - before[name]).abs().max().item() for name, after in weights(trainer).items()}
    for name, size in moved.items():
        if name.startswith("value_head"):
            assert size == pytest.approx(0.03, rel=1e-3)
        elif "lora_B" in name:  # the gradient of A is 0 as long as B is
            assert size == pytest.approx(0.001, rel=1e-3)


def test_defaults_are_those_of_pretrained_models():
    args = PPOConfig((RewardConfig("constant"),))
    assert (args.adam_epsilon, args.weight_decay) == (1e-8, 0.0)
    assert (args.num_ppo_epochs, args.num_mini_batches, args.gamma, args.lam) == (1, 1, 1.0, 1.0)
    assert (args.temperature, args.top_k, args.top_p) == (1.0, 0, 1.0)  # the raw policy
    assert args.batch_size(1) == 128 and args.kl_estimator == "k1"


def test_completions_that_end_at_once(make_trainer, tokenizer):
    trainer = make_trainer(total_episodes=16, num_generations=2, group_baseline=True, whiten_rewards=True)
    head = trainer.shared.language_model.get_output_embeddings()
    # Nothing but EOS is ever likely.
    head.register_forward_hook(
        lambda module, inputs, logits: logits + 1e4 * (torch.arange(logits.shape[-1]) == tokenizer.eos_token_id)
    )
    rollout = rollout_of(trainer)
    assert rollout.completions == [""] * 8 and rollout.sequences.completion_ids.shape == (8, 1)
    trainer.train()
    lines = training_steps(trainer.output_dir)
    assert len(lines) == 2 and all(line["objective/length"] == 1.0 for line in lines)
    assert not any(value is None for line in lines for value in line.values())
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_rewards_that_draw_from_numpy_and_random_follow_the_seed(make_trainer):
    def noisy(prompts, completions, **columns):
        return [float(np.random.rand() + random.random()) for _ in prompts]

    lines = []
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        np.random.seed(len(lines)), random.seed(len(lines))  # what happened before does not matter
        trainer = make_trainer(name, noisy, seed=seed)
        trainer.train()
        lines.append([line["objective/scores"] for line in read_metrics(trainer.output_dir)])
    assert lines[0] == lines[1] != lines[2]


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_the_head_reads_completion_tokens_alone_and_logits_are_not_kept(make_trainer, monkeypatch, use_peft):
    trainer = make_trainer(use_peft=use_peft, num_ppo_epochs=1)
    experience, _ = trainer.compute_advantages(rollout_of(trainer))
    vocabulary, rows, kept = trainer.shared.language_model.config.vocab_size, [], []
    monkeypatch.setattr(head, "LOGIT_BUDGET", 3 * vocabulary)
    original = head._log_softmax
    monkeypatch.setattr(
        head, "_log_softmax", lambda logits, *rest: rows.append(len(logits)) or original(logits, *rest)
    )

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for part in experience.micro_batches(4):
            trainer.shared(part.sequences)
    assert sum(rows) == experience.num_tokens and max(rows) == 3
    assert not any(tensor.shape[-1:] == (vocabulary,) and tensor.dim() == 2 for tensor in kept)


@pytest.mark.parametrize("generations", [1, 2, 4])
def test_prompts_without_a_signal_are_counted(make_trainer, generations):
    def scripted(values):
        return lambda prompts, completions, **columns: values[: len(prompts)]

    shares = []
    # of 4 pairs 3 are flat, of 2 fours 1; then a batch of nothing but 0.1, which rounds
    for number, values in enumerate(([1.0, 1.0, 1.0, 0.0, 2.0, 2.0, 2.0, 2.0], [0.1] * 8, [1000.1] * 8)):
        trainer = make_trainer(str(number), scripted(values), num_generations=generations)
        shares.append(trainer.compute_advantages(rollout_of(trainer))[1]["objective/frac_reward_zero_std"])
    assert shares == [{1: 0.0, 2: 0.75, 4: 0.5}[generations], 1.0, 1.0]


def reds(prompts, completions, **columns):
    """The share of one word."""
    return [completion.split().count("red") / max(1, len(completion.split())) for completion in completions]


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_share_of_one_token_rises_for_every_seed(make_trainer, use_peft, seed):
    trainer = make_trainer(
        reward=reds,
        seed=seed,
        use_peft=use_peft,
        total_episodes=640,
        per_device_train_batch_size=32,
        num_ppo_epochs=4,
        response_length=4,
        learning_rate=2e-2 if use_peft else 2e-3,
        kl_coef=0.01,
    )
    trainer.train()
    scores = [line["objective/scores"] for line in training_steps(trainer.output_dir)]
    assert len(scores) == 10 and (scores[-2] + scores[-1]) / 2 > 3 * scores[0] and scores[-1] > 0.3
