"""One stage from begin to end: its records, and how it ends."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from demo_run import complete, recipe_with
from safetensors import SafetensorError
from torch.distributed import DistBackendError
from two_processes import run_in_two

from pipeline.recipe import load_recipe
from pipeline.runtime.distributed import on_main
from pipeline.runtime.signals import Stopped
from pipeline.stages import stage as stage_module
from pipeline.stages.directory import RunDirectory, set_aside
from pipeline.stages.fingerprint import stage_fingerprint, stage_status
from pipeline.stages.plan import missing_input
from pipeline.stages.stage import CannotStartError, begin_stage, end_with, finish_stage, outcome_of, run_stage


def test_a_stage_from_begin_to_end():
    recipe, other = recipe_with("ppo.max_grad_norm=.inf"), recipe_with("sft.learning_rate=1")
    run_directory = RunDirectory.of(recipe)
    complete(recipe, "sft")
    assert stage_status(run_directory, recipe, "ppo") == "absent"
    assert begin_stage(run_directory, recipe, "ppo") is None
    assert stage_status(run_directory, recipe, "ppo") == "partial"
    assert stage_status(run_directory, other, "ppo") == "changed"
    assert load_recipe(run_directory.path / "recipe.yaml") == recipe
    finish_stage(run_directory, recipe, "ppo", reward=0.5, fingerprint="cannot be replaced")
    assert stage_status(run_directory, recipe, "ppo") == "complete"
    assert stage_status(run_directory, other, "ppo") == "changed"
    assert sorted(p.name for p in run_directory.ppo.iterdir()) == ["stage.json", "started.json"]

    record = json.loads((run_directory.ppo / "stage.json").read_text(), parse_constant=pytest.fail)
    assert record["stage"] == "ppo"
    assert record["fingerprint"] == stage_fingerprint(recipe, "ppo")
    assert record["reward"] == 0.5
    assert 0 <= record["seconds"] < 60
    assert record["versions"]["torch"] == torch.__version__
    assert record["settings"]["ppo.rewards.0.name"] == "bleu"
    assert record["settings"]["ppo.max_grad_norm"] == "inf"
    assert "name" not in record["settings"]
    assert record["finished_at"].endswith("+00:00")


def test_the_seconds_before_an_interruption_count():
    recipe = recipe_with()
    run_directory = RunDirectory.of(recipe)
    begin_stage(run_directory, recipe, "sft")
    file, log = run_directory.sft / "started.json", run_directory.sft / "metrics.jsonl"
    for worked in (100, 40):  # interrupted twice, each time an hour before it goes on
        record = json.loads(file.read_text())
        record["started_at"] -= 3600 + worked
        file.write_text(json.dumps(record))
        log.touch()
        for path in (file, log):
            os.utime(path, (0, record["started_at"] + worked))
        begin_stage(run_directory, recipe, "sft")
    finish_stage(run_directory, recipe, "sft")
    assert 140 <= json.loads((run_directory.sft / "stage.json").read_text())["seconds"] < 200


def test_beginning_again_keeps_what_can_be_resumed_and_sets_the_rest_aside():
    recipe, other = recipe_with(), recipe_with("seed=1")
    run_directory = RunDirectory.of(recipe)
    begin_stage(run_directory, recipe, "sft")
    (run_directory.sft / "checkpoint").touch()
    assert begin_stage(run_directory, recipe, "sft") is None
    assert (run_directory.sft / "checkpoint").exists()
    assert begin_stage(run_directory, other, "sft") == Path("runs/demo/sft.outdated-1")
    assert Path("runs/demo/sft.outdated-1/checkpoint").exists()
    assert sorted(p.name for p in run_directory.sft.iterdir()) == ["started.json"]
    finish_stage(run_directory, other, "sft")
    assert begin_stage(run_directory, other, "sft") == Path("runs/demo/sft.outdated-2")
    assert stage_status(run_directory, other, "sft") == "partial"
    assert set_aside(run_directory.sft) == Path("runs/demo/sft.outdated-3")


def test_missing_input_names_the_stage_and_the_command_that_makes_it():
    recipe, run = recipe_with("seed=2"), RunDirectory.of(recipe_with())
    command = "run: relay run recipe.yaml seed=2 --only {}"
    assert missing_input(recipe, "sft") is None
    for _ in ("absent", "partial"):
        problem = missing_input(recipe, "ppo")
        assert problem.startswith("ppo: no finished sft stage in runs/demo/sft; ")
        assert problem.endswith(command.format("sft"))
        begin_stage(run, recipe, "sft")
    finish_stage(run, recipe, "sft")
    assert missing_input(recipe, "ppo") is None
    assert missing_input(recipe, "eval").endswith(command.format("ppo"))
    assert missing_input(recipe_with("seed=2", "eval.systems=[base, sft]"), "eval") is None
    assert missing_input(recipe_with("ppo.sft_model_path=model"), "ppo") is None


@pytest.fixture
def run_empty(fresh_accelerate):
    """Run a stage whose body makes nothing, or raises an error; return the exit code."""

    def run(stage: str, error: BaseException | None = None, *overrides: str) -> int:
        def body(recipe, directory) -> dict[str, object]:
            if error is not None:
                raise error
            return {}

        return run_stage(recipe_with(*overrides), stage, body)

    return run


def test_a_stage_decides_whether_it_begins(run_empty, capsys):
    assert run_empty("ppo") == 2 and "no finished sft stage" in capsys.readouterr().err
    assert run_empty("sft") == 0
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it plans every new length on the host
    assert json.loads(Path("runs/demo/sft/stage.json").read_text())["peak_memory_mib"] > 0
    assert run_empty("sft", AssertionError("it is complete")) == 0 and "already complete" in capsys.readouterr().err
    assert run_empty("sft", None, "seed=3") == 0
    said = capsys.readouterr().err
    assert "seed: 0 -> 3" in said and "sft.outdated-1" in said


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CannotStartError("no room"), 2, "error: sft: no room"),
        (ValueError("no such column"), 1, "error: sft: no such column"),
        (FloatingPointError("nan"), 1, "error: sft: nan"),
        (KeyboardInterrupt(), 130, "ended by Ctrl-C"),
        (Stopped(signal.SIGTERM, 3), 143, "checkpoint of step 3"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "lower sft.per_device_train_batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "starts again from its first step"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "error: sft: I/O error: No space"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_error_has_an_exit_code_and_a_message(run_empty, capsys, error, code, words):
    assert run_empty("sft", error) == code
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert stage_status(RunDirectory.of(recipe_with()), recipe_with(), "sft") == "partial"


def test_the_evaluation_is_told_of_a_key_that_there_is():
    end = outcome_of("eval", torch.OutOfMemoryError("CUDA out of memory."))
    assert "model.dtype: bfloat16" in end.message and "eval." not in end.message


def test_an_error_of_relay_itself_keeps_its_traceback(run_empty):
    with pytest.raises(ZeroDivisionError):
        run_empty("sft", ZeroDivisionError("1 / 0"))


class TwoProcesses:
    """What is_lost_connection asks."""

    num_processes = 2


def test_an_error_that_another_process_caused_is_a_consequence(monkeypatch):
    lost = [DistBackendError("unhandled system error"), RuntimeError("[gloo] Connection closed by peer [10.0.0.2]")]
    other = RuntimeError("the option NCCL_DEBUG is set")  # its words alone say nothing
    assert [outcome_of("ppo", error) for error in lost] == [None, None]  # a single process has nobody to lose
    monkeypatch.setattr(stage_module, "PartialState", TwoProcesses)
    assert all(outcome_of("ppo", error).consequence for error in lost)
    slow = outcome_of("eval", RuntimeError("[gloo] Timed out waiting 1830000ms for recv operation to complete"))
    assert "RELAY_TIMEOUT_MINUTES" in slow.message and "RELAY_TIMEOUT" not in outcome_of("ppo", lost[1]).message
    assert outcome_of("ppo", other) is None


def test_what_fails_on_the_main_process_is_said_by_it_alone(tmp_path, capfd):
    """The launcher names it, whichever process has ended first."""

    def fail() -> None:
        raise OSError(28, "No space left on device", "report.json")

    def end() -> None:
        rank = PartialState(cpu=True).process_index
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / f"record-{rank}")
        with pytest.raises((OSError, ValueError)) as raised:
            on_main(fail)
        assert end_with("eval", outcome_of("eval", raised.value)) == 1

    run_in_two(end, tmp_path)
    assert capfd.readouterr().err.count("No space left") == 1
    records = [json.loads((tmp_path / f"record-{rank}").read_text())["message"]["extraInfo"] for rank in (0, 1)]
    assert [record["consequence"] for record in records] == [False, True]
