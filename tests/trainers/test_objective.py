"""PPO's arithmetic against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor, tensor

from pipeline.models.shared import PolicyOutputs
from pipeline.trainers.ppo.advantages import (
    adapt_kl_coef,
    compute_gae,
    spread_scores,
    subtract_group_baseline,
    subtract_token_baseline,
    whiten,
)
from pipeline.trainers.ppo.objective import Clipping, LossTerms, kl_penalty, ppo_loss
from pipeline.trainers.ppo.rollout import Experience
from pipeline.trainers.ppo.scores import masked_moments

JUNK = 7.25  # what stands behind the end of an episode, and must never count
ALL = torch.ones(6, dtype=torch.bool)


def close(found: Tensor, expected: list | Tensor, tolerance: float = 1e-6) -> None:
    """Equal shape, and equal numbers but for rounding."""
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=tolerance)


def test_kl_k1_is_the_difference_of_the_log_probabilities():
    close(kl_penalty(tensor([[-1.0, -2.0]]), tensor([[-2.0, -1.5]]), "k1"), [[1.0, -0.5]])


def test_kl_k3_is_never_negative():
    # with d = ref - policy, k3 = e^d - 1 - d:  d = -1: e^-1 - 1 + 1 = 0.367879;  d = 0.5: e^0.5 - 1.5 = 0.148721
    close(kl_penalty(tensor([[-1.0, -2.0, -3.0]]), tensor([[-2.0, -1.5, -3.0]]), "k3"), [[0.367879, 0.148721, 0.0]])


def test_kl_estimators_agree_on_average():
    policy, reference = tensor([0.7, 0.2, 0.1]).log(), tensor([0.5, 0.3, 0.2]).log()
    exact = float((policy.exp() * (policy - reference)).sum())
    for estimator in ("k1", "k3"):  # both are unbiased: their mean under the policy is the KL divergence
        assert float((policy.exp() * kl_penalty(policy, reference, estimator)).sum()) == pytest.approx(exact, abs=1e-6)


# A policy over four tokens as a batch in which each stands as often as it is probable: sums over the batch are exact
# expectations. `NOW` is the policy after some steps, whose samples are still those of the batch.
COUNTS = tensor([10, 5, 3, 2], dtype=torch.float64)
TOKENS = torch.repeat_interleave(torch.arange(4), COUNTS.long())
REFERENCE = tensor([0.4, 0.3, 0.1, 0.2], dtype=torch.float64).log()
NOW = (COUNTS / 20).log() + tensor([0.4, -0.3, 0.2, -0.5], dtype=torch.float64)


def policy_gradients(logits: Tensor, term: str, kl_estimator: str, advantages: Tensor | float = 0.0):
    """The gradient at `logits` of a term of PPO's loss, a mean over the batch, and that of KL(policy || reference)."""
    logits = logits.clone().requires_grad_()
    logprobs, old = logits.log_softmax(-1), (COUNTS / 20).log()
    zeros = torch.zeros(20, 1, dtype=torch.float64)
    outputs = PolicyOutputs(logprobs[TOKENS].unsqueeze(1), zeros, zeros)
    experience = Experience(
        sequences=None,
        logprobs=old[TOKENS].unsqueeze(1),
        ref_logprobs=REFERENCE[TOKENS].unsqueeze(1),
        values=zeros,
        advantages=zeros + advantages,
        returns=zeros,
        mask=torch.ones(20, 1, dtype=torch.bool),
        weights=zeros + 1,
        counts=torch.ones(20, dtype=torch.long),
    )
    loss = getattr(ppo_loss(outputs, experience, CLIPPING, kl_estimator), term).sum() / 20
    exact = (logprobs.exp() * (logprobs - REFERENCE)).sum()
    return torch.autograd.grad(loss, logits, retain_graph=True)[0], torch.autograd.grad(exact, logits)[0]


@pytest.mark.parametrize("policy", ["sampled from", "of later"])
def test_the_gradient_of_the_kl_loss_is_that_of_the_kl(policy):
    logits = (COUNTS / 20).log() if policy == "sampled from" else NOW
    gradient, exact = policy_gradients(logits, "reference_kl", "k3")
    close(gradient, exact)
    assert exact.norm() > 0.1


