"""Reward functions that raise, hang, or return nonsense: named, counted, and without effect on anything else."""

import ctypes
import math
import re
import time
from dataclasses import replace

import forks
import pytest
import torch
from ppo_toys import colours, read_metrics, training_steps, weights
from two_processes import run_in_two

from pipeline.evaluation.config import EvalConfig
from pipeline.evaluation.decodings import DecodedText
from pipeline.evaluation.scoring import ScoredSystem, Scoring, compute_text_rewards
from pipeline.rewards import Handling, Reward, RewardConfig, RewardError, compute_rewards
from pipeline.rewards.rows import count_failures
from pipeline.runtime import time_limit as limits
from pipeline.stages.eval_inputs import report_handling
from pipeline.trainers.ppo.config import PPOConfig

PROMPTS = [f"prompt {n}" for n in range(8)]
TEXTS = [f"text {n}" for n in range(8)]
COLUMNS = {"completion_ids": [[n, 1] for n in range(8)], "tag": list("abcdefgh")}


def length(completions, **columns):
    """A reward without faults."""
    return [float(len(completion)) + number / 8 for number, completion in enumerate(completions)]


def ask(function, on_error="stop", timeout=None, rewards=()):
    """What the reward `mine` and others say of eight texts."""
    handling = Handling(on_error, timeout)
    return compute_rewards([Reward("mine", function, 2.0), *rewards], PROMPTS, TEXTS, COLUMNS, handling)


def failing_on(*bad, calls=None):
    """A function that raises where one of the texts is bad, and else gives each the number in it."""

    def function(completions, tag, completion_ids, prompts):
        if calls is not None:
            calls.append(len(completions))
        numbers = [int(completion.split()[1]) for completion in completions]
        assert [ids[0] for ids in completion_ids] == numbers  # columns stay aligned in halves
        assert ["abcdefgh"[number] for number in numbers] == tag and prompts == [f"prompt {n}" for n in numbers]
        if set(numbers) & set(bad):
            raise ValueError("no connection")
        return numbers

    return function


def test_stop_names_function_error_and_sample():
    calls = []
    message = r"^reward 'mine' raised ValueError: no connection for completion 5 \('text 5'\)$"
    with pytest.raises(RewardError, match=message) as raised:
        ask(failing_on(5, 6, calls=calls))
    assert str(raised.value.__cause__) == "no connection"
    assert calls == [8, 4, 4, 2, 1, 1]  # the first half is well; of the second its first half is not


@pytest.mark.parametrize("bad", [(0,), (7,), (2, 3, 6), tuple(range(8))], ids=str)
@pytest.mark.parametrize("on_error", ["skip", "zero"])
def test_the_completions_at_fault_are_found_and_the_others_keep_their_scores(bad, on_error):
    one = Reward("one", lambda completions, **_: [1.0] * len(completions))
    scores = ask(failing_on(*bad), on_error, rewards=[one])
    assert sorted(scores.failures) == list(bad)
    assert scores.failures[bad[0]] == (
        f"reward 'mine' raised ValueError: no connection for completion {bad[0]} ('text {bad[0]}')"
    )
    for row, total in enumerate(scores.weighted_sum.tolist()):
        if row not in bad:
            assert total == 2.0 * row + 1.0
        else:
            assert math.isnan(total) if on_error == "skip" else total == 1.0
    assert scores.by_name["mine"].isnan().nonzero().flatten().tolist() == list(bad)


def test_a_function_that_fails_on_all_together_only():
    def at_most_four(completions, **_):
        if len(completions) > 4:
            raise MemoryError("too many")
        return length(completions)

    scores = ask(at_most_four, "skip")
    assert not scores.failures and not scores.weighted_sum.isnan().any()
    with pytest.raises(RewardError, match=r"raised MemoryError: .*for 8 completions together"):
        ask(at_most_four)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("by_token", [False, True], ids=["score", "tokens"])
