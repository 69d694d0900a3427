"""Rewards: how they are looked up, what they are called with, how they are weighed, and which results are refused."""

import asyncio
import copy
import sys
import types

import numpy as np
import pytest
import torch

from pipeline.metrics import load_metric
from pipeline.rewards import (
    Handling,
    Reward,
    RewardConfig,
    RewardError,
    as_completions,
    build_rewards,
    check_rewards,
    combine,
    compute_rewards,
)

PROMPTS = ["Sag es:", "Noch einmal:"]
COMPLETIONS = ["Die Katze saß auf der Matte.", "Ein Hund"]
COLUMNS = {
    "references": [["Die Katze saß auf der Matte."], ["Ein Hund bellt laut im Hof.", "Ein Hund"]],
    "completion_ids": [[5, 6, 2], [7, 2]],
    "source": ["the cat", "a dog"],
}
CHAT = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def score(function, prompts=PROMPTS, completions=COMPLETIONS, **columns):
    """The values of one reward function."""
    return compute_rewards([Reward("mine", function)], prompts, completions, {**COLUMNS, **columns}).by_name["mine"]


def refusal(result):
    """The words about a reward function that gives `result`."""
    with pytest.raises(RewardError) as raised:
        score(lambda **_: result)
    return str(raised.value)


@pytest.fixture
def module(monkeypatch):
    """An importable module `my_rewards`, to which a test adds what it likes."""
    module = types.ModuleType("my_rewards")
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return module


@pytest.mark.parametrize("name", ["bleu", "chrf", "rougeL", "exact_match", "token_f1"])
def test_a_metric_is_a_reward_by_its_name(name):
    rewards = build_rewards([RewardConfig(name, weight=0.5)], language="de")
    expected = load_metric(name, "de").sample_scores(COMPLETIONS, COLUMNS["references"])
    assert expected[0] == pytest.approx(1) and max(expected) <= 1
    for prompts in (PROMPTS, CHAT):  # for chat prompts a completion is a message
        scores = compute_rewards(rewards, prompts, as_completions(prompts, COMPLETIONS), COLUMNS)
        assert scores.by_name[name].tolist() == pytest.approx(expected)
        assert scores.weighted_sum.tolist() == pytest.approx([value / 2 for value in expected])


def test_a_metric_takes_language_and_options():
    [reward] = build_rewards([RewardConfig("bleu")], language="zh")
    references = {"references": [["我喜欢猫和狗。"], ["我"]]}  # one word to the default tokenizer, seven here
    assert 0.1 < score(reward.function, completions=["我喜欢猫和鸟。", "我"], **references)[0] < 0.9
    [reward] = build_rewards([RewardConfig("bleu", options={"lowercase": True})])
    assert score(reward.function, completions=["x", "EIN HUND"])[1] == pytest.approx(1)


def test_the_score_is_the_weighted_sum():
    rewards = [Reward("a", lambda **_: [1.0, 2.0], 0.5), Reward("b", lambda **_: [10, -10], 2.0)]
    scores = compute_rewards(rewards, PROMPTS, COMPLETIONS, COLUMNS).by_name
    assert list(scores) == ["a", "b"] and scores["a"].dtype == torch.float32
    assert combine(rewards, scores).tolist() == [20.5, -19.0]
    assert combine([Reward("a", rewards[0].function, -1.0)], scores).tolist() == [-1.0, -2.0]


def test_none_means_that_a_reward_does_not_apply():
    rewards = [Reward("a", lambda **_: [None, 2.0], 0.5), Reward("b", lambda **_: (1.0, None))]
    scores = compute_rewards(rewards, PROMPTS, COMPLETIONS, COLUMNS).by_name
    assert scores["a"].isnan().tolist() == [True, False]
    assert combine(rewards, scores).tolist() == [1.0, 1.0]
    with pytest.raises(
        RewardError, match=r"^no reward applies to completion 0: every function returned None; .*on_reward_err"
    ):
        combine(rewards[:1], scores)


