"""One PPO step of PPOTrainer against plain PPO from the papers' formulas, in float64: the same to rounding."""

import copy
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from plain_ppo import Episode, PlainPPO, credit, read, value_of
from ppo_toys import COLOURS, weights

from pipeline.models.text import decode
from pipeline.trainers.ppo.rollout import Experience, Rollout
from pipeline.trainers.ppo.trainer import PPOTrainer

# Float64 leaves 1e-16; norms of transformers compute in float32 inside, the same for both but for rare roundings.
TIGHT = {"rtol": 1e-8, "atol": 1e-8}
SETTINGS = {
    "defaults": {},
    "large steps": {"num_ppo_epochs": 4, "learning_rate": 3e-2, "cliprange": 0.05, "cliprange_value": 0.02},
    "temperature, discount": {"temperature": 0.7, "gamma": 0.9, "lam": 0.8, "top_p": 0.9},
    "k3 in the loss": {"kl_placement": "loss", "kl_estimator": "k3", "num_ppo_epochs": 3, "learning_rate": 3e-2},
    "k2 in the loss": {"kl_placement": "loss", "kl_estimator": "k2", "num_ppo_epochs": 3, "learning_rate": 3e-2},
    "whitened rewards": {"whiten_rewards": True, "scale_rewards": "none", "missing_eos_penalty": 1.0},
    "groups of shaped rewards": {"num_generations": 2, "group_baseline": True, "reward_shaping": "prefix"},
    "groups": {"num_generations": 2, "group_baseline": True, "max_grad_norm": 0.05, "value_learning_rate": 0.1},
}


@dataclass(frozen=True)
class Compared:
    """What the trainer did in one step, and what plain PPO did on the same rollout."""

    trainer: PPOTrainer
    rollout: Rollout
    experience: Experience
    stats: dict[str, float]
    gradients: list[list[torch.Tensor]]
    episodes: list[Episode]
    plain: PlainPPO


def eighths(prompts: list, completions: list, **columns: list) -> list[float]:
    """An eighth for each colour: scores are kept in float32, which holds these exactly."""
    return [sum(word in COLOURS for word in completion.split()) / 8 for completion in completions]


def moved_trainer(make_trainer, taught, **settings) -> PPOTrainer:
    """A trainer in float64 whose policy is some way from its reference, and whose values are not 0."""
    trainer = make_trainer(
        reward=eighths, model=taught().double(), **{"kl_coef": 0.2, "response_length": 5, **settings}
    )
    generator = torch.Generator().manual_seed(1)
    state = weights(trainer)
    noise = {n: 0.03 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in state.items()}
    trainer.shared.load_trainable_state({name: p + noise[name] for name, p in state.items()})
    assert {p.dtype for p in trainer.shared.parameters()} == {torch.float64}
    return trainer


def plain_episodes(trainer: PPOTrainer, rollout: Rollout, reference) -> list[Episode]:
    """The rollout's texts, read again one by one."""
    sequences, args, episodes = rollout.sequences, trainer.args, []
    for row in range(len(sequences)):
        prompt = sequences.prompt_ids[row][sequences.prompt_mask[row]].tolist()
        completion = sequences.completion_ids[row][sequences.completion_mask[row]].tolist()
        starts = range(len(completion) if args.reward_shaping == "prefix" else 1)
        texts = decode(trainer.tokenizer, [completion[:end] for end in starts])
        scores = [*eighths([], texts), *eighths([], [rollout.completions[row]])]
        token_scores = [after - before for before, after in pairwise(scores)]
        token_scores = [0.0] * (len(completion) - len(token_scores)) + token_scores
        if args.missing_eos_penalty is not None and completion[-1] != trainer.tokenizer.eos_token_id:
            token_scores[-1] -= args.missing_eos_penalty
        with torch.no_grad():
            logprobs, entropies, states = read(trainer.shared.language_model, prompt, completion, args.temperature)
            ref_logprobs = read(reference, prompt, completion, args.temperature)[0]
            values = value_of(trainer.shared.value_head, states)
        episodes.append(Episode(prompt, completion, token_scores, logprobs, ref_logprobs, values, entropies, [], []))
    credit(episodes, args)
    return episodes


