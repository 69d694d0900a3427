"""Prompts whose completions all score the same make room for others; completions that are nearly too long lose."""

import asyncio
import shutil
import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from ppo_toys import COLOURS, training_steps, weights
from torch import tensor

from pipeline.models.generation import Completions
from pipeline.rewards import RewardOutputs
from pipeline.rewards.arguments import RewardLog
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.dynamic_sampling import Answers, groups_without_signal, put_in, resample
from pipeline.trainers.ppo.scores import overlong_penalties

NAN = float("nan")


def answers_of(rows: list[int], scores: list[float], dataset=range(9)) -> Answers:
    """Answers whose every part says of which row they are."""
    finished = torch.tensor([row % 2 == 0 for row in rows])
    rewards = RewardOutputs(
        tensor(scores),
        {"r": tensor(scores)},
        {"t": [[float(row)] for row in rows]},
        {i: f"row {row} failed" for i, row in enumerate(rows) if row > 6},
        RewardLog({"m": [1.0]}, {"e": list(rows)}),
    )
    return Answers(dataset, rows, Completions([[row] for row in rows], [str(row) for row in rows], finished), rewards)


def test_groups_without_a_signal():
    # equal; different; one without a score beside another; none with a score; two equal ones beside one without
    scores = tensor([1.0, 1.0, 1.0, 0.0, 1.0, 2.0, NAN, 1.0, NAN, NAN, NAN, NAN, 2.0, 2.0, NAN])
    assert groups_without_signal(scores, 3) == [0, 2, 3, 4]


def test_new_answers_take_the_places_of_the_old():
    before, fresh = answers_of([1, 1, 7, 7], [0.0, 1.0, 2.0, 2.0]), answers_of([8, 8], [3.0, 4.0])
    after = put_in(before, fresh, [2, 3])
    assert after.rows == [1, 1, 8, 8]
    assert after.completions.ids == [[1], [1], [8], [8]] and after.completions.texts == ["1", "1", "8", "8"]
    assert after.completions.finished.tolist() == [False, False, True, True]
    assert after.rewards.weighted_sum.tolist() == after.rewards.by_name["r"].tolist() == [0.0, 1.0, 3.0, 4.0]
    assert after.rewards.by_token == {"t": [[1.0], [1.0], [8.0], [8.0]]}
    assert after.rewards.failures == {2: "row 8 failed", 3: "row 8 failed"}
    assert after.rewards.log == RewardLog({"m": [1.0, 1.0]}, {"e": [1, 1, 8, 8]})


@pytest.mark.parametrize(("rounds", "calls"), [(0, 0), (1, 1), (2, 2), (5, 3)])
def test_the_rounds_are_bounded_and_end_with_the_last_group(rounds, calls):
    asked = []

    def answer(rows, seed):
        asked.append((list(rows), seed))
        return answers_of(list(rows), [0.0, float(len(asked) == 3)] * (len(rows) // 2))

    args = PPOConfig(num_generations=2, dynamic_sampling_rounds=rounds)
    after = resample(answers_of([1, 1, 2, 2], [0.0, 1.0, 3.0, 3.0]), answer, args, seed=5, rank=1)
    assert len(asked) == calls and len({seed for _, seed in asked}) == calls
    assert after.rows[:2] == [1, 1]  # which has a signal
    assert all(rows[0] == rows[1] for rows, _ in asked)
    if calls:
        assert list(after.rows[2:]) == asked[-1][0]


def sparse(prompts: list, completions: list, **columns: list) -> list[float]:
    """1 for a completion with two colours or more, which few have."""
    return [float(sum(word in COLOURS for word in completion.split()) > 1) for completion in completions]


SETTINGS = {"num_generations": 2, "group_baseline": True, "dynamic_sampling_rounds": 3}


def test_fewer_prompts_are_without_a_signal(make_trainer):
    shares = []
    for rounds in (0, 3):
        trainer = make_trainer(f"{rounds}", reward=sparse, **{**SETTINGS, "dynamic_sampling_rounds": rounds})
        trainer.train()
        shares.append(sum(line["objective/frac_reward_zero_std"] for line in training_steps(trainer.output_dir)))
    assert shares[1] < shares[0]


def test_a_resumed_run_draws_the_same_prompts(make_trainer):
    states = []
    for _ in range(2):
        trainer = make_trainer(reward=sparse, save_steps=1, save_total_limit=3, **SETTINGS)
        trainer.train(resume_from_checkpoint=True)
        states.append({name: value.tolist() for name, value in weights(trainer).items()})
        shutil.rmtree(trainer.checkpoints / "checkpoint-3")
    assert states[0] == states[1]


def test_every_answer_stays_with_its_prompt(make_trainer, examples):
    seen = Counter()

    def remember(prompts: list, completions: list, tag: list, **columns: list) -> list[float]:
        assert all(t.endswith(p) for t, p in zip(tag, prompts, strict=True))
        seen.update(prompts)
        return [0.0] * len(prompts)

    trainer = make_trainer(reward=remember, **SETTINGS)
    rows = trainer.prompt_rows(0)
    seen.clear()
    rollout = trainer.collect_rollout(rows)
    assert sum(seen.values()) == 8 * 4  # the rollout, and three rounds that change nothing
    sequences = rollout.sequences
    for row, prompt in enumerate(rollout.prompts):
        ids = sequences.prompt_ids[row][sequences.prompt_mask[row]]
        assert trainer.tokenizer.decode(ids, skip_special_tokens=True).strip() == prompt
    assert list(rollout.prompts) != examples.select(rows)["prompt"]


def test_what_overlong_completions_lose():
    # nothing up to 6 of 10 tokens; then a quarter for each
    lengths = tensor([1, 6, 7, 8, 10])
    torch.testing.assert_close(overlong_penalties(lengths, 10, 4), tensor([0.0, 0.0, 0.25, 0.5, 1.0]))


def test_it_is_taken_from_the_score_at_the_last_token(make_trainer):
    trainer = make_trainer(reward=sparse, score_clip=0.5, soft_punish_cache=2)
    rollout = trainer.collect_rollout(trainer.prompt_rows(0))
    lengths = rollout.sequences.completion_mask.sum(1)
    expected = rollout.rewards["sparse"].clamp(max=0.5) - overlong_penalties(lengths, 4, 2)
    torch.testing.assert_close(rollout.scores, expected)
    torch.testing.assert_close(rollout.token_scores.sum(1), expected)
    assert replace(trainer.args, soft_punish_cache=None).soft_punish_cache is None


@pytest.mark.parametrize("rounds", [0, 1])
def test_log_probs_are_computed_while_async_rewards_are_waited_for(make_trainer, rounds):
    """Without dynamic sampling, whose rewards decide on the completions."""
    computed, seen, tries = threading.Event(), [], 1

    async def waiting(completions: list, **columns: list) -> list[float]:
        for _ in range(tries):
            await asyncio.sleep(0.01)
            if computed.is_set():
                break
        seen.append(computed.is_set())
        return [float(len(completion)) for completion in completions]

    trainer = make_trainer(reward=waiting, **SETTINGS | {"dynamic_sampling_rounds": rounds})
    forward = trainer.learner.forward
    trainer.learner.forward = lambda *tokens: (forward(*tokens), computed.set())[0]
    seen.clear()
    tries = 1 if rounds else 3000
    rollout = trainer.collect_rollout(trainer.prompt_rows(0))
    assert set(seen) == {rounds == 0} and computed.is_set()
    assert rollout.logprobs.shape == rollout.sequences.completion_mask.shape