def test_a_function_is_called_as_trl_calls_it(module):
    """`def f(prompts, completions, completion_ids, <columns>, **kwargs)`, everything aligned."""
    calls = []

    def my_reward(prompts, completions, completion_ids, references, **kwargs):
        calls.append((prompts, completions, completion_ids, references, kwargs))
        return [float(len(ids)) for ids in completion_ids]

    module.my_reward = my_reward
    rewards = build_rewards([RewardConfig("my_rewards.my_reward")])
    scores = compute_rewards(rewards, PROMPTS, COMPLETIONS, COLUMNS).by_name
    assert scores["my_rewards.my_reward"].tolist() == [3.0, 2.0]
    ids, references, source = COLUMNS["completion_ids"], COLUMNS["references"], COLUMNS["source"]
    ((*given, others),) = calls
    assert given == [PROMPTS, COMPLETIONS, ids, references] and others["source"] == source
    assert others.keys() == {"source", "trainer_state", "log_metric", "log_extra"}


@pytest.mark.parametrize("prompts", [PROMPTS, CHAT])
def test_a_function_that_edits_what_it_is_given_edits_copies(prompts):
    completions, columns, seen = as_completions(prompts, COMPLETIONS), copy.deepcopy(COLUMNS), []
    given = [COLUMNS[name] for name in ("completion_ids", "references", "source")]

    def edits(prompts, completions, completion_ids, references, source):
        seen.append(copy.deepcopy((prompts, completions, completion_ids, references, source)))
        completion_ids[0].pop()
        references[0].append("?")
        for texts in (prompts, completions, source):
            texts.reverse()
        if not isinstance(prompts[0], str):
            prompts[0][0]["content"] = completions[0][0]["content"] = "?"
        return [1.0, 1.0]

    async def later(prompts, completions, completion_ids, references, source):
        return edits(prompts, completions, completion_ids, references, source)

    rewards = [Reward("a", edits), Reward("b", edits), Reward("c", later)]
    compute_rewards(rewards, prompts, completions, columns)
    assert seen == [(prompts, as_completions(prompts, COMPLETIONS), *given)] * 3
    assert columns == COLUMNS


def test_chat_completions_are_message_lists():
    def brevity(completions, **kwargs):
        assert [completion[0]["role"] for completion in completions] == ["assistant", "assistant"]
        return [-len(completion[0]["content"]) for completion in completions]

    completions = as_completions(CHAT, COMPLETIONS)
    assert score(brevity, CHAT, completions).tolist() == [-len(text) for text in COMPLETIONS]
    assert as_completions(PROMPTS, COMPLETIONS) == COMPLETIONS
    assert as_completions(CHAT, completions) == completions
    mixed = as_completions([PROMPTS[0], CHAT[1]], COMPLETIONS)
    assert mixed == [COMPLETIONS[0], [{"role": "assistant", "content": COMPLETIONS[1]}]]


def test_options_make_a_function_of_a_class_or_of_a_factory(module):
    class Longer:
        def __init__(self, than: int = 20) -> None:
            self.than = than

        def __call__(self, completions, **kwargs):
            return [float(len(completion) > self.than) for completion in completions]

    module.Longer = Longer
    module.at_least = lambda number: lambda completions, **kwargs: [float(len(c) >= number) for c in completions]
    for name, options, expected in (
        ("Longer", {}, [1, 0]),
        ("Longer", {"than": 5}, [1, 1]),
        ("at_least", {"number": 28}, [1, 0]),
    ):
        [reward] = build_rewards([RewardConfig(f"my_rewards.{name}", options=options)])
        assert score(reward.function).tolist() == expected


def test_the_constant():
    assert score(build_rewards([RewardConfig("constant")])[0].function).tolist() == [1, 1]
    assert score(build_rewards([RewardConfig("constant", options={"value": -0.5})])[0].function).tolist() == [
        -0.5,
        -0.5,
    ]


