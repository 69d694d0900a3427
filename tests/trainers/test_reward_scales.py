"""What each of several rewards decides of the scores, and rewards that are divided by their own deviations."""

import json

import pytest
import torch
from ppo_toys import colours, read_metrics, training_steps
from torch import Tensor

from pipeline.rewards import Reward, RewardConfig, build_rewards
from pipeline.trainers.ppo.reward_scales import share_sentences, variance_shares

NAN = float("nan")


class Processes:
    """An accelerator of `count` processes that all hold the same rows."""

    device = torch.device("cpu")

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor * self.count


def shares(values: dict[str, list[float]], weights: tuple[float, ...], scored: list[bool] | None = None, count=1):
    rewards = [Reward(name, len, weight) for name, weight in zip(values, weights, strict=True)]
    by_name = {name: torch.tensor(numbers) for name, numbers in values.items()}
    mask = torch.tensor(scored or [True] * len(next(iter(values.values()))))
    found = variance_shares(rewards, by_name, mask, Processes(count))
    return [found[f"reward_share/{name}"] for name in values] if found else found


@pytest.mark.parametrize(
    ("first", "second", "weights", "expected"),
    [
        # weighted 0 1 0 1 and 0 0 2 2, which do not vary together: variances 1/4 and 1, that of the sum 5/4
        ([0.0, 1, 0, 1], [0.0, 0, 4, 4], (1.0, 0.5), [1 / 5, 4 / 5]),
        # the sum is 0 3 2 5 with variance 13/4; covariances with it: 22/4 - 3/2 * 5/2 = 7/4 and 16/4 - 1 * 5/2 = 6/4
        ([0.0, 1, 2, 3], [0.0, 2, 0, 2], (1.0, 1.0), [7 / 13, 6 / 13]),
        # the sum is 0 1 2 2 with variance 11/16; covariances: 11/4 - 3/2 * 5/4 = 14/16 and -2/4 + 1/4 * 5/4 = -3/16
        ([0.0, 1, 2, 3], [0.0, 0, 0, 1], (1.0, -1.0), [14 / 11, -3 / 11]),
        # None counts 0, as in the sum
        ([0.0, 1, 2, 3], [NAN, 2, NAN, 2], (1.0, 1.0), [7 / 13, 6 / 13]),
    ],
)
def test_shares_worked_out_by_hand(first, second, weights, expected):
    assert shares({"a": first, "b": second}, weights) == pytest.approx(expected)
    assert shares({"a": first, "b": second}, weights, count=2) == pytest.approx(expected)


def test_completions_without_a_score_do_not_count():
    values = {"a": [0.0, 1, 0, 1, 99], "b": [0.0, 0, 4, 4, NAN]}
    assert shares(values, (1.0, 0.5), [True] * 4 + [False]) == pytest.approx([1 / 5, 4 / 5])


def test_equal_sums_and_single_rewards_have_no_shares():
    assert shares({"a": [1.0, 2.0], "b": [2.0, 1.0]}, (1.0, 1.0)) == {}
    assert shares({"a": [1.0, 2.0]}, (1.0,)) == {}
    assert shares({"a": [1.0, 2.0], "b": [1.0, 2.0]}, (1.0, 1.0), [False, False]) == {}


def test_a_reward_that_decides_next_to_nothing_is_named():
    lines = share_sentences({"reward_share/bleu": 0.004, "reward_share/length": 0.996, "reward/bleu": 0.3})
    assert "bleu 0.4%, length 99.6%" in lines[0]
    assert len(lines) == 2 and lines[1].startswith("reward 'bleu' decides 0.40% ") and "score_scaling" in lines[1]
    assert len(share_sentences({"reward_share/a": -0.2, "reward_share/b": 1.2})) == 1
    assert share_sentences({"reward/bleu": 0.3}) == []


def letters(prompts: list, completions: list, **columns: list) -> list[float]:
    """A reward of another scale than `colours`."""
    return [1000.0 * len(text) for text in completions]


def test_the_log_of_the_first_rollout_says_the_shares(make_trainer, capfd):
    trainer = make_trainer(reward=[Reward("colours", colours), Reward("letters", letters)], total_episodes=16)
    trainer.train()
    lines = capfd.readouterr().err.splitlines()
    assert sum("share of each reward" in line for line in lines) == 1
    assert sum("reward 'colours' decides 0.0" in line for line in lines) == 1
    for line in training_steps(trainer.output_dir):
        assert line["reward_share/colours"] + line["reward_share/letters"] == pytest.approx(1)
        assert abs(line["reward_share/colours"]) < 0.01


def test_a_scaled_reward_is_divided_by_its_deviation_in_the_first_rollout(make_trainer, examples):
    rewards = [Reward("colours", colours, 1.0, "reference"), Reward("letters", letters, 2.0, "reference")]
    options = {"reward": rewards, "total_episodes": 24, "eval_steps": 1, "save_steps": 1, "validation": examples}
    trainer = make_trainer(**options)
    first = trainer.collect_rollout(trainer.prompt_rows(0))
    raw = [torch.tensor(function(first.prompts, first.completions)) for function in (colours, letters)]
    deviations = [values.std(correction=0) for values in raw]
    torch.testing.assert_close(first.scores, raw[0] / deviations[0] + 2 * raw[1] / deviations[1])
    torch.testing.assert_close(first.rewards["letters"], raw[1])  # logged as it is
    trainer.train()
    evaluations = [line for line in read_metrics(trainer.output_dir) if "eval_reward" in line]
    assert len(evaluations) == 4
    for line in evaluations:  # by the same weights from the start
        parts = [line[f"eval_reward/{reward.name}"] / float(d) for reward, d in zip(rewards, deviations, strict=True)]
        assert line["eval_reward"] == pytest.approx(parts[0] + 2 * parts[1], rel=1e-4)
    for line in training_steps(trainer.output_dir):
        parts = [line[f"reward/{reward.name}"] / float(d) for reward, d in zip(rewards, deviations, strict=True)]
        assert line["objective/scores"] == pytest.approx(parts[0] + 2 * parts[1], rel=1e-4)


def test_a_resumed_run_keeps_the_deviations(make_trainer):
    rewards = [Reward("colours", colours, 1.0, "reference"), Reward("letters", letters, 1.0, "reference")]
    whole = make_trainer("whole", rewards, total_episodes=24, save_steps=1)
    whole.train()
    half = make_trainer("half", rewards, total_episodes=24, save_steps=1)
    checkpoint = whole.output_dir / "checkpoints" / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert set(state["reward_deviations"]) == {"colours", "letters"} and state["reward_deviations"]["letters"] > 100
    (half.output_dir / "checkpoints").mkdir(parents=True)
    checkpoint.rename(half.output_dir / "checkpoints" / "checkpoint-2")
    half.train(resume_from_checkpoint=True)
    assert training_steps(half.output_dir)[-1] == training_steps(whole.output_dir)[-1]


def test_the_scaling_of_a_reward_is_a_key_of_its_line():
    [reward] = build_rewards([RewardConfig("bleu", score_scaling="reference")])
    assert reward.score_scaling == "reference"
    with pytest.raises(ValueError, match=r"^ppo.rewards: the score_scaling of 'bleu' .*'refrence'; did you mean 'ref"):
        RewardConfig("bleu", score_scaling="refrence")
    with pytest.raises(ValueError, match=r"ppo.rewards: the score_scaling of 'mine'"):
        Reward("mine", colours, 1.0, "running")