def test_the_gradient_of_the_squared_log_ratio_is_that_of_the_kl_on_samples_of_the_policy():
    close(*policy_gradients((COUNTS / 20).log(), "reference_kl", "k2"))
    gradient, exact = policy_gradients(NOW, "reference_kl", "k2")
    assert (gradient - exact).norm() > 0.1 * exact.norm()  # without the ratio it is that of the first step only


def test_the_kl_as_a_reward_has_the_gradient_of_the_kl_with_k1_only():
    """Which is why other estimators are refused there."""
    logprobs = (COUNTS / 20).log()
    shares = {}
    for estimator in ("k1", "k2", "k3"):
        penalty = kl_penalty(logprobs[TOKENS], REFERENCE[TOKENS], estimator).unsqueeze(1)
        gradient, exact = policy_gradients(logprobs, "policy", "k3", advantages=penalty.mean() - penalty)
        shares[estimator] = float(gradient @ exact / exact.square().sum())
    assert shares["k1"] == pytest.approx(1.0)
    assert max(abs(shares["k2"]), abs(shares["k3"])) < 0.5


def test_scores_stand_at_the_last_real_token():
    mask = tensor([[True, True, False], [True, False, False], [True, True, True]])
    close(spread_scores(tensor([1.0, 2.0, 3.0]), mask), [[0, 1, 0], [2, 0, 0], [0, 0, 3]])


GAMMA, LAM = 0.9, 0.8
REWARDS = tensor([[1.0, 2.0, JUNK], [0.0, 0.0, 1.0]])
VALUES = tensor([[0.5, 1.0, JUNK], [0.2, 0.4, 0.6]])
MASK = tensor([[True, True, False], [True, True, True]])
# gamma * lam = 0.72. First row, two tokens:
#   t=1: delta = 2 + 0.9 * 0 - 1.0 = 1.0;    A = 1.0
#   t=0: delta = 1 + 0.9 * 1.0 - 0.5 = 1.4;  A = 1.4 + 0.72 * 1.0 = 2.12
# Second row, three tokens:
#   t=2: delta = 1 - 0.6 = 0.4;              A = 0.4
#   t=1: delta = 0.9 * 0.6 - 0.4 = 0.14;     A = 0.14 + 0.72 * 0.4 = 0.428
#   t=0: delta = 0.9 * 0.4 - 0.2 = 0.16;     A = 0.16 + 0.72 * 0.428 = 0.46816
ADVANTAGES = [[2.12, 1.0, 0.0], [0.46816, 0.428, 0.4]]
RETURNS = [[2.62, 2.0, 0.0], [0.66816, 0.828, 1.0]]  # advantage + value


def test_advantages_by_hand():
    advantages, returns = compute_gae(REWARDS, VALUES, MASK, GAMMA, LAM)
    close(advantages, ADVANTAGES)
    close(returns, RETURNS)


def test_advantages_at_the_corners():
    # lam 0: one-step differences;  gamma = lam = 1: the sum of the rewards to come less the value
    close(compute_gae(REWARDS, VALUES, MASK, 1.0, 0.0)[0], [[1.5, 1.0, 0.0], [0.2, 0.2, 0.4]])
    close(compute_gae(REWARDS, VALUES, MASK, 1.0, 1.0)[0], [[2.5, 1.0, 0.0], [0.8, 0.6, 0.4]])
    # gamma 0: only the token's own reward counts
    close(compute_gae(REWARDS, VALUES, MASK, 0.0, 0.9)[0], [[0.5, 1.0, 0.0], [-0.2, -0.4, 0.4]])


def test_advantages_do_not_depend_on_padding():
    wide = [torch.nn.functional.pad(part, (0, 4), value=JUNK) for part in (REWARDS, VALUES)]
    mask = torch.nn.functional.pad(MASK, (0, 4), value=False)
    advantages, returns = compute_gae(*wide, mask, GAMMA, LAM)
    close(advantages[:, :3], ADVANTAGES)
    close(returns[:, :3], RETURNS)
    assert not advantages[:, 3:].any() and not returns[:, 3:].any()


def test_group_baseline_leaves_the_own_score_out():
    # 1 - (2 + 6) / 2 = -3;  2 - (1 + 6) / 2 = -1.5;  6 - (1 + 2) / 2 = 4.5;  a group of equal scores has no signal
    close(subtract_group_baseline(tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), ALL[:6], 3), [-3, -1.5, 4.5, 0, 0, 0])


