"""Reward functions as TRL's GRPO calls them: what they are given, what they may return and log, and async ones."""

import asyncio
import functools
import threading
import time

import numpy as np
import pytest
import torch
from transformers import TrainerState

from pipeline.rewards import Handling, Reward, RewardConfig, RewardError, as_rewards, build_rewards, compute_rewards
from pipeline.rewards import event_loop as loops
from pipeline.rewards.rows import compute_row_rewards

PROMPTS = [f"prompt {n}" for n in range(4)]
TEXTS = ["a", "bb", "ccc", "dddd"]
COLUMNS = {"completion_ids": [[n] for n in range(4)], "tag": list("wxyz")}
LENGTHS = [1.0, 2.0, 3.0, 4.0]


def ask(*functions, on_error="stop", timeout=None, state=None):
    """What the functions return together."""
    handling = Handling(on_error, timeout)
    return compute_rewards(as_rewards(functions), PROMPTS, TEXTS, COLUMNS, handling, state)


def values(*functions, **settings):
    """The values of the first function."""
    return next(iter(ask(*functions, **settings).by_name.values())).tolist()


class Brevity:
    """An object that can be called."""

    def __call__(self, completions):
        return [len(text) for text in completions]


def only_texts(completions):
    return [len(text) for text in completions]


def with_column(completions, tag, completion_ids, unused=3):
    assert tag == COLUMNS["tag"] and completion_ids == COLUMNS["completion_ids"] and unused == 3
    return [len(text) for text in completions]


def by_position(completions, /, tag):
    return [len(text) for text in completions]


@pytest.mark.parametrize(
    "function",
    [only_texts, with_column, by_position, Brevity(), functools.partial(only_texts), lambda completions: LENGTHS],
    ids=["texts", "columns", "position", "object", "partial", "lambda"],
)
def test_a_function_without_kwargs_gets_what_it_names(function):
    assert values(function) == LENGTHS


@pytest.mark.parametrize("on_error", ["stop", "skip", "zero"])
def test_an_argument_that_is_no_column_is_named(on_error):
    with pytest.raises(
        RewardError, match=r"^reward 'needy' asks for 'answer', which .* gets prompts, completions, com"
    ):

        def needy(completions, answer):
            return answer

        ask(needy, on_error=on_error)


def test_the_state_of_the_trainer_arrives():
    seen = []
    state = TrainerState(global_step=7, max_steps=9)
    ask(lambda completions, trainer_state: seen.append(trainer_state) or LENGTHS, state=state)
    assert seen == [state]
    ask(lambda completions, trainer_state: seen.append(trainer_state) or LENGTHS)  # as in the report
    assert seen[1].global_step == seen[1].max_steps == 1


def test_numbers_and_columns_that_functions_log():
    def mine(completions, log_metric, log_extra, **columns):
        log_metric("longest", max(map(len, completions)))
        log_metric("longest", np.float32(2))
        log_extra("upper", [text.upper() for text in completions])
        return LENGTHS

    async def other(completions, log_metric, log_extra):
        log_metric("longest", torch.tensor(0.0))
        log_extra("other", list(range(4)))
        return LENGTHS

    log = ask(mine, other).log
    assert log.metrics == {"longest": [4.0, 2.0, 0.0]}
    assert log.extras == {"upper": ["A", "BB", "CCC", "DDDD"], "other": [0, 1, 2, 3]}


def test_what_a_failed_call_logged_does_not_count():
    def picky(completions, log_metric, log_extra):
        log_metric("size", len(completions))
        log_extra("text", completions)
        if "ccc" in completions:
            raise ValueError("no three")
        return [len(text) for text in completions]

    outputs = ask(picky, on_error="skip")
    assert outputs.log.metrics == {"size": [2.0, 1.0]} and list(outputs.failures) == [2]
    assert outputs.log.extras == {"text": ["a", "bb", None, "dddd"]}


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            lambda metric, extra: metric("size", "large"),
            r"log_metric\('size', 'large'\), expected a name and a number",
        ),
        (lambda metric, extra: metric(3, 1.0), r"log_metric\(3, 1.0\), expected a name"),
        (lambda metric, extra: extra("text", [1, 2]), r"log_extra\('text', ...\) with 2 values, .*each of 4 compl"),
    ],
    ids=["value", "name", "length"],
)
def test_what_cannot_be_logged_is_refused(log, message):
    def mine(completions, log_metric, log_extra):
        log(log_metric, log_extra)
        return LENGTHS

    with pytest.raises(RewardError, match=f"^reward 'mine' called {message}"):
        ask(mine, on_error="skip")


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        *((name, True) for name in ("reward", "reward/mine", "lr", "step", "length", "val/x", "reward_share/mine")),
        *((name, False) for name in ("reward_hacking", "length_penalty", "step_accuracy", "lru_hits", "mine/reward")),
    ],
)
def test_names_of_the_trainers_figures_are_refused_and_no_others(name, is_own):
    def mine(completions, log_metric):
        log_metric(name, 1.0)
        return LENGTHS

    if is_own:
        with pytest.raises(RewardError, match=rf"^reward 'mine' called log_metric\('{name}', .* the trainer's own; "):
            ask(mine, on_error="skip")
    else:
        assert ask(mine).log.metrics == {name: [1.0]}


