"""KL and entropy over a system's own samples against their exact values, and against what PPO logs."""

import os
from statistics import fmean, stdev

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from two_processes import run_in_two

from pipeline.evaluation.divergence import (
    MEASURED_PROMPTS,
    Estimate,
    SampleMeasure,
    entropy_estimate,
    kl_estimate,
    measure_samples,
    measured_rows,
)
from pipeline.models.generation import Decoding
from pipeline.models.loading import load_policy
from pipeline.models.text import encode_prompts
from pipeline.runtime.memory import BatchSize

TEMPERATURE = 0.7
TWO_TOKENS = Decoding(2, temperature=TEMPERATURE)


@pytest.fixture
def sft(taught):
    return taught().eval()


@pytest.fixture
def policy(taught):
    """The SFT model after a push."""
    model = taught().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def next_logprobs(model, texts: list[list[int]]) -> torch.Tensor:
    """Log-probs of the next token after texts of one length, [N, V], at `TEMPERATURE`."""
    return torch.log_softmax(model(input_ids=torch.tensor(texts)).logits[:, -1].double() / TEMPERATURE, -1)


def exact(policy, sft, tokenizer, prompt: str) -> tuple[float, float]:
    """KL in nats a completion and entropy in nats a token, over all completions of at most two tokens."""
    (ids,) = encode_prompts(tokenizer, [prompt])
    first, first_sft = (next_logprobs(model, [ids])[0] for model in (policy, sft))
    every = [[*ids, token] for token in range(len(first))]
    second, second_sft = (next_logprobs(model, every) for model in (policy, sft))
    goes_on = first.exp().clone()
    goes_on[tokenizer.eos_token_id] = 0
    kl = (first.exp() * (first - first_sft)).sum() + goes_on @ (second.exp() * (second - second_sft)).sum(1)
    entropy = -(first.exp() * first).sum() - goes_on @ (second.exp() * second).sum(1)
    return float(kl), float(entropy / (1 + goes_on.sum()))


def test_estimates_are_those_of_all_completions(policy, sft, tokenizer, examples):
    """30 estimates of 100 samples each scatter around the exact values, by as much as each of them says."""
    prompt = examples[0]["prompt"]
    rows = Dataset.from_dict({"prompt": [prompt] * 100})
    drawn = [measure_samples(policy, tokenizer, rows, TWO_TOKENS, BatchSize(100), seed, sft) for seed in range(30)]
    for value, estimates in zip(
        exact(policy, sft, tokenizer, prompt),
        ([kl_estimate(samples) for samples in drawn], [entropy_estimate(samples) for samples in drawn]),
        strict=True,
    ):
        values, error = [estimate.value for estimate in estimates], fmean(e.error for e in estimates)
        assert value > 0.1
        assert fmean(values) == pytest.approx(value, abs=3 * error / 30**0.5)
        assert 0.6 < stdev(values) / error < 1.5


def test_the_temperature_of_the_samples_counts(policy, sft, tokenizer, examples):
    rows = Dataset.from_dict({"prompt": [examples[0]["prompt"]] * 400})

    def estimate(temperature: float) -> Estimate:
        decoding = Decoding(6, temperature=temperature)
        return kl_estimate(measure_samples(policy, tokenizer, rows, decoding, BatchSize(64), 0, sft))

    found = estimate(TEMPERATURE)
    assert all(abs(estimate(other).value - found.value) > 5 * found.error for other in (1.5, 0.01))