def test_group_baseline_of_a_pair():
    close(subtract_group_baseline(tensor([1.0, 0.0, 0.25, 0.75]), ALL[:4], 2), [1.0, -1.0, -0.5, 0.5])


def test_group_baseline_where_scores_are_missing():
    # 1 - 6 = -5 and 6 - 1 = 5 without the second; 5 is alone
    scored = tensor([True, False, True, True, False, False])
    close(subtract_group_baseline(tensor([1.0, 2.0, 6.0, 5.0, 7.0, 9.0]), scored, 3), [-5, 0, 5, 0, 0, 0])


def test_group_baseline_of_token_scores():
    # still to come: 3, 2, 1 | 4, 2 | 1, and after its end a completion counts as what its last token scored: 2, 1
    scores = tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    mask = tensor([[True, True, True], [True, True, False], [True, False, False]])
    rewards = subtract_token_baseline(scores, ALL[:3], mask, 3)
    # to go less the mean of the others: 3 - 2.5, 2 - 1.5, 1 - 1.5;  4 - 2, 2 - 1.5;  1 - 3.5
    to_go = [[0.5, 0.5, -0.5], [2.0, 0.5, 0.0], [-2.5, 0.0, 0.0]]
    close(rewards.flip(1).cumsum(1).flip(1), to_go)


def test_group_baseline_of_token_scores_at_the_last_token_is_that_of_whole_scores():
    mask = torch.arange(4) < tensor([4, 1, 2, 3]).unsqueeze(1)
    scores, scored = tensor([1.0, 2.0, 6.0, 5.0]), tensor([True, False, True, True])
    token_scores = spread_scores(scores * scored, mask)
    expected = spread_scores(subtract_group_baseline(scores, scored, 4), mask)
    close(subtract_token_baseline(token_scores, scored, mask, 4), expected)


def test_a_token_is_not_better_for_being_early():
    scores = torch.rand(512, 20, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(512, 20, dtype=torch.bool)
    rewards = subtract_token_baseline(scores, torch.ones(512, dtype=torch.bool), mask, 4)
    advantages, _ = compute_gae(rewards, torch.zeros(512, 20), mask, 1.0, 1.0)
    assert advantages.mean(0).var() < 0.01 * advantages.var()  # 87 % against the others' whole scores


def test_whiten_by_hand():
    values = tensor([[1.0, 2.0], [6.0, JUNK]])
    mask = tensor([[True, True], [True, False]])
    # mean 3, deviations -2, -1, 3, sample variance (4 + 1 + 9) / 2 = 7, standard deviation 2.645751
    close(whiten(values, mask, masked_moments(values, mask)), [[-0.755929, -0.377964], [1.133893, 0.0]])
    # without the shift the mean stays 3
    close(
        whiten(values, mask, masked_moments(values, mask), shift_mean=False), [[2.244071, 2.622036], [4.133893, 0.0]]
    )


def test_whitening_statistics_are_global():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 5, generator=generator) * 3 + 100
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 4, 2, 1]).unsqueeze(1)
    whole = whiten(values, mask, masked_moments(values, mask))
    total = masked_moments(values[:3], mask[:3]) + masked_moments(values[3:], mask[3:])
    parts = torch.cat([whiten(values[:3], mask[:3], total), whiten(values[3:], mask[3:], total)])
    close(parts, whole)
    assert whole[mask].mean().item() == pytest.approx(0, abs=1e-5)
    assert whole[mask].std().item() == pytest.approx(1, abs=1e-5)
    alone = whiten(values[:3], mask[:3], masked_moments(values[:3], mask[:3]))
    assert (alone - whole[:3]).abs().max() > 0.01  # the same rows by their own statistics are something else


def test_whiten_is_finite_for_one_token_and_for_equal_values():
    for values in (tensor([[3.0]]), tensor([[3.0, 3.0, 3.0]])):
        mask = torch.ones(values.shape, dtype=torch.bool)
        close(whiten(values, mask, masked_moments(values, mask)), torch.zeros(values.shape), tolerance=1e-3)


CLIPPING = Clipping(low=0.2, high=0.2, value=0.2)