@pytest.mark.parametrize(
    "result",
    [
        [1, 0.5],
        (1, 0.5),
        [True, 0.5],
        torch.tensor([1, 0.5]),
        torch.tensor([1, 0.5], dtype=torch.float64, requires_grad=True),
        [torch.tensor(1), torch.tensor([0.5])],
        np.array([1, 0.5], dtype=np.float16),
        torch.tensor([[1.0], [0.5]]),  # as classifiers give it
        np.array([[1.0], [0.5]]),
        [np.float32(1), np.float64(0.5)],
    ],
    ids=repr,
)
def test_numbers_of_any_library(result):
    assert score(lambda **_: result).tolist() == [1, 0.5]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned NoneType, expected a list of 2 numbers"),
        (1.0, "returned float, expected a list of 2 numbers"),
        ("ab", "returned str, expected a list of 2 numbers"),
        (b"ab", "returned bytes, expected a list of 2 numbers"),
        ({0: 1.0, 1: 0.5}, "returned dict, expected a list of 2 numbers"),
        (torch.tensor(1.0), "returned float, expected a list of 2 numbers"),
        ((value for value in (1.0, 0.5)), "returned generator, expected a list of 2 numbers"),
        ([], "returned 0 values, expected one for each of 2 completions"),
        ([1.0], "returned 1 values, expected one for each of 2 completions"),
        (torch.ones(3), "returned 3 values, expected one for each of 2 completions"),
        ([1.0, "0.5"], "returned '0.5' for completion 1 ('Ein Hund'), expected a finite number or None"),
        ([[1.0], 0.5], "returned a list of 1 for completion 0 ('Die Katze saß auf der Matte.'), expected one number "
         "for each of its 3 tokens"),
        (torch.ones(2, 3), "returned a list of 3 for completion 1 ('Ein Hund'), expected one number for each of "),
        ([torch.ones(2), 1.0], "returned a list of 2 for completion 0 ("),
        ([1.0, [1.0, float("nan")]], "returned [1.0, nan] for completion 1 ('Ein Hund'), expected a finite number f"),
        ([1.0, [1.0, "2"]], "returned [1.0, '2'] for completion 1 ("),
        ([1.0, float("nan")], "returned nan for completion 1 ('Ein Hund'), expected a finite number or None"),
        ([float("-inf"), 1.0], "returned -inf for completion 0 ("),
        (torch.tensor([0.0, float("nan")]), "returned nan for completion 1 ("),
        ([10**400, 1.0], "returned 1000"),
        ([1.0, {"score": 1}], "returned {'score': 1} for completion 1 ("),
    ],
    ids=lambda value: None if isinstance(value, str) and value.startswith("returned") else repr(value)[:30],
)  # fmt: skip
def test_results_that_are_refused(result, message):
    assert refusal(result).startswith(f"reward 'mine' {message}")
    assert len(refusal(result)) < 300


def test_a_reward_may_pay_single_tokens():
    tokens = Reward("tokens", lambda **_: [[0.5, 0.0, -1.0], None], weight=2.0)
    whole = Reward("whole", lambda **_: [0.25, 1.0])
    scores = compute_rewards([tokens, whole], PROMPTS, COMPLETIONS, COLUMNS)
    assert scores.by_name["tokens"][0] == -0.5 and scores.by_name["tokens"].isnan().tolist() == [False, True]
    assert scores.weighted_sum.tolist() == [-0.75, 1.0]
    # 2 * [0.5, 0, -1] and 0.25 at the last of three tokens; 1.0 at the last of two
    assert scores.token_scores([tokens, whole], [3, 2]).tolist() == [[1.0, 0.0, -1.75], [0.0, 1.0, 0.0]]


def test_a_function_that_raises():
    def broken(completions, **kwargs):
        return [1 / (len(completion) - 8) for completion in completions]  # "Ein Hund" has 8 letters

    with pytest.raises(
        RewardError,
        match=r"^reward 'mine' raised ZeroDivisionError: division by zero for completion 1 \('Ein Hund'\)$",
    ) as raised:
        score(broken)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    with pytest.raises(RewardError, match=r"^reward 'mine' asks for 'difficulty', which the data has no column for; "):
        score(lambda completions, difficulty, **kwargs: difficulty)


class AsyncReward:
    """A reward whose call is a coroutine."""

    async def __call__(self, completions, **columns):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]


async def failing_reward(completions, **columns):
    await asyncio.sleep(0)
    return [1 / (len(text) - 8) for text in completions]  # "Ein Hund" has 8 letters


def test_a_coroutine_is_awaited():
    assert score(AsyncReward()).tolist() == [28.0, 8.0]
    with pytest.raises(RewardError, match=r"ZeroDivisionError: .* for completion 1 "):
        score(failing_reward)
    check_rewards([Reward("mine", AsyncReward())], {"prompt": PROMPTS, "completion": COMPLETIONS})


def test_a_coroutine_is_awaited_where_a_loop_runs():
    async def cell():
        return score(AsyncReward()).tolist()

    assert asyncio.run(cell()) == [28.0, 8.0]