def compare(make_trainer, taught, **settings) -> Compared:
    """Run one step both ways. The mini-batches plain PPO takes are those the trainer was seen to take."""
    trainer = moved_trainer(make_trainer, taught, **settings)
    rollout = trainer.collect_rollout(trainer.prompt_rows(0))
    experience, stats = trainer.compute_advantages(rollout)
    episodes = plain_episodes(trainer, rollout, taught().double())
    twin = copy.deepcopy(trainer.shared)
    plain = PlainPPO(twin.language_model, twin.value_head, trainer.args, trainer.args.num_optimizer_steps(1))
    seen, gradients, forward, step = [[]], [], trainer.shared.forward, trainer.optimizer.step

    def watched_forward(sequences):
        for prompt, mask, ids, real in zip(
            sequences.prompt_ids,
            sequences.prompt_mask,
            sequences.completion_ids,
            sequences.completion_mask,
            strict=True,
        ):
            seen[-1].append((prompt[mask].tolist(), ids[real].tolist()))
        return forward(sequences)

    def watched_step():
        groups = trainer.optimizer.param_groups
        gradients.append([p.grad.clone() for group in groups for p in group["params"]])
        seen.append([])
        step()

    trainer.shared.forward, trainer.optimizer.step = watched_forward, watched_step
    stats |= trainer.update(experience)
    for mini_batch in seen[:-1]:
        left = list(episodes)
        chosen = [
            left.pop(next(i for i, e in enumerate(left) if (e.prompt, e.completion) == rows)) for rows in mini_batch
        ]
        plain.step(chosen)
    return Compared(trainer, rollout, experience, stats, gradients, episodes, plain)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_one_step_is_that_of_the_papers(make_trainer, taught, float64_norms, use_peft, settings):
    found = compare(make_trainer, taught, use_peft=use_peft, **settings)
    rollout, experience, plain, args = found.rollout, found.experience, found.plain, found.trainer.args
    lengths = {len(episode.completion) for episode in found.episodes}
    assert len(lengths) > 1
    for row, episode in enumerate(found.episodes):
        length = len(episode.completion)
        for tensor, expected in (
            (rollout.logprobs, episode.logprobs),
            (rollout.ref_logprobs, episode.ref_logprobs),
            (rollout.values, episode.values),
            (rollout.entropies, episode.entropies),
            (experience.advantages, torch.tensor(episode.advantages, dtype=torch.float64)),
            (experience.returns, torch.tensor(episode.returns, dtype=torch.float64)),
        ):
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(tensor[row, :length], expected, **TIGHT)
            assert not tensor[row, length:].any()
    assert len(found.gradients) == len(plain.gradients) == args.num_ppo_epochs * args.num_mini_batches
    for gradients, norm in zip(plain.gradients, plain.norms, strict=True):
        scale = min(1.0, args.max_grad_norm / (norm + 1e-6))
        for gradient in gradients:
            gradient *= scale
    torch.testing.assert_close(found.gradients, plain.gradients, **TIGHT)
    after = [p for p, _ in plain.rates]
    groups = found.trainer.optimizer.param_groups
    torch.testing.assert_close([p for group in groups for p in group["params"]], after, **TIGHT)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
@pytest.mark.parametrize("mini_batches", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_statistics_are_those_of_the_papers(make_trainer, taught, settings, mini_batches):
    found = compare(make_trainer, taught, num_mini_batches=mini_batches, **settings)
    plain, episodes, args = found.plain, found.episodes, found.trainer.args
    sums, tokens = plain.statistics, plain.tokens
    kl = [float((e.logprobs - e.ref_logprobs).sum()) for e in episodes]
    cost = args.kl_coef * fmean(kl) if args.kl_placement == "reward" else 0.0
    returns = torch.tensor([r for e in episodes for r in e.returns], dtype=torch.float64)
    values = torch.cat([e.values for e in episodes])
    expected = {
        "loss/policy_avg": sums["policy"] / tokens,
        "loss/value_avg": sums["value"] / tokens,
        "policy/approxkl_avg": sums["approx_kl"] / tokens,
        "policy/clipfrac_avg": sums["clipped"] / tokens,
        "val/clipfrac_avg": sums["value_clipped"] / tokens,
        "val/ratio": sums["ratio"] / tokens,
        "val/ratio_first": 1.0,
        "policy/grad_norm": fmean(plain.norms),
        "objective/kl": fmean(kl),
        "objective/non_score_reward": -cost,
        "objective/scores": fmean(sum(e.token_scores) for e in episodes),
        "objective/rlhf_reward": fmean(sum(e.token_scores) for e in episodes) - cost,
        "objective/advantage_std": float((returns - values).std(correction=0)),
        "objective/entropy": fmean(float(e.entropies.sum()) for e in episodes),
        "val/explained_variance": 1 - float((returns - values).var() / returns.var()),
    }
    stats = {name: found.stats[name] for name in expected}
    assert stats == pytest.approx(expected, rel=1e-6, abs=1e-6)  # some are summed in float32
    if settings.get("cliprange"):
        assert sums["clipped"] > 0 and sums["value_clipped"] > 0  # the clips were at work
    assert fmean(map(abs, kl)) > 0.01
