"""The time limit of a reward holds in every thread, as in notebooks and servers, and where there is no SIGALRM."""

import signal
import threading

import pytest
import torch

from pipeline.rewards import Handling, Reward, RewardError, compute_rewards
from pipeline.runtime.time_limit import TimedOut, call_within


def in_a_thread(function):
    """Return what a function returns or raises in another thread."""
    outcomes = []

    def run():
        try:
            outcomes.append(function())
        except BaseException as error:
            outcomes.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return outcomes[0]


@pytest.fixture(params=["another thread", "no SIGALRM"])
def run(request, monkeypatch):
    """How a call is made where no signal interrupts it."""
    if request.param == "no SIGALRM":
        monkeypatch.delattr(signal, "SIGALRM")
        return lambda function: function()
    return in_a_thread


def outcome(run, function):
    try:
        return run(function)
    except BaseException as error:
        return error


def test_a_call_that_hangs_is_ended_where_no_signal_comes(run):
    released = threading.Event()

    def reward(completions, **columns):
        released.wait(60)

    columns = {"completion_ids": [[0]]}
    arguments = ([Reward("slow", reward)], ["a"], ["b"], columns, Handling("stop", 0.1))
    error = outcome(run, lambda: compute_rewards(*arguments))
    released.set()
    assert isinstance(error, RewardError) and "'slow' did not answer within 0.1 s" in str(error)


def test_a_call_in_time_gives_its_result_its_error_and_the_callers_gradient_mode(run):
    with torch.no_grad():
        assert outcome(run, lambda: call_within("r", 30.0, lambda: 3)) == 3
    with torch.no_grad():
        modes = [call_within("r", limit, torch.is_grad_enabled) for limit in (None, 30.0)]
    assert modes == [False, False]
    error = outcome(run, lambda: call_within("r", 30.0, lambda: {}["key"]))
    assert isinstance(error, KeyError) and not isinstance(error, TimedOut)