def test_nan_and_infinity_follow_the_same_policy(bad, by_token):
    def function(completions, **_):
        return [[0.5, bad if n == 3 else 1.0] if by_token else bad if n == 3 else 1.5 for n in range(8)]

    expected = rf"reward 'mine' returned .*{bad}\S* for completion 3 \('text 3'\), expected a finite number"
    with pytest.raises(RewardError, match=expected):
        ask(function)
    for on_error, total in (("skip", math.nan), ("zero", 0.0)):
        scores = ask(function, on_error)
        assert list(scores.failures) == [3] and re.match(expected, scores.failures[3])
        assert [str(value) for value in scores.weighted_sum.tolist()] == ["3.0"] * 3 + [str(total)] + ["3.0"] * 4
        spread = scores.token_scores([Reward("mine", function, 2.0)], [2] * 8)
        assert spread.isfinite().all() and spread[3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda n: [1.0] * (n - 1), "returned 7 values, expected one for each of 8 completions"),
        (lambda n: ["1.0"] * n, "returned '1.0' for completion 0 ('text 0'), expected a finite number or None"),
        (lambda n: [[1.0, [2.0]]] * n, "returned [1.0, [2.0]] for completion 0 ('text 0'), expected a finite number"),
        (lambda n: [torch.ones(3)] * n, "returned a list of 3 for completion 0 ('text 0'), expected one number for "),
        (lambda n: torch.tensor(1.0), "returned float, expected a list of 8 numbers"),
        (lambda n: {"scores": [1.0] * n}, "returned dict, expected a list of 8 numbers"),
    ],
    ids=["length", "strings", "nested", "tensors", "one tensor", "mapping"],
)
@pytest.mark.parametrize("on_error", ["stop", "skip", "zero"])
def test_what_is_no_list_of_numbers_stops_whatever_the_policy(result, message, on_error):
    """That is a fault of the function, not of a sample."""
    with pytest.raises(RewardError) as raised:
        ask(lambda completions, **_: result(len(completions)), on_error)
    assert str(raised.value).startswith(f"reward 'mine' {message}")


def sleeping_on(bad, seconds=60.0):
    """A function that sleeps where the text is bad."""

    def function(completions, **_):
        if any(completion == f"text {bad}" for completion in completions):
            time.sleep(seconds)
        return length(completions)

    return function


def stubborn(completions, **_):
    """Asks again whatever happens, as functions that call a service do."""
    for _ in range(3):
        try:
            time.sleep(60)
        except Exception:
            continue
    return length(completions)


def deaf(completions, **_):
    """Goes on after the first interruption, whatever it is."""
    try:
        time.sleep(60)
    except:  # noqa: E722
        time.sleep(60)
    return length(completions)


def busy(completions, **_):
    while True:
        pass


@pytest.mark.parametrize(
    "function", [sleeping_on(5), stubborn, deaf, busy], ids=["sleeping", "stubborn", "deaf", "busy"]
)
def test_a_hanging_function_is_ended_and_named(function):
    before, began = limits.signal.getsignal(limits.signal.SIGALRM), time.monotonic()
    with pytest.raises(
        RewardError, match=r"^reward 'mine' did not answer within 0\.2 s \(ppo\.reward_timeout\) for 8 completions, "
    ):
        ask(function, timeout=0.2)
    assert time.monotonic() - began < 20
    assert limits.signal.getsignal(limits.signal.SIGALRM) == before
    assert limits.signal.getitimer(limits.signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_completion_that_makes_it_hang_is_found():
    scores = ask(sleeping_on(5), "skip", timeout=0.1)
    assert list(scores.failures) == [5] and "did not answer within 0.1 s" in scores.failures[5]
    scores = ask(busy, "skip", timeout=0.01)  # all of them: not each is waited for
    assert sorted(scores.failures) == list(range(8)) and scores.weighted_sum.isnan().all()


def test_a_function_that_is_in_time_is_left_alone():
    assert ask(length, timeout=30).weighted_sum.tolist() == ask(length).weighted_sum.tolist()


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (ctypes.CDLL, "error: reward 'mine' did not answer within 0.1 s (ppo.reward_timeout) and could not be interr"),
        (ctypes.PyDLL, "in hanging"),  # it holds the lock of the interpreter: the stack alone names it
    ],
    ids=["other threads run", "no other thread runs"],
)
def test_library_code_that_hangs_ends_the_process(library, message, monkeypatch, capfd):
    monkeypatch.setattr(limits, "GRACE_SECONDS", 0.2)
    mutex = ctypes.create_string_buffer(128)

    def hanging(completions, **_):
        for _ in range(2):  # the second waits for the first, and no signal ends it
            library(None).pthread_mutex_lock(mutex)

    began = time.monotonic()
    assert forks.run(lambda: ask(hanging, "skip", timeout=0.1)) == 1
    assert time.monotonic() - began < 30
    assert message in capfd.readouterr().err


def sometimes(bad, message="no connection"):
    """The colours, but for completions to rows whose tag is bad: those raise."""

    def reward(prompts, completions, tag, completion_ids, **columns):
        if completion_ids != [[0]] * len(prompts) and set(tag) & set(bad):
            raise ValueError(message)
        return colours(prompts, completions)

    return reward


