"""PPO from the papers' formulas: slow, one sample at a time, no padding, no batches: what PPOTrainer has to equal.

Sources: the clipped surrogate is equation 7 of arXiv:1707.06347; advantages are equation 16 of arXiv:1506.02438, as
the sum it defines; the KL penalty in the reward is section 2 of arXiv:1909.08593; k2 and k3 are those of
Schulman, "Approximating KL" (2020); clipped value loss, whitening and a
loss that is a mean over tokens are of "The N+ Implementation Details of RLHF with PPO" (arXiv:2403.17031); Adam is
algorithm 1 of arXiv:1412.6980.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.trainers.ppo.config import PPOConfig


@dataclass
class Episode:
    """Token ids of a prompt and its completion, and per token its score and what was computed before the update."""

    prompt: list[int]
    completion: list[int]
    token_scores: list[float]
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropies: Tensor
    advantages: list[float]
    returns: list[float]


def read(model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float) -> tuple[Tensor, ...]:
    """Log-prob and entropy of each completion token, and the state it was written from, by the model's own forward."""
    output = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True, use_cache=False)
    first, last = len(prompt) - 1, len(prompt) + len(completion) - 1
    logits = output.logits[0, first:last] / temperature
    everything = logits - logits.logsumexp(-1, keepdim=True)
    logprobs = torch.stack([row[token] for row, token in zip(everything, completion, strict=True)])
    return logprobs, -(everything.exp() * everything).sum(-1), output.hidden_states[-1][0, first:last]


def value_of(head: nn.Linear, states: Tensor) -> Tensor:
    """The value of each state."""
    return states @ head.weight[0] + head.bias[0]


def kl_loss_of(logprob: Tensor, ref_logprob: Tensor, ratio: Tensor, estimator: str) -> Tensor:
    """k3 = rho / pi - 1 - log(rho / pi), times the ratio; or k2 = log(pi / rho)^2 / 2."""
    if estimator == "k2":
        return (logprob - ref_logprob) ** 2 / 2
    return ratio * ((ref_logprob - logprob).exp() - 1 - (ref_logprob - logprob))


def credit(episodes: list[Episode], args: PPOConfig) -> None:
    """Fill in the advantages and returns of a rollout."""
    rewards = []
    for number, episode in enumerate(episodes):
        pairs = zip(episode.logprobs.tolist(), episode.ref_logprobs.tolist(), strict=True)
        kl_coef = args.kl_coef if args.kl_placement == "reward" else 0.0
        tokens = [-kl_coef * (logprob - ref) for logprob, ref in pairs]
        baselines = [0.0] * (len(tokens) + 1)
        if args.group_baseline:
            start = number - number % args.num_generations
            group = enumerate(episodes[start : start + args.num_generations], start)
            others = [episode.token_scores for i, episode in group if i != number]
            baselines[:-1] = [sum(still_to_come(o, t) for o in others) / len(others) for t in range(len(tokens))]
        for t, score in enumerate(episode.token_scores):
            tokens[t] += score - (baselines[t] - baselines[t + 1])
        rewards.append(tokens)
    if args.whiten_rewards:
        mean, deviation = mean_and_deviation(rewards)
        rewards = [[(r - mean) / deviation + mean for r in tokens] for tokens in rewards]
    for episode, tokens in zip(episodes, rewards, strict=True):
        values = [*episode.values.tolist(), 0.0]
        delta = [r + args.gamma * values[t + 1] - values[t] for t, r in enumerate(tokens)]
        episode.advantages = [
            sum((args.gamma * args.lam) ** (later - t) * delta[later] for later in range(t, len(delta)))
            for t in range(len(delta))
        ]
        episode.returns = [a + v for a, v in zip(episode.advantages, values, strict=False)]
    if args.scale_rewards == "batch":
        mean, deviation = mean_and_deviation([episode.advantages for episode in episodes])
        for episode in episodes:
            episode.advantages = [(a - mean) / deviation for a in episode.advantages]


def still_to_come(token_scores: list[float], position: int) -> float:
    """What a completion scores from a position on, its last token always included."""
    return sum(token_scores[min(position, len(token_scores) - 1) :])


