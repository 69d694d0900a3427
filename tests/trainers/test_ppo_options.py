"""What PPO's options do to a run of the tiny model, beyond that they change it."""

import json
import math
from dataclasses import replace

import pytest
import torch
from ppo_toys import COLOURS, colours, training_steps, weights

from pipeline.models.generation import Decoding, generate
from pipeline.models.loading import load_policy
from pipeline.rewards import RewardError


def rollout_of(trainer):
    return trainer.collect_rollout(trainer.prompt_rows(trainer.state.step))


def test_the_value_learns_alone_while_it_warms_up(make_trainer):
    trainer = make_trainer(value_warmup_steps=2, total_episodes=24)
    before, seen = weights(trainer), []
    original = trainer.update
    trainer.update = lambda experience: (original(experience), seen.append(weights(trainer)))[0]
    trainer.train()
    heads = [name for name in before if name.startswith("value_head")]
    policy = [name for name in before if name not in heads]
    for state in seen[:2]:
        assert all(torch.equal(state[name], before[name]) for name in policy)
        assert not any(torch.equal(state[name], before[name]) for name in heads)
    assert not any(torch.equal(seen[2][name], seen[1][name]) for name in policy if "lora_B" in name)
    first, second, third = training_steps(trainer.output_dir)
    assert second["objective/kl"] == 0.0 and second["policy/approxkl_avg"] == 0.0
    assert third["lr"] == pytest.approx(0.0, abs=1e-12) and first["loss/value_avg"] > 0


def test_a_value_adapter_leaves_the_policy_to_the_policy(make_trainer):
    """The value loss moves the head and its own adapter only; a head on the trunk moves the policy too."""
    for value_model, moved in (("head", True), ("adapter", False)):
        trainer = make_trainer(value_model, value_model=value_model, vf_coef=5.0, scale_rewards="none")
        experience = trainer.compute_advantages(rollout_of(trainer))[0]
        silent = replace(experience, advantages=torch.zeros_like(experience.advantages))
        with torch.no_grad():
            trainer.shared.value_head.weight.fill_(0.1)  # or its states get no gradient
        before = weights(trainer)
        trainer.update(silent)
        after = weights(trainer)
        policy = [name for name in before if ".default." in name]
        assert policy and any(not torch.equal(before[name], after[name]) for name in policy) == moved
        own = [name for name in before if ".value." in name]
        assert bool(own) == (not moved) and not any(torch.equal(before[n], after[n]) for n in own if "lora_B" in n)