def learnt(trainer, rows):
    """Advantages and gradients of the first step, and the statistics of its rollout."""
    with torch.no_grad():
        trainer.shared.value_head.bias.fill_(0.3)  # or no value would be far from a return of 0
    rollout = trainer.collect_rollout(rows)
    experience, stats = trainer.compute_advantages(rollout)
    found = {}

    def step():
        found.update({n: p.grad.clone() for n, p in trainer.shared.named_parameters() if p.requires_grad})

    trainer.optimizer.step = step
    stats |= trainer.update(experience)
    return rollout, experience, found, stats


SETTINGS = {"num_ppo_epochs": 1, "kl_coef": 0.2, "missing_eos_penalty": 0.5, "score_scaling": "running"}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
def test_a_skipped_completion_counts_nowhere(make_trainer, examples, capfd):
    """The step is that of a batch without it: advantages, gradients, statistics, moments."""
    with_it = make_trainer("with", on_reward_error="skip", **SETTINGS)
    rows = with_it.prompt_rows(0)
    bad = examples["tag"][rows[3]]
    with_it.rewards = [Reward("colours", sometimes([bad]))]
    rollout, experience, gradients, stats = learnt(with_it, rows)
    assert rollout.scored.tolist() == [True] * 3 + [False] + [True] * 4
    assert rollout.scores[3] == 0 and not experience.advantages[3].any() and not experience.mask[3].any()
    assert stats["objective/reward_errors"] == 1.0
    said = capfd.readouterr().err
    assert (
        "step 1: 1 score left out (ppo.on_reward_error): reward 'colours' raised ValueError: no connection for "
        in said
    )

    without = make_trainer("without", **SETTINGS)
    with torch.no_grad():
        without.shared.value_head.bias.fill_(0.3)
    others = [row for row in range(8) if row != 3]
    whole = rollout.sequences.rows(torch.tensor(others))
    collected = without.collect_rollout(rows)
    keep = torch.tensor(others)
    alone = replace(
        collected,
        sequences=whole,
        **{
            name: getattr(collected, name)[keep, : whole.completion_ids.shape[1]]
            for name in ("logprobs", "ref_logprobs", "values", "entropies")
        },
    )
    own = torch.tensor(colours(rollout.prompts, rollout.completions))[keep]
    # the paying of seven: scaled by the deviation of seven scores, less the penalty
    paid = own / own.double().std(correction=0).float() - 0.5 * (~collected.finished[keep])
    tokens = torch.zeros(whole.completion_mask.shape)
    tokens[torch.arange(7), whole.completion_mask.sum(1) - 1] = paid
    alone = replace(
        alone, scores=paid, token_scores=tokens, rewards={"colours": own}, finished=collected.finished[keep],
        scored=torch.ones(7, dtype=torch.bool), moments=rollout.moments,
    )  # fmt: skip
    expected, expected_stats = without.compute_advantages(alone)
    torch.testing.assert_close(experience.advantages[keep], expected.advantages, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(experience.returns[keep], expected.returns, rtol=1e-5, atol=1e-6)
    for name, value in expected_stats.items():
        if name != "objective/reward_errors":
            assert stats[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    found = {}
    without.optimizer.step = lambda: found.update(
        {n: p.grad.clone() for n, p in without.shared.named_parameters() if p.requires_grad}
    )
    without.update(expected)
    torch.testing.assert_close(gradients, found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"num_mini_batches": 2}, {"num_generations": 2, "group_baseline": True}])
def test_a_run_goes_on_over_failures_and_counts_them(make_trainer, examples, settings, capsys):
    bad = examples["tag"][::3]
    trainer = make_trainer(
        reward=sometimes(bad, "no connection to https://me:password@service"),
        on_reward_error="skip",
        validation=examples.select(range(6)),
        **settings,
    )
    trainer.train()
    errors = [line["objective/reward_errors"] for line in training_steps(trainer.output_dir)]
    rows = [trainer.prompt_rows(step) for step in range(3)]
    assert errors == [sum(examples["tag"][row] in bad for row in step) for step in rows] and sum(errors) > 3
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    held_out = [line for line in read_metrics(trainer.output_dir) if "eval_reward" in line]
    assert all(line["eval_reward"] is not None for line in held_out)  # over the four that have a score
    said = capsys.readouterr().err
    assert "no connection to https://***@service" in said and "password" not in said