def test_the_estimate_agrees_with_what_ppo_logs(
    make_trainer, tokenizer, examples, model_config, taught_directory, tmp_path, sft
):
    """After a few steps, `objective/kl` of a rollout and the estimate on the same prompts."""
    trainer = make_trainer(temperature=TEMPERATURE, learning_rate=2e-2, num_ppo_epochs=2)
    for step in range(3):
        experience, _ = trainer.compute_advantages(trainer.collect_rollout(trainer.prompt_rows(step)))
        trainer.update(experience)
    rollout = trainer.collect_rollout(list(range(64)) * 8)
    ratios = ((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).sum(1)
    entropies = (rollout.entropies * rollout.mask).sum(1)
    trainer.save_model(tmp_path / "policy")
    policy = load_policy(tmp_path / "policy", taught_directory, model_config).eval()
    decoding = Decoding(trainer.args.response_length, temperature=TEMPERATURE)
    rows = examples.select(list(range(64)) * 8)
    samples = measure_samples(policy, tokenizer, rows, decoding, BatchSize(64), 0, sft)
    kl = kl_estimate(samples)
    logged_error = float(ratios.std()) / len(ratios) ** 0.5
    assert kl.value > 0.1 and kl.error < logged_error  # whole distributions scatter less than log ratios
    assert abs(kl.value - float(ratios.mean())) < 4 * (kl.error**2 + logged_error**2) ** 0.5
    entropy = fmean(sample.entropy for sample in samples)
    scatter = stdev(sample.entropy for sample in samples)
    assert abs(entropy - float(entropies.mean())) < 4 * scatter * (2 / len(samples)) ** 0.5


def test_suppressed_tokens_have_no_share(policy, sft, tokenizer, examples):
    """One token each: the entropy and KL of what is left of the distribution."""
    (prompt,) = encode_prompts(tokenizer, examples["prompt"][:1])
    left = [token for token in range(len(tokenizer)) if token % 2]
    decoding = Decoding(1, temperature=TEMPERATURE, suppress_tokens=tuple(range(0, len(tokenizer), 2)))
    (measure,) = measure_samples(policy, tokenizer, examples.select([0]), decoding, BatchSize(1), 0, sft)
    own, theirs = (next_logprobs(model, [prompt])[0, left].log_softmax(-1) for model in (policy, sft))
    assert measure.entropy == pytest.approx(-float(own.exp() @ own), rel=1e-4)
    assert measure.kl_to_sft == pytest.approx(float(own.exp() @ (own - theirs)), rel=1e-4)


def test_of_the_sft_model_itself(sft, taught, tokenizer, examples):
    rows = examples.select(range(5))
    for reference, kl in ((sft, 0.0), (taught().eval(), 0.0), (None, None)):
        samples = measure_samples(sft, tokenizer, rows, TWO_TOKENS, BatchSize(2), 0, reference)
        assert [sample.kl_to_sft for sample in samples] == [kl] * 5
        assert all(sample.entropy > 0 and 1 <= sample.tokens <= 2 for sample in samples)


def test_errors_by_hand():
    samples = [SampleMeasure(1, 1.0, 1.0), SampleMeasure(3, 5.0, 2.0), SampleMeasure(2, 3.0, 6.0)]
    assert (kl_estimate(samples).value, kl_estimate(samples).error) == pytest.approx((3.0, (7 / 3) ** 0.5))
    # 9 nats of 6 tokens; residuals -0.5, 0.5 and 0: sqrt(3 / 2 * 0.5) / 6.
    entropy = entropy_estimate(samples)
    assert (entropy.value, entropy.error) == pytest.approx((1.5, 0.75**0.5 / 6))
    assert kl_estimate(samples[:1]).error is None and kl_estimate([]) is None


def test_at_most_so_many_prompts_are_measured():
    assert measured_rows(3) == [0, 1, 2]
    chosen = measured_rows(5 * MEASURED_PROMPTS // 2)
    assert len(chosen) == len(set(chosen)) == MEASURED_PROMPTS
    assert chosen[:4] == [0, 2, 5, 7]


def test_two_processes_measure_what_one_does(policy, sft, tokenizer, examples, tmp_path, fresh_accelerate):
    rows, decoding = examples.select(range(7)), Decoding(6, temperature=1.0)

    def measure(seed: int = 0) -> list[SampleMeasure]:
        return measure_samples(policy, tokenizer, rows, decoding, BatchSize(3), seed, sft)

    def body() -> None:
        PartialState(cpu=True)
        (tmp_path / os.environ["RANK"]).write_text(repr(measure()))

    run_in_two(body, tmp_path)
    one = measure()
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == repr(one)
    assert one != measure(seed=1)