def test_a_coroutine_that_takes_too_long():
    async def slow(completions, **columns):
        await asyncio.sleep(60)

    with pytest.raises(RewardError, match=r"^reward 'slow' did not answer within 0\.1 s"):
        compute_rewards([Reward("slow", slow)], PROMPTS, COMPLETIONS, COLUMNS, Handling("stop", 0.1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig("blue"), "ppo.rewards: 'blue' is not one of constant, learned, bleu, chrf, ter, rouge1, "),
        (RewardConfig("no_such.reward"), "ppo.rewards: cannot import 'no_such.reward' (No module named 'no_such')"),
        (RewardConfig("math.no_such"), "ppo.rewards: cannot import 'math.no_such' ("),
        (RewardConfig(".reward"), "ppo.rewards: cannot import '.reward' ("),
        (RewardConfig("my_rewards.NUMBER"), "ppo.rewards: 'my_rewards.NUMBER' is a int, not a function"),
        (RewardConfig("my_rewards.make", options={"a": 1}), "ppo.rewards: 'my_rewards.make' is a int, not a function"),
        (RewardConfig("my_rewards.make", options={"b": 1}), "ppo.rewards: 'my_rewards.make' cannot be made with the "
         "options {'b': 1} (TypeError: "),
        (RewardConfig("constant", options={"valeu": 1}), "ppo.rewards: 'constant' cannot be made with the options "),
        (RewardConfig("constant", options={"value": "high"}), "ppo.rewards: 'constant' cannot be made with the "
         "options {'value': 'high'} (ValueError: value must be a finite number, found 'high')"),
        (RewardConfig("bleu", options={"lower": True}), "metric bleu: unknown option 'lower'; did you mean 'lower"),
    ],
)  # fmt: skip
def test_rewards_that_cannot_be_built(module, config, message):
    module.NUMBER, module.make = 3, lambda a: a
    with pytest.raises(ValueError) as raised:
        build_rewards([config])
    assert str(raised.value).startswith(message)


def test_a_module_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "half_written_reward.py").write_text("def reward(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"^ppo\.rewards: cannot import 'half_written_reward\.f' \(SyntaxError: "):
        build_rewards([RewardConfig("half_written_reward.f")])


def test_each_reward_once():
    with pytest.raises(ValueError, match=r"^ppo\.rewards: each reward once, .*found bleu, chrf, bleu$"):
        build_rewards([RewardConfig("bleu"), RewardConfig("chrf"), RewardConfig("bleu", weight=2.0)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "a reward needs a name"),
        ({"name": "bleu", "weight": 0.0}, "'bleu' has weight 0, so it would change nothing"),
        ({"name": "bleu", "weight": float("inf")}, "the weight of 'bleu' must be finite, found inf"),
        ({"name": "bleu", "weight": float("nan")}, "the weight of 'bleu' must be finite, found nan"),
    ],
)
def test_lines_that_are_refused(values, message):
    with pytest.raises(ValueError, match=f"^ppo.rewards: {message}"):
        RewardConfig(**values)


@pytest.mark.parametrize("weight", [{"weight": float("nan")}, {"weight_schedule": ((0, 1.0), (8, float("inf")))}])
def test_a_weight_is_finite(weight):
    with pytest.raises(ValueError, match=r"^ppo\.rewards: the weight of 'mine' must be finite, found (nan|inf)$"):
        Reward("mine", lambda **_: [1.0], **weight)


def test_rewards_are_tried_on_the_data_before_training():
    seen = []

    def reward(completions, source, completion_ids, **kwargs):
        seen.append(completions)
        assert {"prompts", "references"} < kwargs.keys() and len(completion_ids) == len(source) == 2
        return [1.0, None]

    rows = {"prompt": PROMPTS, "completion": COMPLETIONS, **{k: COLUMNS[k] for k in ("references", "source")}}
    always = Reward("always", lambda completions, **_: [0.0] * len(completions))
    check_rewards([Reward("mine", reward), always], rows)
    with pytest.raises(RewardError, match="no reward applies to completion 1"):
        check_rewards([Reward("mine", reward)], rows)
    check_rewards([Reward("mine", reward), always], {**rows, "prompt": CHAT})
    assert seen[0] == COMPLETIONS  # and for chat prompts messages, as in training
    assert seen[2] == [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