def test_zero_pays_nothing_and_learns_from_it(make_trainer, examples):
    trainer = make_trainer(on_reward_error="zero")
    rows = trainer.prompt_rows(0)
    trainer.rewards = [Reward("colours", sometimes([examples["tag"][rows[3]]]))]
    rollout = trainer.collect_rollout(rows)
    assert rollout.scored.all() and rollout.scores[3] == 0.0 and len(rollout.failures) == 1


def test_prefixes_that_fail_cost_their_completion_alone(make_trainer, examples, capfd):
    trainer = make_trainer(on_reward_error="skip", reward_shaping="prefix")
    rows = trainer.prompt_rows(0)
    reward = sometimes([examples["tag"][rows[3]]])
    whole = trainer.collect_rollout(rows)

    def of_prefixes(completions, completion_ids, **columns):
        if len(completions) == 8:  # the whole texts
            return colours(completions, completions)
        return reward(completions=completions, completion_ids=completion_ids, **columns)

    trainer.rewards = [Reward("colours", of_prefixes)]
    rollout = trainer.collect_rollout(rows)
    assert rollout.scored.tolist() == [True] * 3 + [False] + [True] * 4 and not rollout.token_scores[3].any()
    keep = rollout.scored
    torch.testing.assert_close(rollout.token_scores[keep], whole.token_scores[keep])
    assert len(rollout.failures) == 1 and trainer.compute_advantages(rollout)[1]["objective/reward_errors"] == 1
    assert "ppo.on_reward_error" in capfd.readouterr().err


def test_a_step_without_any_score_ends_the_run(make_trainer, examples):
    trainer = make_trainer(reward=sometimes(examples["tag"]), on_reward_error="skip")
    with pytest.raises(RewardError, match="PPO step 1: no completion has a score"):
        trainer.train()
    assert not list(trainer.checkpoints.glob("checkpoint-*"))


def test_a_function_may_fail_on_the_empty_text_that_stands_for_no_completion(make_trainer, examples):
    def divides(completions):
        return [1 / len(text) for text in completions]

    prompts = examples.select_columns(["prompt"])
    make_trainer(reward=divides, train=prompts, on_reward_error="skip")
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        make_trainer(reward=divides, train=prompts)


def test_a_broken_function_is_refused_before_the_first_step(make_trainer):
    """Whatever is done about single failures later."""

    def broken(completions, **columns):
        raise KeyError("references")

    with pytest.raises(RewardError, match="raised KeyError: 'references'"):
        make_trainer(reward=broken, on_reward_error="skip")
    with pytest.raises(RewardError, match=r"did not answer within 0\.1 s"):
        make_trainer(reward=busy, on_reward_error="skip", reward_timeout=0.1)


def test_processes_agree_on_failures_of_one_of_them(make_trainer, examples, tmp_path):
    """The second process loses all its scores in the first step; both end with the same weights."""

    def body():
        trainer = make_trainer(on_reward_error="skip", gradient_accumulation_steps=1, total_episodes=16)
        rank = trainer.accelerator.process_index
        bad = [examples["tag"][row] for row in trainer.prompt_rows(0)] if rank == 1 else []
        trainer.rewards = [Reward("colours", sometimes(bad))]
        trainer.train()
        torch.save(weights(trainer), tmp_path / f"weights-{rank}.pt")

    run_in_two(body, tmp_path)
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(tensor.isfinite().all() for tensor in first.values())
    lines = training_steps(tmp_path / "ppo")
    assert [line["objective/reward_errors"] for line in lines] == [4.0, 0.0]


@pytest.mark.parametrize("on_error", ["stop", "skip", "zero"])
def test_the_report_follows_the_policy_and_has_a_score_for_every_text(examples, on_error, fresh_accelerate):
    texts = [DecodedText(index, "red one", [5]) for index in range(4)]
    rewards = [Reward("colours", sometimes([examples["tag"][2]]))]
    handling = report_handling(PPOConfig((RewardConfig("constant"),), on_reward_error=on_error))
    scoring = Scoring((), rewards, handling, EvalConfig(), 0)
    if on_error == "stop":
        with pytest.raises(RewardError, match="no connection for completion 0"):
            compute_text_rewards(texts, examples, scoring, 2)
        return
    scored = compute_text_rewards(texts, examples, scoring, 2)
    assert [s.score for s in scored] == [0.5, 0.5, 0.0, 0.5] and [s.text for s in scored] == texts
    (failure,) = ScoredSystem(scored).failures
    assert "colours" in failure and "ValueError" in failure
    assert count_failures([failure], handling.on_error).startswith("1 score counted as 0 (ppo.on_reward_error)")