def mean_and_deviation(rows: list[list[float]]) -> tuple[float, float]:
    """Of all numbers of all rows; the deviation of a sample, with PPO's epsilon in the variance."""
    numbers = [number for row in rows for number in row]
    mean = sum(numbers) / len(numbers)
    return mean, math.sqrt(sum((n - mean) ** 2 for n in numbers) / (len(numbers) - 1) + 1e-8)


class PlainPPO:
    """The policy `model` with its value `head`, and textbook Adam over what of both is trained."""

    def __init__(self, model: PreTrainedModel, head: nn.Linear, args: PPOConfig, optimizer_steps: int) -> None:
        self.model, self.head, self.args, self.optimizer_steps = model, head, args, optimizer_steps
        value_rate = args.value_function_learning_rate
        self.rates = [(p, args.policy_learning_rate) for p in model.parameters() if p.requires_grad]
        self.rates += [(p, value_rate) for p in head.parameters()]
        self.first = [torch.zeros_like(p) for p, _ in self.rates]
        self.second = [torch.zeros_like(p) for p, _ in self.rates]
        self.steps = 0
        self.gradients: list[list[Tensor]] = []
        self.statistics = dict.fromkeys(("policy", "value", "approx_kl", "clipped", "value_clipped", "ratio"), 0.0)
        self.tokens = 0
        self.norms: list[float] = []

    def step(self, episodes: list[Episode]) -> None:
        """One optimizer step on a mini-batch."""
        count = sum(len(episode.completion) for episode in episodes)
        for parameter, _ in self.rates:
            parameter.grad = torch.zeros_like(parameter)
        for episode in episodes:
            (self.loss(episode) / count).backward()
        self.tokens += count
        self.gradients.append([p.grad.clone() for p, _ in self.rates])
        self.adam()

    def loss(self, episode: Episode) -> Tensor:
        """The sum over an episode's tokens."""
        args, total = self.args, torch.zeros(1, dtype=torch.float64)
        logprobs, _, states = read(self.model, episode.prompt, episode.completion, args.temperature)
        values = value_of(self.head, states)
        for t in range(len(episode.completion)):
            advantage, target, old = episode.advantages[t], episode.returns[t], float(episode.values[t])
            ratio = (logprobs[t] - episode.logprobs[t]).exp()
            bounded = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
            surrogate = torch.minimum(ratio * advantage, bounded * advantage)
            near = old + (values[t] - old).clamp(-args.cliprange_value, args.cliprange_value)
            error = torch.maximum((values[t] - target) ** 2, (near - target) ** 2)
            total = total - surrogate + args.value_loss_weight * 0.5 * error
            if args.kl_placement == "loss":
                ref = episode.ref_logprobs[t]
                total = total + args.kl_coef * kl_loss_of(logprobs[t], ref, ratio, args.kl_estimator)
            for name, number in (
                ("policy", -surrogate),
                ("value", 0.5 * error),
                ("approx_kl", 0.5 * ratio.log() ** 2),
                ("clipped", ratio * advantage > bounded * advantage),
                ("value_clipped", (near - target) ** 2 > (values[t] - target) ** 2 + 1e-12),  # not by rounding
                ("ratio", ratio),
            ):
                self.statistics[name] += float(number.detach())
        return total

    def adam(self) -> None:
        """Clip the gradient to its largest norm, then Adam with a linear schedule."""
        args = self.args
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p, _ in self.rates))
        self.norms.append(norm)
        scale = min(1.0, args.max_grad_norm / (norm + 1e-6))
        left = 1 - self.steps / self.optimizer_steps
        self.steps += 1
        for (parameter, rate), first, second in zip(self.rates, self.first, self.second, strict=True):
            gradient = parameter.grad * scale
            first.copy_(args.adam_beta1 * first + (1 - args.adam_beta1) * gradient)
            second.copy_(args.adam_beta2 * second + (1 - args.adam_beta2) * gradient**2)
            mean = first / (1 - args.adam_beta1**self.steps)
            square = second / (1 - args.adam_beta2**self.steps)
            with torch.no_grad():
                parameter -= rate * left * mean / (square.sqrt() + args.adam_epsilon)
