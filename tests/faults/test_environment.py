"""A machine that lacks something: the Hub, a place to write, a tracker, a version of a library."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator, tracking
from packaging.requirements import Requirement
from tiny_run import MAINS, PARALLEL, only_error, outcome, write_parallel, write_recipe

from pipeline.metrics import load_metric
from pipeline.models.hub import ModelNotFoundError, check_model_path
from pipeline.runtime import hub
from pipeline.runtime import versions as supported
from pipeline.tasks import TaskError
from pipeline.tasks.tables import check_hub
from pipeline.trainers import trackers

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def recipe(tmp_path) -> str:
    """A recipe over four sentence pairs."""
    write_parallel(tmp_path)
    return write_recipe(tmp_path, PARALLEL)


# 35: the Hub


@pytest.mark.parametrize(
    ("override", "key", "local"),
    [
        ("model={model_name_or_path: nobody/no-model}", "model.model_name_or_path", "the path of a model directory"),
        ("ppo.sft_model_path=nobody/no-model", "ppo.sft_model_path", "the path of a model directory"),
        ("eval.systems=[sft, {name: other, path: nobody/no-model}]", "eval.systems", "the path of a model directory"),
        ("reward={model: nobody/no-model}", "reward.model", "the path of a model directory"),
        (
            "task={name: columns, path: nobody/no-data, prompt: a, completion: b}",
            "task.path",
            "a local file such as data/{split}.jsonl",
        ),
    ],
)
def test_a_hub_id_offline_is_refused_by_key_with_the_local_form(recipe, capfd, monkeypatch, override, key, local):
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    for program in ("run.py", "sft.py"):
        assert outcome(MAINS[program], recipe, override) == 2
        said = only_error(capfd.readouterr().err)
        assert f" {key}: 'nobody/no-" in said and f"give {local}" in said
    assert asked == []  # nothing waits for a network that is not there


def test_a_hub_that_never_answers_is_given_up_in_under_five_seconds(monkeypatch):
    class Silent:
        def __getattr__(self, name):
            return lambda *arguments, **options: time.sleep(60)

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", Silent)
    assert hub.PROBE_SECONDS < 5
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.1)
    with pytest.raises(ModelNotFoundError, match=r"^model\.model_name_or_path: .*\(no answer\); give the path of"):
        check_model_path("nobody/no-model", "model.model_name_or_path")
    with pytest.raises(TaskError, match=r"^task\.path: 'nobody/no-data' .*\(no answer\); give a local file"):
        check_hub("nobody/no-data", None, None)
    with pytest.raises(ValueError, match=r"'evaluate:nobody/metric' .*no answer"):
        load_metric("evaluate:nobody/metric", trust_remote_code=True)


# 35: the output directory


def test_a_read_only_output_directory_is_refused_before_training(recipe, capfd, tmp_path):
    """/proc takes no file, not even from root."""
    for program in ("run.py", "sft.py"):
        assert outcome(MAINS[program], recipe, "output_dir=/proc/self") == 2
        said = only_error(capfd.readouterr().err)
        assert "output_dir: cannot write to '/proc/self' (" in said and said.endswith("; choose another directory")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_stage_directory_without_permission_is_refused_before_training(recipe, capfd, tmp_path):
    place = tmp_path / "runs" / "tiny" / "sft"
    place.mkdir(parents=True)
    place.chmod(0o500)
    assert outcome(MAINS["run.py"], recipe) == 2
    assert f"output_dir: cannot write to {str(place)!r} (Permission denied)" in only_error(capfd.readouterr().err)


# 35: trackers


def test_a_tracker_that_is_not_installed_is_warned_of_and_the_run_goes_on(recipe, capfd, tmp_path):
    missing = next(
        name for name in ("swanlab", "clearml", "comet_ml") if name not in tracking.get_available_trackers()
    )
    overrides = [f"{section}.report_to=[{missing}, tensorboard]" for section in ("sft", "ppo")]
    for program in ("sft.py", "ppo.py"):
        assert outcome(MAINS[program], recipe, *overrides) == 0
        said = capfd.readouterr().err
        assert said.count(f"warning: report_to: {missing} is not installed") == 1 and "Traceback" not in said
    run = tmp_path / "runs" / "tiny"
    assert list((run / "ppo").rglob("events.out.tfevents*"))  # the other tracker got everything
    settings = json.loads((run / "ppo" / "stage.json").read_text())["settings"]
    assert settings["ppo.report_to"] == [missing, "tensorboard"]  # installing it later changes no result


def test_a_tracker_that_cannot_start_is_warned_of_and_the_run_goes_on(monkeypatch, capfd):
    def no_login(self, *arguments, **options):
        raise ConnectionError("no login\nfor this server")

    accelerator = Accelerator(log_with=[])
    monkeypatch.setattr(Accelerator, "init_trackers", no_login)
    trackers.start_trackers(accelerator, "project")
    assert accelerator.trackers == []
    said = capfd.readouterr().err
    assert said.startswith("warning: report_to: ") and "(ConnectionError: no login for this server)" in said
    assert said.count("\n") == 1


def test_a_tracker_that_fails_in_the_middle_is_left_out_and_the_others_get_everything(
    recipe, capfd, tmp_path, monkeypatch
):
    class Offline(tracking.TensorBoardTracker):
        name = "offline"

        def __init__(self, run_name, **options):
            self.said = []

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **options):
            self.said.append(step)
            if len(self.said) == 2:
                raise ConnectionError("no route to https://me:secret@tracker.example\ntry again")
            assert len(self.said) < 3

        def finish(self):
            raise AssertionError("it is gone by then")

    start = trackers.start_trackers

    def one_more(accelerator, project):
        start(accelerator, project)
        accelerator.trackers.insert(0, Offline("run"))

    monkeypatch.setattr("pipeline.trainers.logs.start_trackers", one_more)
    assert outcome(MAINS["sft.py"], recipe) == 0
    assert outcome(MAINS["ppo.py"], recipe, "ppo.report_to=[tensorboard]", "ppo.total_episodes=16") == 0
    said = capfd.readouterr().err
    assert said.count("warning: report_to: offline failed at step ") == 1
    assert "no route to https://***@tracker.example try again" in said
    run = tmp_path / "runs" / "tiny" / "ppo"
    steps = {json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert len(steps) > 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = run.rglob("events.out.tfevents*")
    found = EventAccumulator(str(events)).Reload()
    assert {event.step for event in found.Scalars("objective/scores")} == steps - {0}


@pytest.mark.parametrize("section", ["sft", "ppo"])
def test_a_tracker_that_does_not_exist_is_refused(recipe, capfd, section):
    assert outcome(MAINS["run.py"], recipe, f"{section}.report_to=[tensorbord]") == 2
    assert f"{section}.report_to: must be of " in (said := only_error(capfd.readouterr().err))
    assert "found 'tensorbord'; did you mean 'tensorboard'?" in said


# 36: versions


def fake_distribution(folder: Path, name: str, version: str) -> None:
    """A package of this version as far as importlib.metadata can see."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize("script", ["run", "ppo"])
def test_a_version_that_does_not_fit_is_named_with_those_that_do(tmp_path, script):
    """In a process of its own: before anything of an old library is imported."""
    fake_distribution(tmp_path, "trl", "1.12.0")
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("raise ImportError('cannot import name SFTConfig')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(ROOT / "pipeline" / f"{script}.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    [needed] = [line for line in map(Requirement, supported.requires("trl-relay")) if line.name == "trl"]
    assert (result.returncode, result.stdout) == (2, "")
    problem, _, advice = result.stderr.partition("; ")
    assert problem == f"error: trl 1.12.0 is installed, Relay needs trl{needed.specifier}"
    assert shlex.split(advice) == ["pip", "install", f"trl{needed.specifier}"]
    assert result.stderr.count("\n") == 1


def test_every_range_of_the_project_is_looked_at(tmp_path, monkeypatch):
    assert supported.unsupported() == []
    for name in ("torch", "peft", "sacrebleu"):
        fake_distribution(tmp_path, name, "0.0.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = supported.unsupported()
    assert len(found) == 3 and found[0].startswith("torch 0.0.1 is installed, Relay needs torch>=")
    for text in ("pytest", "mecab"):  # those of extras are no need
        assert not any(text in line for line in found)
