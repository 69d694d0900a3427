"""`value_model: reward_model`: the value function starts as the learned reward, whatever its LoRA shape."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from ppo_toys import colours, weights

from pipeline.models.reward_model import RewardNetwork, RewardRecord, tokenizer_digest, weights_digest
from pipeline.models.sequences import make_sequences
from pipeline.models.shared import SharedModel
from pipeline.rewards import Reward, RewardConfig, RewardError
from pipeline.rewards.learned import AdapterReward
from pipeline.trainers.ppo import PPOConfig
from tests.models.test_reward_model import COMPLETIONS, KINDS, PROMPTS, build, lora, moved, saved, sequences

SHIFT, SCALE, WEIGHT = 0.5, 2.0, 3.0


def cut_scores(network: RewardNetwork) -> torch.Tensor:
    """What the reward model says of each completion so far, `[B, C]`: of its first t tokens in column t."""
    values = torch.zeros(len(COMPLETIONS), max(map(len, COMPLETIONS)))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        for column in range(len(completion)):
            # A padded row whose completion is masked out has the state that has read the prompt alone.
            cut = make_sequences([prompt], [completion[: column + 1]], pad_id=2)
            mask = cut.completion_mask.clone()
            mask[:, column] = False
            given = (cut.prompt_ids, cut.prompt_mask, cut.completion_ids, mask)
            values[row, column] = network(*given).logits[0, 0]
    return values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [{}, {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}, {"use_dora": True}], ids=str
)
def test_values_are_the_scores_of_the_text_so_far(tmp_path, kind, shape):
    network = saved(tmp_path, kind, **shape)
    torch.manual_seed(1)
    plain = SharedModel(build(kind), lora(), value_adapter=True)
    torch.manual_seed(1)
    shared = SharedModel(build(kind), lora(), value_adapter=True)
    shared.add_reward(tmp_path)
    shared.start_value_as_reward(tmp_path, WEIGHT / SCALE, -WEIGHT * SHIFT / SCALE)
    outputs, mask = shared(sequences()), sequences().completion_mask
    expected = WEIGHT * (cut_scores(network) - SHIFT) / SCALE
    torch.testing.assert_close(outputs.values[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert expected[mask].std() > 0.01
    # The policy is the one that a fresh value adapter leaves, and the reward scores as before.
    assert torch.equal(outputs.logprobs, plain(sequences()).logprobs)
    torch.testing.assert_close(shared.reward_scores(sequences()), network.scores(sequences()))
    before, policy = shared.trainable_state(), plain.trainable_state()
    assert all(torch.equal(before[name], policy[name]) for name in policy if ".default." in name)


def test_the_gradient_is_that_of_the_reward_model(tmp_path):
    network = saved(tmp_path)
    shared = SharedModel(build(), lora(r=2), value_adapter=True)
    shared.add_reward(tmp_path)
    shared.start_value_as_reward(tmp_path, 1.0, 0.0)
    shared(sequences()).values.sum().backward()
    (cut_scores(network) * sequences().completion_mask).sum().backward()
    own = {n: p.grad for n, p in network.network.named_parameters() if p.grad is not None}
    values = {
        n.replace(".value.", ".default."): p.grad for n, p in shared.network.named_parameters() if ".value." in n
    }
    assert own.keys() == values.keys() and len(own) == 28
    torch.testing.assert_close(values, own, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shared.value_head.weight.grad, network.head.weight.grad, rtol=1e-3, atol=1e-4)
    others = [p for n, p in shared.network.named_parameters() if ".value." not in n]
    assert all(p.grad is None or not p.grad.any() for p in others)


@pytest.fixture
def learned(taught, tokenizer, tmp_path) -> Callable[[], Reward]:
    """Each call gives the learned reward of a reward adapter over the taught model."""
    model = taught()
    digests = {"base_digest": weights_digest(model), "tokenizer_digest": tokenizer_digest(tokenizer)}
    record = RewardRecord("adapter", "base", SHIFT, SCALE, 0.7, 100, **digests)
    shape = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    moved(RewardNetwork.create(model, shape)).save_pretrained(tmp_path / "reward")
    return lambda: Reward("learned", AdapterReward(tokenizer, record, Path(tmp_path / "reward")), WEIGHT)


def test_a_run_starts_as_the_reward_learns_and_resumes_to_the_same_bit(make_trainer, learned):
    settings = {"value_model": "reward_model", "rewards": (), "save_steps": 1, "total_episodes": 24}
    whole = make_trainer("whole", reward=learned(), **settings)
    start, rollout = weights(whole), whole.collect_rollout(whole.prompt_rows(0))
    sequences = rollout.sequences
    first = replace(
        sequences,
        completion_ids=sequences.completion_ids[:, :1],
        completion_mask=sequences.completion_mask[:, :1],
    )
    longer = sequences.completion_mask[:, 1]
    expected = WEIGHT * (whole.shared.reward_scores(first) - SHIFT) / SCALE  # of the text before the second token
    torch.testing.assert_close(rollout.values[longer, 1], expected[longer], rtol=1e-4, atol=1e-4)
    assert longer.sum() > 1 and expected[longer].std() > 0.01
    whole.train()
    after = weights(whole)
    values = [name for name in start if ".value." in name or name.startswith("value_head")]
    assert len(values) > 2 and not any(torch.equal(start[name], after[name]) for name in values)
    broken = make_trainer("broken", reward=learned(), **settings)
    score = broken.rewards[0].function

    def failing(**columns):
        if broken.state.step == 2:
            raise RuntimeError("stopped")
        return score(**columns)

    broken.rewards = [Reward("learned", failing, WEIGHT)]
    with pytest.raises(RewardError, match="stopped"):
        broken.train()
    resumed = make_trainer("broken", reward=learned(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(resumed).items())


def test_it_needs_one_learned_reward(make_trainer, learned):
    with pytest.raises(ValueError, match=r"^ppo\.value_model: .* one learned reward .* found 0; use adapter"):
        make_trainer(value_model="reward_model", rewards=(), reward=colours)
    for settings, words in (
        ({"rewards": (RewardConfig("constant"),)}, "needs the reward learned in ppo.rewards"),
        ({"rewards": (RewardConfig("learned"),), "use_peft": False}, "need ppo.use_peft: true"),
        ({"rewards": (RewardConfig("learned"),), "vf_coef": 0.0}, "does nothing without a value function"),
    ):
        with pytest.raises(ValueError, match=rf"^ppo\.value_model: .*{words}"):
            PPOConfig(value_model="reward_model", **settings)
    assert PPOConfig((RewardConfig("learned"),), value_model="reward_model").value_loss_weight