@pytest.mark.parametrize(
    ("column", "is_own"),
    [
        *((name, True) for name in ("step", "prompt", "completion", "score", "reward/mine")),
        *((name, False) for name in ("steps", "prompts", "scores", "rewards", "reward")),
    ],
)
def test_columns_of_the_samples_are_refused_and_no_others(column, is_own):
    def mine(completions, log_extra):
        log_extra(column, completions)
        return LENGTHS

    if is_own:
        with pytest.raises(RewardError, match=rf"^reward 'mine' called log_extra\('{column}', .* the trainer's own; "):
            ask(mine, on_error="skip")
    else:
        assert list(ask(mine).log.extras) == [column]


def test_two_rewards_of_one_name_are_logged_apart():
    rewards = as_rewards(
        [lambda completions: [1.0] * 4, lambda completions: LENGTHS, Reward("<lambda>_2", only_texts)]
    )
    assert [reward.name for reward in rewards] == ["<lambda>", "<lambda>_3", "<lambda>_2"]
    outputs = compute_rewards(rewards, PROMPTS, TEXTS, COLUMNS)
    assert outputs.by_name["<lambda>"].tolist() == [1.0] * 4 and outputs.by_name["<lambda>_3"].tolist() == LENGTHS
    assert outputs.weighted_sum.tolist() == [3.0, 5.0, 7.0, 9.0]
    lines = [RewardConfig("constant", options={"value": value}) for value in (1.0, 2.0)]
    assert [reward.name for reward in build_rewards(lines)] == ["constant", "constant_2"]


@pytest.mark.parametrize(
    "result",
    [
        np.array(LENGTHS, dtype=np.float32),
        [np.int64(1), np.float16(2), np.array(3.0), torch.tensor(4)],
        torch.tensor(LENGTHS, dtype=torch.bfloat16),
        torch.tensor(LENGTHS).unsqueeze(1),
        [True, torch.tensor([2.0], requires_grad=True), np.array([3]), 4],
        np.array([1, 2, 3, 4], dtype=object),
    ],
    ids=["array", "scalars", "bfloat16", "column", "single", "objects"],
)
def test_numbers_of_numpy_and_torch(result):
    assert values(lambda completions: result) == LENGTHS


@pytest.mark.parametrize("nothing", [[None] * 4, np.array([None] * 4)], ids=["list", "array"])
def test_a_batch_that_no_reward_applies_to(nothing):
    def silent(completions):
        return nothing

    with pytest.raises(RewardError, match=r"^no reward applies to completion 0.*ppo\.on_reward_error"):
        ask(silent)
    skipped = ask(silent, silent, on_error="skip")
    assert skipped.weighted_sum.isnan().all() and not skipped.failures
    assert ask(silent, on_error="zero").weighted_sum.tolist() == [0.0] * 4
    assert ask(silent, only_texts).weighted_sum.tolist() == LENGTHS


class AsyncJudge:
    """An object whose call is async, and which asks for all completions at once."""

    def __init__(self):
        self.at_once = self.most = 0

    async def one(self, text):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        while self.most < len(TEXTS):  # all have to be under way before the first one ends
            await asyncio.sleep(0)
        self.at_once -= 1
        return len(text)

    async def __call__(self, completions, **columns):
        return await asyncio.gather(*map(self.one, completions))


def test_an_async_function_asks_at_once():
    judge = AsyncJudge()
    assert values(judge, timeout=30) == LENGTHS and judge.most == 4
    assert values(functools.partial(AsyncJudge().__call__), timeout=30) == LENGTHS


def test_async_functions_run_together_in_one_loop_that_stays():
    """Each waits for the other: one after the other they would never end."""
    inside, running = set(), set()

    def meeting(name):
        async def meet(completions, **columns):
            inside.add(name)
            running.add((asyncio.get_running_loop(), threading.get_ident()))
            while len(inside) < 2:
                await asyncio.sleep(0)
            return LENGTHS

        return meet

    outputs = ask(meeting("first"), only_texts, meeting("second"), timeout=30)
    assert list(outputs.by_name) == ["meet", "only_texts", "meet_2"]
    assert outputs.weighted_sum.tolist() == [3.0, 6.0, 9.0, 12.0]
    inside.clear()
    ask(meeting("first"), meeting("second"), timeout=30)
    assert len(running) == 1 and threading.get_ident() not in {thread for _, thread in running}


