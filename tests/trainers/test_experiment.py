"""A PPOTrainer goes on from the checkpoints of its own experiment alone: the same settings and rewards, unfinished."""

import functools

import pytest
from ppo_toys import read_metrics

from pipeline.rewards import Reward
from pipeline.trainers.checkpoints import list_checkpoints
from pipeline.trainers.ppo.config import PPOConfig

WORDS = ["red"]


def length_reward(sign):
    def length(completions, **columns):
        return [sign * len(text) / 10 for text in completions]

    return length


def halved(value):
    return value / 2


def words_reward(completions, **columns):
    return [halved(sum(word in text for word in WORDS)) for text in completions]


class Limit:
    def __init__(self, limit):
        self.limit = limit

    def __call__(self, completions, **columns):
        return [-max(0.0, len(text) - self.limit) / 10 for text in completions]


def interrupted(make_trainer, **settings):
    """A run that ends after the checkpoint of its second step of three."""
    trainer = make_trainer(save_steps=1, **settings)
    original = trainer.collect_rollout

    def collect(rows):
        if trainer.state.step == 2:
            raise KeyboardInterrupt
        return original(rows)

    trainer.collect_rollout = collect
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert list_checkpoints(trainer.checkpoints)
    return trainer


def refusal(trainer, resume=None):
    before = [path.name for path in list_checkpoints(trainer.checkpoints)]
    with pytest.raises(ValueError) as raised:
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.step == 0
    assert [path.name for path in list_checkpoints(trainer.checkpoints)] == before  # nothing is lost
    return str(raised.value)


def test_the_same_experiment_goes_on_and_once_finished_is_not_passed_over_in_silence(make_trainer):
    interrupted(make_trainer, reward=length_reward(1))
    resumed = make_trainer(save_steps=1, reward=length_reward(1))
    assert resumed.train().step == 3
    assert [line["step"] for line in read_metrics(resumed.output_dir)] == [1, 2, 3]
    message = refusal(make_trainer(save_steps=1, reward=length_reward(1)))
    assert "nothing would be trained" in message and "resume_from_checkpoint=False" in message
    assert make_trainer(save_steps=1, reward=length_reward(1)).train(resume_from_checkpoint=False).step == 3


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"learning_rate": 1e-2}, "learning_rate: 0.005 -> 0.01"),
        ({"reward": length_reward(-1)}, "length.sign: 1 -> -1"),
        ({"seed": 5}, "seed: 0 -> 5"),
        ({"total_episodes": 32}, "total_episodes: 24 -> 32"),
    ],
    ids=["setting", "value of a closure", "seed", "length"],
)
def test_other_settings_are_refused_unless_going_on_is_asked_for(make_trainer, settings, difference):
    interrupted(make_trainer, reward=length_reward(1))
    other = {"reward": length_reward(1), "save_steps": 1} | settings
    message = refusal(make_trainer(**other))
    assert difference in message and "resume_from_checkpoint=True" in message and "output_dir" in message
    resumed = make_trainer(**other)
    assert resumed.train(resume_from_checkpoint=True).step == other.get("total_episodes", 24) // 8
    assert refusal(make_trainer(**{"reward": length_reward(1), "save_steps": 1} | {"learning_rate": 1e-3}))


@pytest.mark.parametrize("resume", [None, True])
@pytest.mark.parametrize(
    ("rewards", "difference"),
    [
        (words_reward, "its rewards are length, and now words_reward"),
        ([length_reward(1), words_reward], "its rewards are length, and now length, words_reward"),
        (Reward("length", length_reward(1), 2.0), "the weight of reward 'length': 1.0 -> 2.0"),
        (Reward("length", words_reward), "the code of reward 'length' has changed"),
    ],
    ids=["another", "one more", "weight", "code"],
)
def test_other_rewards_are_refused_even_if_going_on_is_asked_for(make_trainer, rewards, difference, resume):
    interrupted(make_trainer, reward=length_reward(1))
    message = refusal(make_trainer(save_steps=1, reward=rewards), resume)
    assert difference in message and "resume_from_checkpoint=True" not in message


def described(make_trainer, reward):
    experiment = make_trainer(reward=Reward("mine", reward)).experiment
    values = {key: value for key, value in experiment.settings.items() if key.startswith("mine.")}
    return experiment.rewards["mine"]["code"], values


def test_what_a_reward_reads_and_calls_belongs_to_it(make_trainer, monkeypatch):
    code, values = described(make_trainer, words_reward)
    assert values == {"mine.WORDS": ["red"]}
    monkeypatch.setitem(words_reward.__globals__, "halved", length_reward)
    monkeypatch.setitem(words_reward.__globals__, "halved", lambda value: value / 4)
    changed, _ = described(make_trainer, words_reward)
    assert changed != code
    monkeypatch.setitem(words_reward.__globals__, "WORDS", ["blue"])
    assert described(make_trainer, words_reward) == (changed, {"mine.WORDS": ["blue"]})


def test_objects_partial_functions_and_functions_without_a_file(make_trainer):
    assert described(make_trainer, Limit(3))[1] == {"mine.limit": 3}
    assert described(make_trainer, Limit(3).__call__)[1] == {"mine.limit": 3}
    partial = functools.partial(lambda completions, bonus, **_: [float(bonus)] * len(completions), bonus=2)
    assert described(make_trainer, partial)[1] == {"mine.bonus": 2}
    codes = set()
    for number in ("1.0", "2.0"):
        variables: dict = {}
        exec(f"def made(completions, **_): return [{number}] * len(completions)", variables)
        codes.add(described(make_trainer, variables["made"])[0])
    assert len(codes) == 2


def test_settings_need_no_rewards_where_the_trainer_has_functions(make_trainer):
    assert PPOConfig().rewards == ()
    assert make_trainer(rewards=(), total_episodes=8, reward=length_reward(1)).train().step == 1


def test_the_settings_have_the_import_path_of_the_first_release():
    from pipeline.trainers import config, ppo

    assert config.PPOConfig is ppo.PPOConfig
