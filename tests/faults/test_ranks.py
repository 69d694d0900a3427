"""Several processes of which one raises, is killed, or hangs: all end, and the first one and its cause are named."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forks
import psutil
import pytest
from tiny_run import tiny_recipe
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pipeline import ppo as ppo_stage
from pipeline import sft as sft_stage
from pipeline.runtime import watchdog
from pipeline.runtime.watchdog import VARIABLE, enter, watched
from pipeline.stages.first_failure import cause, first_failure
from pipeline.trainers.checkpoints import newest_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
PPO = {
    "rewards": [{"name": "failing.reward"}],
    "total_episodes": 24,
    "gradient_accumulation_steps": 1,
    "save_steps": 1,
    "eval_steps": 10,
}
# The second process fails in the rewards of step 3: before them come a trial and two steps. The held-out prompts are
# one block, which is the first process's.
REWARD = """
import os, signal, time
calls = 0
def reward(prompts, completions, **columns):
    global calls
    calls += 1
    if calls >= 4 and os.environ["RANK"] == "1":
        {act}
    return [len(completion) / 8 for completion in completions]
"""
ACTS = {
    "raises": "raise ValueError('no connection')",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "time.sleep(600)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
}
ALONE = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH = ["--multi_gpu", "--num_processes", "2", *ALONE]


@pytest.fixture
def recipe(tmp_path, monkeypatch, fresh_accelerate) -> Path:
    """A recipe whose SFT stage is done."""
    path = tiny_recipe(tmp_path, ppo=PPO)
    (tmp_path / "failing.py").write_text(REWARD.format(act="pass"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "failing", raising=False)
    assert sft_stage.main([str(path)]) == 0
    return path


def run_with(recipe: Path, act: str, command: list[str], minutes: str | None = None) -> tuple[int, str, float]:
    """Run PPO in two processes of which one does `act`: exit code, stderr, and seconds since that moment."""
    mark = recipe.parent / "mark"
    (recipe.parent / "failing.py").write_text(REWARD.format(act=f"open({str(mark)!r}, 'w').close(); {ACTS[act]}"))
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{recipe.parent}",
        **({VARIABLE: minutes} if minutes else {}),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=recipe.parent)
    passed = time.time() - mark.stat().st_mtime
    left = [p for p in psutil.process_iter(["cmdline"]) if str(recipe) in (p.info["cmdline"] or [])]
    assert not left, "processes are left behind"
    return done.returncode, done.stderr, passed


def by_run(recipe: Path) -> list[str]:
    return [sys.executable, str(ROOT / "pipeline" / "run.py"), str(recipe), "--only", "ppo", "--", *LAUNCH]


def by_accelerate(recipe: Path) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH]
    return [*launch, str(ROOT / "pipeline" / "ppo.py"), str(recipe)]


def last_checkpoint(recipe: Path) -> str:
    found, notes = newest_checkpoint(recipe.parent / "runs" / "tiny" / "ppo" / "checkpoints")
    assert notes == []
    return found.name


def test_run_ends_with_the_process_that_was_killed(recipe):
    """The other one loses its connection in the same moment, and is not blamed."""
    code, said, passed = run_with(recipe, "killed", by_run(recipe))
    assert code == 137 and passed < 60, said
    last = said.splitlines()[-1]
    assert last.startswith("error: ppo was ended by SIGKILL; ") and ": process 1 was ended by SIGKILL" in last
    assert last_checkpoint(recipe) == "checkpoint-2"
    assert not list((recipe.parent / "runs" / "tiny" / "ppo").glob("stage.json"))


def test_accelerate_launch_ends_with_the_process_that_raised_and_its_cause(recipe):
    code, said, passed = run_with(recipe, "raises", by_accelerate(recipe))
    assert code != 0 and passed < 60
    last = said[said.rindex("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in last, said
    assert "ValueError: no connection for completion 0" in last
    assert "error: process 1 of 2: ppo: reward 'failing.reward' raised" in said
    assert last_checkpoint(recipe) == "checkpoint-2"


def two_ranks(recipe: Path, act: str) -> dict[int, ProcessFailure]:
    """Run PPO in two forked processes as an agent does: what the ones left of which the first ended."""
    (recipe.parent / "failing.py").write_text(REWARD.format(act=ACTS[act]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def rank(number: int):
        def body() -> int:
            own = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
            os.environ |= own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ["TORCHELASTIC_ERROR_FILE"] = str(recipe.parent / f"error-{number}")
            return ppo_stage.main([str(recipe)])

        return forks.start(body)

    sys.modules.pop("failing", None)
    children = {rank(number): number for number in (0, 1)}
    failures = {}
    while children:
        child, status = os.wait()
        number, code = children.pop(child), os.waitstatus_to_exitcode(status)
        failures[number] = ProcessFailure(number, child, code, str(recipe.parent / f"error-{number}"))
        for other in children:  # the agent asks first, and waits for half a minute
            os.kill(other, signal.SIGTERM)
        if act in ("hangs", "stopped"):
            time.sleep(1)  # it counts in seconds
            for other in children:
                os.kill(other, signal.SIGKILL)
    return failures


WORDS = {
    "raises": ("process 1 failed: ppo: reward 'failing.reward'", "ValueError: no connection"),
    "hangs": ("process 1 of 2 ", VARIABLE, "in the rewards of PPO step 3"),
    "stopped": ("process 1 of 2 ", "in the rewards of PPO step 3", "process 0 waits"),
    "killed": ("process 1 was ended by SIGKILL",),
}


@pytest.mark.parametrize("act", ACTS)
def test_the_first_process_that_fails_is_named(recipe, monkeypatch, capfd, act):
    if act in ("hangs", "stopped"):
        monkeypatch.setenv(VARIABLE, "0.25")
    failures = two_ranks(recipe, act)
    assert all(failure.exitcode for failure in failures.values())
    message = cause(*first_failure(failures))
    assert message.startswith(WORDS[act][0]), (message, capfd.readouterr().err)
    assert all(words in message for words in WORDS[act])
    assert last_checkpoint(recipe) == "checkpoint-2"


def test_a_process_alone_is_watched_where_that_is_asked_for(monkeypatch, tmp_path, fresh_accelerate, capfd):
    def stuck():
        with watched(tmp_path):
            enter("a long sleep")
            time.sleep(60)

    monkeypatch.setenv(VARIABLE, "0.01")
    assert forks.run(stuck) == 1
    said = capfd.readouterr().err
    assert "process 0 of 1 " in said and f"for 0.01 minutes ({VARIABLE})" in said and "in a long sleep" in said

    def busy():
        with watched(tmp_path):
            for _ in range(20):
                enter("short ones")
                time.sleep(0.1)

    assert forks.run(busy) == 0
    assert not list(tmp_path.iterdir())


def test_each_block_of_an_evaluation_is_progress(make_trainer, examples, monkeypatch):
    """An evaluation may take longer than a phase may; it stays one phase, whatever the blocks of a process."""
    trainer = make_trainer(validation=examples.select(range(6)), local_rollout_forward_batch_size=2)
    entered, enter = [], watchdog._progress.enter
    monkeypatch.setattr(watchdog._progress, "enter", lambda phase: (entered.append(phase), enter(phase)))
    trainer.evaluate()
    assert entered == ["the evaluation after PPO step 0"] * 4


def test_the_process_that_is_furthest_behind_is_named(tmp_path, monkeypatch):
    """Not the one that has waited longest: another may have come late to where it hangs."""
    monkeypatch.setattr(watchdog._progress, "phase", "the update")
    monkeypatch.setattr(watchdog._progress, "count", 9)
    monkeypatch.setattr(watchdog._progress, "since", time.monotonic() - 100)
    (tmp_path / ".phase-1").write_text("8 the rewards")  # since now
    message = watchdog._sentence(60, tmp_path, 0, 3)
    assert message.startswith("process 1 of 3 ") and "in the rewards, and process 0 waits" in message
    (tmp_path / ".phase-1").write_text("9 the update")
    assert watchdog._sentence(60, tmp_path, 0, 3).startswith("process 0 of 3 ")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan", ""])
def test_a_timeout_that_is_none_is_refused(recipe, monkeypatch, capsys, text):
    monkeypatch.setenv(VARIABLE, text)
    assert ppo_stage.main([str(recipe)]) == 2
    assert f"error: ppo: {VARIABLE}: expected a number of minutes above 0, found {text!r}" in capsys.readouterr().err


def failure(code: int, **record) -> ProcessFailure:
    """What the agent knows of a process that ended."""
    known = ProcessFailure(0, 1, code, "none")
    if record:
        known.error_file_data = {"message": {"extraInfo": {"py_callstack": "ppo: words", "seconds": 0.0, **record}}}
    return known


def test_the_order_of_failures():
    lost = failure(1, consequence=True, seconds=1.0)
    assert first_failure({0: lost, 1: failure(-9)})[0] == 1
    assert first_failure({0: lost, 1: failure(1, seconds=2.0)})[0] == 1
    assert first_failure({0: failure(1, seconds=2.0), 1: failure(1, seconds=1.0)})[0] == 1
    assert first_failure({0: failure(-15), 1: failure(143), 2: failure(-11)})[0] == 2
    assert first_failure({0: lost})[0] == 0
    assert cause(3, failure(1)) == "process 3 failed with exit code 1"
    assert cause(3, failure(-11)) == "process 3 was ended by SIGSEGV"
    assert cause(3, failure(1, seconds=1.0)) == "process 3 failed: ppo: words"