def test_gradient_checkpointing_recomputes_under_the_right_adapter(make_trainer):
    states = []
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        trainer = make_trainer(
            name, value_model="adapter", gradient_checkpointing=checkpointing, total_episodes=16, vf_coef=1.0
        )
        trainer.train()
        states.append(weights(trainer))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_policy_with_a_value_adapter_is_saved_beside_it(make_trainer, taught_directory, model_config):
    trainer = make_trainer(value_model="adapter", total_episodes=16)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    loaded = load_policy(trainer.output_dir, taught_directory, model_config).eval()
    with torch.no_grad():
        expected = trainer.shared.eval().network(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    saved = json.loads((trainer.output_dir / "value" / "adapter_config.json").read_text())
    assert saved["r"] == model_config.lora_r


def test_the_ppo_epochs_end_where_the_policy_has_moved_too_far(make_trainer):
    trainer = make_trainer(target_kl=1e-6, num_ppo_epochs=4, total_episodes=16)
    trainer.train()
    lines = training_steps(trainer.output_dir)
    # the first pass has KL 0 and makes its step, the second sees the KL of that step and ends the batch
    assert [line["policy/optimizer_steps"] for line in lines] == [1.0, 1.0]
    assert lines[-1]["lr"] == pytest.approx(0.0, abs=1e-12)  # the schedule went on
    far = make_trainer("far", target_kl=1e6, num_ppo_epochs=4, total_episodes=16)
    far.train()
    assert training_steps(far.output_dir)[0]["policy/optimizer_steps"] == 4.0


@pytest.mark.parametrize(("placement", "estimator"), [("reward", "k1"), ("loss", "k3"), ("loss", "k2")])
def test_a_kl_penalty_holds_the_policy_near_the_reference(make_trainer, placement, estimator):
    settings = {"num_ppo_epochs": 4, "response_length": 3}
    settings |= {"total_episodes": 320, "per_device_train_batch_size": 32, "learning_rate": 2e-2}
    settings |= {"value_learning_rate": 2e-2, "lam": 0.95}
    found = {}
    for kl_coef, kind in ((0.0, {}), (1.0, {"kl_placement": placement, "kl_estimator": estimator})):
        trainer = make_trainer(f"{kl_coef}", kl_coef=kl_coef, **kind, **settings)
        trainer.train()
        found[kl_coef] = training_steps(trainer.output_dir)[-1]
    assert found[1.0]["objective/kl"] < 0.5 * found[0.0]["objective/kl"]
    paid = found[1.0]["objective/non_score_reward"]
    assert paid < 0 if placement == "reward" else paid == 0.0


def test_the_kl_coefficient_adapts(make_trainer):
    trainer = make_trainer(kl_target=1e-4, kl_horizon=80, kl_coef=0.1, total_episodes=32)
    trainer.train()
    lines = training_steps(trainer.output_dir)
    expected = [0.1]
    for line in lines[:-1]:  # far from so small a target the error is clipped, 8 of 80 episodes at a time
        expected.append(expected[-1] * (1 + (0.2 if line["objective/kl"] > 1e-4 else -0.2) * 8 / 80))
    assert [line["objective/kl_coef"] for line in lines] == pytest.approx(expected)
    assert expected[1] == pytest.approx(0.098)  # the first step has KL 0
    fixed = make_trainer("fixed", kl_coef=0.1, total_episodes=16)
    fixed.train()
    assert [line["objective/kl_coef"] for line in training_steps(fixed.output_dir)] == [0.1, 0.1]


def test_scores_are_divided_by_their_deviation(make_trainer):
    found = {}
    for scaling in ("none", "running", "reference"):
        trainer = make_trainer(scaling, score_scaling=scaling, learning_rate=1e-9, total_episodes=16, seed=1)
        first = rollout_of(trainer)
        raw = torch.tensor(colours(first.prompts, first.completions))
        if scaling != "none":
            torch.testing.assert_close(first.scores, raw / raw.std(correction=0))
        trainer.train()
        found[scaling] = [line["objective/scores"] for line in training_steps(trainer.output_dir)]
    deviation = found["none"][0] / found["reference"][0]
    assert found["reference"][1] == pytest.approx(found["none"][1] / deviation)
    assert found["running"][0] == pytest.approx(found["reference"][0])
    assert found["running"][1] != pytest.approx(found["reference"][1], abs=1e-4)


def test_a_constant_reward_has_no_deviation_to_be_divided_by(make_trainer):
    trainer = make_trainer(reward=lambda prompts, **_: [0.5] * len(prompts), score_scaling="running", total_episodes=8)
    trainer.train()
    line = training_steps(trainer.output_dir)[0]
    assert line["objective/scores"] == 0.5 and line["objective/frac_reward_zero_std"] == 1.0


def test_prompts_without_signal_are_counted(make_trainer):
    def by_prompt(prompts, completions, **columns):
        return [float(prompt.endswith("north")) for prompt in prompts]

    trainer = make_trainer(reward=by_prompt, num_generations=2, total_episodes=8)
    trainer.train()
    assert training_steps(trainer.output_dir)[0]["objective/frac_reward_zero_std"] == 1.0
    mixed = make_trainer("mixed", num_generations=2, total_episodes=8)
    mixed.train()
    assert training_steps(mixed.output_dir)[0]["objective/frac_reward_zero_std"] < 1.0


def test_shuffled_scores_are_those_of_the_rollout_at_other_completions(make_trainer):
    batch = {"per_device_train_batch_size": 32, "response_length": 6, "missing_eos_penalty": 0.25}
    plain = rollout_of(make_trainer(**batch))
    trainer = make_trainer("shuffled", shuffle_scores=True, **batch)
    shuffled = rollout_of(trainer)
    assert shuffled.completions == plain.completions and shuffled.rewards.keys() == plain.rewards.keys()
    assert sorted(shuffled.scores.tolist()) == sorted(plain.scores.tolist())
    assert (shuffled.scores != plain.scores).sum() > 10
    for row, mask in enumerate(shuffled.sequences.completion_mask):
        scores = shuffled.token_scores[row][mask].tolist()
        assert scores == [0.0] * (len(scores) - 1) + [float(shuffled.scores[row])]
    trainer.state = replace(trainer.state, step=1)
    assert (rollout_of(trainer).scores != shuffled.scores).any()


def test_shuffled_scores_leave_a_completion_without_a_score_alone(make_trainer):
    def some(prompts, completions, **columns):
        return [math.nan if completion.startswith("b") else len(completion) / 50 for completion in completions]

    batch = {"reward": some, "on_reward_error": "skip", "per_device_train_batch_size": 32}
    plain = rollout_of(make_trainer(**batch))
    shuffled = rollout_of(make_trainer("shuffled", shuffle_scores=True, **batch))
    assert 0 < plain.scored.sum() < len(plain.scored) and torch.equal(shuffled.scored, plain.scored)
    assert not shuffled.scores[~plain.scored].any()
    assert sorted(shuffled.scores.tolist()) == sorted(plain.scores.tolist())


def test_an_entropy_bonus_keeps_the_policy_undecided(make_trainer):
    found = []
    for bonus in (0.0, 0.3):
        trainer = make_trainer(f"{bonus}", entropy_coef=bonus, kl_coef=0.0, total_episodes=64)
        trainer.train()
        found.append(training_steps(trainer.output_dir)[-1])
    assert found[1]["policy/entropy_avg"] > found[0]["policy/entropy_avg"] + 0.05


def test_completions_end_behind_a_stop_string(make_trainer):
    trainer = make_trainer(stop_strings=("red", "o"), missing_eos_penalty=1.0, response_length=6)
    rollout = rollout_of(trainer)
    stopped = [text for text in rollout.completions if "red" in text or "o" in text]
    assert stopped and all(sum(text.count(stop) for stop in ("red", "o")) == 1 for text in stopped)
    ends = trainer.tokenizer.eos_token_id
    for text, ended, ids, mask in zip(
        rollout.completions,
        rollout.finished,
        rollout.sequences.completion_ids,
        rollout.sequences.completion_mask,
        strict=True,
    ):
        last = int(ids[mask][-1])
        assert bool(ended) == (last == ends or text in stopped)


def test_no_eos_before_the_minimum(make_trainer):
    trainer = make_trainer(min_new_tokens=5, response_length=8)
    lengths = rollout_of(trainer).sequences.completion_mask.sum(1)
    assert lengths.min() >= 6  # five tokens, then EOS at the earliest
    free = rollout_of(make_trainer("free", response_length=8))
    assert free.sequences.completion_mask.sum(1).min() < 6
    prompts = [trainer._prompt_ids[0]]
    greedy = generate(trainer.shared.language_model, trainer.tokenizer, prompts, Decoding(8, min_new_tokens=7), 1)
    assert len(greedy[0]) == 8


def test_a_reward_for_single_tokens_reaches_those_tokens(make_trainer, tokenizer):
    def each(prompts, completions, completion_ids, **columns):
        if completion_ids == [[0]] * len(prompts):  # the check before training
            return [[0.0]] * len(prompts)
        return [[float(tokenizer.decode([i]).strip() in COLOURS) for i in ids] for ids in completion_ids]

    trainer = make_trainer(reward=each, kl_coef=0.0, lam=1.0, scale_rewards="none")
    rollout = rollout_of(trainer)
    for row, mask in enumerate(rollout.sequences.completion_mask):
        ids = rollout.sequences.completion_ids[row][mask].tolist()
        paid = each(["p"], ["c"], [ids])[0]
        assert rollout.token_scores[row][mask].tolist() == paid and rollout.scores[row] == sum(paid)
    experience = trainer.compute_advantages(rollout)[0]
    # value 0, gamma and lambda 1: the advantage of a token is what is still to be paid from it on
    for row, mask in enumerate(rollout.sequences.completion_mask):
        paid = rollout.token_scores[row][mask]
        torch.testing.assert_close(experience.advantages[row][mask], paid.flip(0).cumsum(0).flip(0))
    with pytest.raises(RewardError, match=r"'each' scores single tokens.*ppo\.shuffle_scores"):
        rollout_of(make_trainer("shuffled", reward=each, shuffle_scores=True))
    shaped = make_trainer("shaped", reward=each, reward_shaping="prefix")
    with pytest.raises(RewardError, match=r"'each' scores single tokens itself, which ppo\.reward_shaping: prefix"):
        rollout_of(shaped)