NAMES = [
    "logprobs",
    "values",
    "entropies",
    "old_logprobs",
    "ref_logprobs",
    "old_values",
    "advantages",
    "returns",
    "mask",
]


def loss_of(*, clipping: Clipping = CLIPPING, **tensors: Tensor) -> LossTerms:
    """The loss of tensors [B, C] by name: those of the policy now, and those before with `old_` in front."""
    outputs = PolicyOutputs(*(tensors[name] for name in ("logprobs", "entropies", "values")))
    experience = Experience(
        sequences=None,
        weights=tensors["mask"].to(tensors["old_logprobs"].dtype),
        counts=tensors["mask"].sum(1),
        logprobs=tensors["old_logprobs"],
        values=tensors["old_values"],
        **{name: tensors[name] for name in ("ref_logprobs", "advantages", "returns", "mask")},
    )
    return ppo_loss(outputs, experience, clipping)


def one_token_loss(ratio: float, advantage: float, value=0.0, old_value=0.0, returns=0.0, clipping=CLIPPING):
    """The loss terms of a single token, and the gradient of the policy's with respect to its log-probability."""
    logprob = tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    ones = torch.ones(1, 1)
    terms = loss_of(
        logprobs=logprob,
        values=value * ones,
        entropies=ones,
        old_logprobs=-ones,
        ref_logprobs=-ones,
        old_values=old_value * ones,
        advantages=advantage * ones,
        returns=returns * ones,
        mask=torch.ones(1, 1, dtype=torch.bool),
        clipping=clipping,
    )
    terms.policy.backward()
    return terms, logprob.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 2.0, -2.4, True),  # better than the clip pays for: -1.2 * 2
        (1.5, -2.0, 3.0, False),  # a bad token got likelier: 1.5 * 2, the clip would hide it
        (0.5, 2.0, -1.0, False),  # a good token got less likely: -0.5 * 2
        (0.5, -2.0, 1.6, True),  # less likely than the clip pays for: 0.8 * 2
        (1.1, 2.0, -2.2, False),
        (0.9, -2.0, 1.8, False),
        (1.0, 2.0, -2.0, False),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, clipped):
    terms, gradient = one_token_loss(ratio, advantage)
    assert terms.policy.item() == pytest.approx(loss, abs=1e-5)
    assert terms.policy_clipped.item() == float(clipped)
    # d(-A e^(l - o)) / dl = -A * ratio, and nothing where it is clipped
    assert gradient == pytest.approx(0.0 if clipped else -advantage * ratio, abs=1e-5)
    assert terms.ratio.item() == pytest.approx(ratio, abs=1e-5)
    assert terms.approx_kl.item() == pytest.approx(0.5 * math.log(ratio) ** 2, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "old_value", "returns", "loss", "clipped"),
    [
        (1.0, 0.5, 2.0, 0.845, True),  # held at 0.7: 0.5 * (0.7 - 2)^2, more than 0.5 * (1 - 2)^2
        (1.0, 0.5, 0.0, 0.5, False),  # went the wrong way: 0.5 * 1^2, more than the held 0.5 * 0.7^2
        (0.0, 0.5, -1.0, 0.845, True),  # held at 0.3: 0.5 * (0.3 + 1)^2
        (0.6, 0.5, 2.0, 0.98, False),  # inside the range: 0.5 * 1.4^2
    ],
)
def test_value_loss_by_hand(value, old_value, returns, loss, clipped):
    terms, _ = one_token_loss(1.0, 0.0, value, old_value, returns)
    assert terms.value.item() == pytest.approx(loss, abs=1e-6)
    assert terms.value_clipped.item() == float(clipped)


def random_batch(rows: int, width: int) -> dict[str, Tensor]:
    """The arguments of `loss_of`, and a mask with rows of every length."""
    generator = torch.Generator().manual_seed(1)
    batch = {name: torch.randn(rows, width, generator=generator) for name in NAMES[:-1]}
    batch["old_logprobs"] = batch["logprobs"] + 0.3 * batch["old_logprobs"]
    return {**batch, "mask": torch.arange(width) < (torch.arange(rows) % width + 1).unsqueeze(1)}