def test_other_work_is_done_while_async_functions_are_waited_for():
    """The async function waits for what is done meanwhile: one after the other it would run out of time."""
    order, done = [], threading.Event()

    async def waiting(completions):
        while not done.is_set():
            await asyncio.sleep(0)
        order.append("async")
        return [len(text) for text in completions]

    def plain(completions):
        order.append("plain")
        return [len(text) for text in completions]

    def work():
        order.append("work")
        done.set()

    outputs = compute_rewards(
        as_rewards([waiting, plain]), PROMPTS, TEXTS, COLUMNS, Handling("stop", 30.0), None, work
    )
    assert order == ["plain", "work", "async"] and outputs.by_name["waiting"].tolist() == LENGTHS
    order.clear()
    compute_rewards(as_rewards([plain]), PROMPTS, TEXTS, COLUMNS, Handling("stop", 30.0), None, work)
    assert order == ["plain", "work"]


def test_other_work_that_fails_ends_the_wait():
    async def endless(completions):
        await asyncio.sleep(3600)

    def work():
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        compute_rewards(as_rewards([endless]), PROMPTS, TEXTS, COLUMNS, Handling("stop", 30.0), None, work)
    assert values(AsyncJudge(), timeout=30) == LENGTHS  # in the same loop


def test_async_functions_work_where_a_loop_runs_already():
    async def notebook():
        return values(AsyncJudge(), timeout=30)

    assert asyncio.run(notebook()) == LENGTHS


def test_what_a_plain_function_returns_to_be_awaited():
    async def later(completions):
        return [len(text) for text in completions]

    assert values(lambda completions: later(completions)) == LENGTHS


@pytest.mark.parametrize("on_error", ["skip", "zero"])
def test_an_async_function_that_fails_on_one_completion(on_error):
    async def broken(completions):
        await asyncio.sleep(0)
        if "bb" in completions:
            raise ConnectionError("refused")
        return [len(text) for text in completions]

    with pytest.raises(RewardError, match=r"^reward 'broken' raised ConnectionError: refused for completion 1 \('bb'"):
        ask(broken, AsyncJudge())
    outputs = ask(broken, AsyncJudge(), on_error=on_error)
    assert list(outputs.failures) == [1] and outputs.by_name["AsyncJudge"].tolist() == LENGTHS
    assert outputs.by_name["broken"].nan_to_num(-1.0).tolist() == [1.0, -1.0, 3.0, 4.0]


def test_an_async_function_that_hangs_costs_its_completion_alone():
    async def hanging(completions):
        if "bb" in completions:
            await asyncio.sleep(3600)
        return [len(text) for text in completions]

    outputs = ask(hanging, only_texts, on_error="skip", timeout=0.2)
    assert list(outputs.failures) == [1] and "'hanging' did not answer within 0.2 s" in outputs.failures[1]
    assert outputs.by_name["only_texts"].tolist() == LENGTHS
    with pytest.raises(RewardError, match=r"^reward 'hanging' did not answer within 0\.2 s .* for 4 completions"):
        ask(hanging, timeout=0.2)


def test_an_async_function_that_lets_no_other_run_is_left_behind(monkeypatch):
    monkeypatch.setattr(loops, "GRACE_SECONDS", 0.1)
    freed = threading.Event()

    async def blocking(completions):
        freed.wait(60)
        return LENGTHS

    began = time.monotonic()
    with pytest.raises(RewardError, match=r"'blocking' did not answer within 0\.1 s"):
        ask(blocking, timeout=0.1)
    assert time.monotonic() - began < 30
    assert values(AsyncJudge(), timeout=30) == LENGTHS  # in a loop of its own
    freed.set()


def test_an_async_function_that_cancels_itself_or_exits_is_a_failure():
    async def cancelled(completions):
        raise asyncio.CancelledError

    async def leaving(completions):
        raise SystemExit(3)

    for function in (cancelled, leaving):
        assert len(ask(function, on_error="skip").failures) == 4
    assert values(AsyncJudge(), timeout=30) == LENGTHS


def test_rows_of_the_data_are_scored_by_async_functions(examples):
    async def tagged(completions, tag, log_extra):
        log_extra("tag", tag)
        return [float(text in name) for text, name in zip(completions, tag, strict=True)]

    rows = examples.select(range(3))
    outputs = compute_row_rewards(as_rewards(tagged), rows, rows["prompt"], [[1]] * 3, Handling())
    assert outputs.weighted_sum.tolist() == [1.0] * 3 and outputs.log.extras["tag"] == rows["tag"]