def test_loss_sums_over_tokens_whatever_the_padding_and_the_split():
    batch = random_batch(6, 4)
    whole, pad = loss_of(**batch), torch.nn.functional.pad
    padded = loss_of(**{name: pad(t, (0, 3), value=False if name == "mask" else JUNK) for name, t in batch.items()})
    first, second = (loss_of(**{name: t[rows] for name, t in batch.items()}) for rows in (slice(0, 2), slice(2, 6)))
    for name in vars(whole):
        expected = getattr(whole, name)
        torch.testing.assert_close(getattr(padded, name), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(getattr(first, name) + getattr(second, name), expected, rtol=1e-5, atol=1e-5)
    assert 0 < whole.policy_clipped < batch["mask"].sum()
    assert 0 < whole.value_clipped < batch["mask"].sum()


def test_loss_is_finite_on_one_token_and_on_a_ratio_that_exploded():
    one = random_batch(1, 1)
    for logprob in (0.0, 500.0, -500.0):
        logprobs = torch.full((1, 1), logprob, requires_grad=True)
        terms = loss_of(**{**one, "logprobs": logprobs})
        (terms.policy + terms.value + terms.reference_kl).backward()
        assert all(torch.isfinite(value) for value in vars(terms).values())
        assert torch.isfinite(logprobs.grad).all()


def test_the_upper_clip_may_differ_from_the_lower():
    wide = Clipping(low=0.2, high=0.6, value=0.2)
    for ratio, advantage, loss, clipped in ((1.5, 2.0, -3.0, False), (1.7, 2.0, -3.2, True), (0.5, -2.0, 1.6, True)):
        terms, _ = one_token_loss(ratio, advantage, clipping=wide)
        assert terms.policy.item() == pytest.approx(loss, abs=1e-5)
        assert terms.policy_clipped.item() == float(clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (5.0, -2.0, 6.0, True),  # held at 3 * 2 instead of 5 * 2, without gradient
        (2.5, -2.0, 5.0, False),
        (0.5, -2.0, 1.6, True),  # the lower clip acts as ever
        (5.0, 2.0, -2.4, True),  # and so does the upper
    ],
)
def test_dual_clip_by_hand(ratio, advantage, loss, clipped):
    terms, gradient = one_token_loss(ratio, advantage, clipping=Clipping(0.2, 0.2, 0.2, dual=3.0))
    assert terms.policy.item() == pytest.approx(loss, abs=1e-5)
    assert terms.policy_clipped.item() == float(clipped)
    assert gradient == pytest.approx(0.0 if clipped else -advantage * ratio, abs=1e-5)


def test_entropy_and_kl_to_the_reference_are_sums_over_real_tokens():
    logprobs = tensor([[-1.0, -2.0, JUNK]], requires_grad=True)
    reference, zeros = tensor([[-2.0, -1.5, -JUNK]]), torch.zeros(1, 3)
    mask = tensor([[True, True, False]])
    terms = loss_of(
        logprobs=logprobs,
        values=zeros,
        entropies=tensor([[0.5, 0.25, JUNK]]),
        old_logprobs=logprobs.detach(),
        ref_logprobs=reference,
        old_values=zeros,
        advantages=zeros,
        returns=zeros,
        mask=mask,
    )
    assert terms.entropy.item() == 0.75
    # k3, as above, at ratio 1: 0.367879 + 0.148721;  d (ratio k3) / d logprob = k3 + 1 - e^(ref - logprob)
    assert terms.reference_kl.item() == pytest.approx(0.516600, abs=1e-5)
    terms.reference_kl.backward()
    close(logprobs.grad, [[1.0, -0.5, 0.0]])


def test_the_kl_coefficient_follows_its_target():
    # error (9 - 6) / 6 = 0.5, clipped to 0.2; 0.05 * (1 + 0.2 * 256 / 10000)
    assert adapt_kl_coef(0.05, 9.0, 6.0, 256, 10_000) == pytest.approx(0.050256)
    # error -0.1: 0.05 * (1 - 0.1 * 256 / 10000)
    assert adapt_kl_coef(0.05, 5.4, 6.0, 256, 10_000) == pytest.approx(0.049872)
    assert adapt_kl_coef(0.05, 0.0, 6.0, 256, 10_000) == pytest.approx(0.05 * (1 - 0.2 * 0.0256))
    assert adapt_kl_coef(0.05, 6.0, 6.0, 256, 10_000) == 0.05
