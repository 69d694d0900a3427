"""The chain: what runs, what is skipped, what is kept, and how it stops. Stages are stand-ins without a model."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline import run
from pipeline.recipe import load_recipe
from pipeline.stages import chain
from pipeline.stages import launch as process_group
from pipeline.stages.control import control_run
from pipeline.stages.directory import STAGES, RunDirectory, set_aside
from pipeline.stages.fingerprint import setting_differences, stage_fingerprint, stage_state, stage_status
from pipeline.stages.launch import default_launch_options, launch, process_count
from pipeline.stages.lock import run_lock
from pipeline.stages.plan import missing_input
from pipeline.stages.stage import begin_stage, finish_stage

OWN = tuple(stage for stage in STAGES if stage != "reward")  # those of a recipe without a reward section
RECIPE = """\
name: demo
model: {from_scratch: {hidden_size: 32, num_attention_heads: 2, vocab_size: 400, max_position_embeddings: 64}}
task: {name: parallel, source: "{split}.en", target: "{split}.de"}
sft: {per_device_train_batch_size: 4, num_train_epochs: 2}
ppo: {rewards: [bleu], response_length: 8, per_device_train_batch_size: 2, total_episodes: 20, num_mini_batches: 2}
eval: {metrics: [bleu]}
"""

FAKE_STAGE = """\
import json, pathlib, sys, time
stage, directory, record, behaviour = sys.argv[1:]
directory = pathlib.Path(directory)
directory.mkdir(parents=True, exist_ok=True)
(directory / "started.json").write_text(record)
with open("launched.txt", "a") as file:
    file.write(stage + "\\n")
if behaviour != "good":
    sys.exit(int(behaviour))
(directory / "report.md").write_text("result")
(directory / "stage.json").write_text(json.dumps({**json.loads(record), "finished_at": time.time_ns()}))
"""


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Each test in a directory of its own with a recipe and its data, as on a machine without accelerators."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    monkeypatch.setattr(process_group, "default_config_file", "none.yaml")
    Path("recipe.yaml").write_text(RECIPE)
    for split in ("train", "validation", "test"):
        for side in ("en", "de"):
            Path(f"{split}.{side}").write_text("".join(f"{side} {number}\n" for number in range(10)))
    return tmp_path


@pytest.fixture
def behaviour(monkeypatch):
    """Stand-ins for the stage scripts; a stage that is given an exit code here stops with it half-way."""
    Path("fake_stage.py").write_text(FAKE_STAGE)
    codes = {}

    def command(stage, path, overrides, options):
        recipe = load_recipe(path, overrides)
        record = stage_state(recipe, stage)
        place = RunDirectory.of(recipe).stage(stage)
        return [sys.executable, "-S", "fake_stage.py", stage, place, json.dumps(record), str(codes.get(stage, "good"))]

    monkeypatch.setattr(process_group, "stage_command", command)
    return codes


def launched():
    """The stages started since the last call."""
    file = Path("launched.txt")
    stages = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return stages


def plan(output):
    """The table of stages as `{stage: (action, reason)}`."""
    rows = [line.split(maxsplit=1) for line in output.splitlines() if line.split(" ")[0] in STAGES]
    actions = ("run", "resume", "skip", "not needed", "not selected")
    return {
        stage: next((a, rest.removeprefix(a).strip()) for a in actions if rest.startswith(a)) for stage, rest in rows
    }


def test_the_chain_runs_in_order_and_then_has_nothing_to_do(behaviour, capsys):
    assert run.main(["recipe.yaml"]) == 0
    output = capsys.readouterr().out
    assert plan(output) == dict.fromkeys(OWN, ("run", "not started yet"))
    assert "sft: 10 examples, batch 4 per device x 1 accumulated x 1 = 4; 2 epochs, 6 optimizer steps\n" in output
    assert (
        "ppo: batch 2 per device x 4 accumulated x 1 = 8 episodes, mini-batch 4, micro-batch 2 per device; "
        "3 steps of 4 PPO epochs, 24 optimizer steps\n"
    ) in output
    assert output.splitlines()[0] == "recipe.yaml -> runs/demo"
    assert output.splitlines()[1].startswith("cpu with ") and output.splitlines()[1].endswith(", 1 process")
    assert output.splitlines()[-1] == "report: runs/demo/eval/report.html"
    assert launched() == ["sft", "ppo", "eval"]

    assert run.main(["recipe.yaml"]) == 0
    output = capsys.readouterr().out
    assert plan(output) == dict.fromkeys(OWN, ("skip", "complete and unchanged"))
    assert output.splitlines()[-1] == "report: runs/demo/eval/report.html"
    assert launched() == []


def test_seeds_run_one_after_the_other_and_are_summed_up(behaviour, capsys, monkeypatch):
    compared = []
    monkeypatch.setattr(chain, "write_comparison", lambda paths, output: compared.append((paths, output)))
    behaviour["ppo"] = 7
    assert run.main(["recipe.yaml", "--seeds", "3,5"]) == 7
    assert launched() == ["sft", "ppo"] and compared == []
    del behaviour["ppo"]
    assert run.main(["recipe.yaml", "seed=9", "--seeds", "3,5"]) == 0
    assert launched() == ["ppo", "eval", "sft", "ppo", "eval"]
    runs = [Path("runs/demo-seed-3"), Path("runs/demo-seed-5")]
    assert compared == [(runs, Path("runs/demo-seeds"))]
    settings = [json.loads((path / "ppo" / "stage.json").read_text())["settings"]["seed"] for path in runs]
    assert settings == [3, 5]  # --seeds replaces the recipe's own and an override
    assert run.main(["recipe.yaml", "--seeds", "3,5", "--dry-run"]) == 0
    assert run.main(["recipe.yaml", "--seeds", "3,5", "--only", "sft"]) == 0
    assert len(compared) == 1 and launched() == []


@pytest.mark.parametrize("seeds", ["1", "1,1", "1,x", "-1,2", ""])
def test_seeds_that_are_none(seeds, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(["recipe.yaml", f"--seeds={seeds}"])
    assert caught.value.code == 2
    assert "two or more different whole numbers such as 0,1,2" in capsys.readouterr().err


def test_a_failure_stops_the_chain_and_the_same_command_continues(behaviour, capsys):
    behaviour["ppo"] = 7
    assert run.main(["recipe.yaml"]) == 7
    assert capsys.readouterr().err == "error: ppo failed with exit code 7; the same command continues there\n"
    assert launched() == ["sft", "ppo"]
    behaviour.clear()
    Path("runs/demo/ppo/checkpoint").touch()
    assert run.main(["recipe.yaml"]) == 0
    assert plan(capsys.readouterr().out) == {
        "sft": ("skip", "complete and unchanged"),
        "ppo": ("resume", "interrupted with the same settings"),
        "eval": ("run", "not started yet"),
    }
    assert launched() == ["ppo", "eval"]
    assert Path("runs/demo/ppo/checkpoint").exists()


def test_a_stage_that_leaves_no_record_has_failed(behaviour, capsys):
    behaviour["sft"] = 0
    assert run.main(["recipe.yaml"]) == 1
    message = "error: sft ended without finishing runs/demo/sft; the same command continues there\n"
    assert capsys.readouterr().err == message
    assert launched() == ["sft"]


def test_changed_stages_run_again_and_what_they_made_is_kept(behaviour, capsys):
    run.main(["recipe.yaml"])
    launched(), capsys.readouterr()
    Path("runs/demo/ppo/report.md").write_text("first")
    for number, (old, new) in enumerate((("0.05", "0.1"), ("0.1", "0.2")), start=1):
        assert run.main(["recipe.yaml", f"ppo.kl_coef={new}"]) == 0
        output = capsys.readouterr().out
        assert f"changed since runs/demo/ppo was made: ppo.kl_coef: {old} -> {new}" in " ".join(output.split())
        assert plan(output)["sft"] == ("skip", "complete and unchanged")
        kept = f"runs/demo/ppo.outdated-{number}"
        assert f"ppo: what was in runs/demo/ppo is kept in {kept}\n" in output
        assert f"eval: what was in runs/demo/eval is kept in runs/demo/eval.outdated-{number}\n" in output
        assert launched() == ["ppo", "eval"]
    assert Path("runs/demo/ppo.outdated-1/report.md").read_text() == "first"


def test_changed_data_runs_everything_again(behaviour, capsys):
    run.main(["recipe.yaml"])
    launched(), capsys.readouterr()
    Path("train.de").write_text("anders\n" * 10)
    assert run.main(["recipe.yaml"]) == 0
    assert "changed since runs/demo/sft was made: train.de: its contents changed" in capsys.readouterr().out
    assert launched() == ["sft", "ppo", "eval"]


def test_a_dry_run_shows_the_plan_and_writes_nothing(behaviour, capsys):
    before = sorted(Path().rglob("*"))
    assert run.main(["recipe.yaml", "--dry-run"]) == 0
    assert plan(capsys.readouterr().out) == dict.fromkeys(OWN, ("run", "not started yet"))
    assert sorted(Path().rglob("*")) == before
    run.main(["recipe.yaml"])
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert run.main(["recipe.yaml", "seed=5", "--force", "--dry-run"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_force_runs_selected_stages_again_and_later_ones_notice(behaviour, capsys):
    run.main(["recipe.yaml"])
    launched(), capsys.readouterr()
    assert run.main(["--force", "recipe.yaml", "--only", "ppo"]) == 0
    output = capsys.readouterr().out
    assert plan(output) == {
        "sft": ("not selected", "--only ppo"),
        "ppo": ("run", "--force"),
        "eval": ("not selected", "--only ppo"),
    }
    assert "report:" not in output
    assert launched() == ["ppo"]
    assert run.main(["recipe.yaml"]) == 0
    reason = "changed since runs/demo/eval was made: ppo: made again"
    assert plan(capsys.readouterr().out)["eval"] == ("run", reason)
    assert launched() == ["eval"]
    assert run.main(["recipe.yaml", "--force", "--from", "sft"]) == 0
    assert launched() == ["sft", "ppo", "eval"]


def test_stages_after_one_that_runs_start_anew(behaviour, capsys):
    """Their adapters stand on its weights, which come out anew."""
    run.main(["recipe.yaml"])
    launched(), capsys.readouterr()
    Path("runs/demo/sft/stage.json").unlink()
    assert run.main(["recipe.yaml"]) == 0
    output = capsys.readouterr().out
    assert plan(output)["sft"] == ("resume", "interrupted with the same settings")
    assert plan(output)["ppo"] == ("run", "changed since runs/demo/ppo was made: sft: not finished")
    assert launched() == ["sft", "ppo", "eval"]
    assert sorted(p.name for p in Path("runs/demo").glob("*.outdated-*")) == ["eval.outdated-1", "ppo.outdated-1"]


def test_a_selected_stage_without_its_input_names_the_command_that_makes_it(behaviour, capsys):
    command = "accelerate launch pipeline/sft.py recipe.yaml seed=1"
    for selection in (["--only", "ppo"], ["--from", "ppo"], ["--only", "eval"]):
        assert run.main(["recipe.yaml", *selection, "seed=1"]) == 2
        message = f"error: {selection[1]}: no finished sft stage in runs/demo/sft; run: {command}\n"
        assert capsys.readouterr().err == message
    assert run.main(["recipe.yaml", "--only", "sft", "seed=1"]) == 0
    assert run.main(["recipe.yaml", "--from", "ppo"]) == 2
    assert capsys.readouterr().err == (
        "error: ppo: the sft stage in runs/demo/sft was made with other settings (seed: 1 -> 0); "
        "run: accelerate launch pipeline/sft.py recipe.yaml\n"
    )
    assert run.main(["recipe.yaml", "--from", "ppo", "seed=1"]) == 0
    assert launched() == ["sft", "ppo", "eval"]


def test_stages_a_recipe_does_not_need(behaviour, capsys):
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    assert run.main(["recipe.yaml", "ppo.sft_model_path=model"]) == 0
    assert plan(capsys.readouterr().out)["sft"] == ("not needed", "ppo.sft_model_path is model")
    assert launched() == ["ppo", "eval"]
    assert run.main(["recipe.yaml", "ppo=null"]) == 0
    assert plan(capsys.readouterr().out)["ppo"] == ("not needed", "the recipe has no ppo section")
    assert launched() == ["sft", "eval"]
    assert run.main(["recipe.yaml", "ppo=null", "--only", "ppo"]) == 2
    assert capsys.readouterr().err == (
        "error: ppo: this recipe does not run that stage: the recipe has no ppo section\n"
    )


def test_a_recipe_that_cannot_run_starts_nothing(behaviour, capsys):
    for arguments, message in (
        (["recipe.yaml", "ppo.kl_coeff=1"], "override 'ppo.kl_coeff=1': ppo.kl_coeff: unknown key"),
        (["recipe.yaml", "eval.metrics=[blue]"], "override 'eval.metrics=[blue]': eval.metrics.0: unknown metric"),
        (["none.yaml"], "none.yaml: no such recipe file"),
        (["recipe.yaml", "--", "--config_file", "none.yaml"], "The passed configuration file `none.yaml` does not"),
        (["recipe.yaml", "--", "--multi_gpu", "--num_processes", "5"], "recipe.yaml:5: ppo.per_device_train_batch"),
    ):
        assert run.main(arguments) == 2
        output = capsys.readouterr()
        assert output.err.startswith(f"error: {message}")
        assert output.out == ""
    for arguments in (["recipe.yaml", "--only", "judge"], ["recipe.yaml", "--", "--no-such-option"]):
        with pytest.raises(SystemExit) as raised:
            run.main(arguments)
        assert raised.value.code == 2
    assert launched() == []


def test_help_shows_how_to_pass_options_on(capsys):
    with pytest.raises(SystemExit) as raised:
        run.main(["--help"])
    assert raised.value.code == 0
    assert "[RECIPE] [section.key=value ...] [options] [-- accelerate launch options]" in capsys.readouterr().out


def test_of_two_machines_one_sets_earlier_results_aside(behaviour, capsys, monkeypatch):
    """`run.py` runs on each of them; a stage begins when both have launched it."""
    words = ["recipe.yaml", "ppo.per_device_train_batch_size=1", "--only", "sft"]
    several = ["--", "--multi_gpu", "--num_processes", "2", "--num_machines", "2", "--machine_rank"]
    assert run.main([*words, *several, "0"]) == 0
    assert launched() == ["sft"]
    monkeypatch.setattr(process_group, "set_aside", lambda place: pytest.fail("the other machine does that"))
    with run_lock(Path("runs/demo")):  # as the machine of rank 0 holds it for a moment
        assert run.main([*words, "--force", *several, "1"]) == 0
        assert run.main([*words, "--force", *several, "0"]) == 2
    assert launched() == ["sft"]
    assert "runs/demo is in use by" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_an_engine_that_shards_the_model_is_for_sft_alone(behaviour, capsys, engine):
    words = ["recipe.yaml", "ppo.per_device_train_batch_size=1"]
    options = ["--", f"--use_{engine}", "--num_processes", "2"]
    assert run.main([*words, *options]) == 2
    found = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}[engine]
    error = capsys.readouterr().err
    assert error.startswith(f"error: ppo: {found} shards the model over the processes, and PPO's policy, reference")
    assert "launch it with accelerate_configs/multi_gpu.yaml" in error and error.count("\n") == 1
    assert launched() == []
    assert run.main([*words, "--only", "sft", *options]) == 0
    assert launched() == ["sft"]


def test_options_after_two_dashes_reach_accelerate(monkeypatch):
    seen = []

    def record(command):
        seen.append(command)
        return 3

    monkeypatch.setattr(process_group, "launch", record)
    assert run.main(["recipe.yaml", "seed=1", "--", "--cpu", "--num_processes", "1"]) == 3
    script = str(Path(run.__file__).parent / "sft.py")
    assert seen[0][:3] == [sys.executable, "-m", "pipeline.stages.first_failure"]
    assert seen[0][3:] == ["--cpu", "--num_processes", "1", script, "recipe.yaml", "seed=1"]


def test_accelerate_starts_a_stage_on_a_cpu_without_noise(monkeypatch, tmp_path):
    """No warning about options that were left to it, all threads, arguments as they are, no traceback of its own."""
    monkeypatch.setattr(process_group, "SCRIPTS", tmp_path)
    Path("sft.py").write_text(
        "import os, sys\nprint(sys.argv[1:], os.environ['ACCELERATE_USE_CPU'], os.environ['OMP_NUM_THREADS'])\n"
        "sys.exit(3)\n"
    )
    command = process_group.stage_command("sft", "recipe.yaml", ["seed=1"], default_launch_options())
    result = subprocess.run(command, capture_output=True, text=True)
    expected = f"['recipe.yaml', 'seed=1'] True {torch.get_num_threads()}\n"
    assert (result.returncode, result.stdout, result.stderr) == (3, expected, "")


def test_launch_options_follow_the_machine(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    common = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    for devices, expected in ((1, ["--num_processes", "1"]), (4, ["--multi_gpu", "--num_processes", "4"])):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda devices=devices: devices)
        assert default_launch_options() == [*expected, *common]
        assert process_count(default_launch_options()) == devices
    monkeypatch.setattr(process_group, "default_config_file", "recipe.yaml")
    assert default_launch_options() == []


def test_the_number_of_processes_is_the_one_accelerate_starts():
    Path("several.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 3\n"
    )
    Path("one.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 3\n")
    for options, count in {
        "": 1,
        "--cpu --num_processes 2": 1,  # one process, as accelerate 1.15 does
        "--num_processes 2": 1,
        "--multi_gpu --num_processes 2": 2,
        "--config_file several.yaml": 3,
        "--config_file several.yaml --num_processes 2": 2,
        "--config_file one.yaml": 1,
    }.items():
        assert process_count(options.split()) == count, options


SLOW_TO_STOP = """\
import pathlib, signal, subprocess, sys, time
if len(sys.argv) == 1:  # the launcher, which goes at once
    subprocess.Popen([sys.executable, "-S", __file__, "stage"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    time.sleep(30)
def save(number, frame):
    time.sleep(0.5)
    pathlib.Path("saved.txt").write_text(signal.Signals(number).name)
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
pathlib.Path("ready.txt").touch()
time.sleep(30)
"""


def signal_when_ready(number):
    """Send this process a signal as soon as the stand-in stage can take it."""

    def send():
        while not Path("ready.txt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_whole_group_and_its_end_is_awaited(number, code, monkeypatch, capsys):
    Path("slow.py").write_text(SLOW_TO_STOP)
    monkeypatch.setattr(
        process_group, "stage_command", lambda *_: [sys.executable, "-S", str(Path("slow.py").resolve())]
    )
    before = signal.getsignal(number)
    signal_when_ready(number)
    assert run.main(["recipe.yaml"]) == code
    assert Path("saved.txt").read_text() == number.name
    message = f"error: sft was ended by {number.name}; the same command continues there\n"
    assert capsys.readouterr().err == message
    assert signal.getsignal(number) == before


def test_a_command_ended_by_a_signal_of_its_own():
    assert launch([sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"]) == 137
    assert launch([sys.executable, "-S", "-c", "raise SystemExit(5)"]) == 5


def recipe_with(*overrides):
    return load_recipe("recipe.yaml", overrides)


def complete(recipe, *stages):
    for stage in stages:
        begin_stage(RunDirectory.of(recipe), recipe, stage)
        finish_stage(RunDirectory.of(recipe), recipe, stage)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("name=other", []),
        ("output_dir=elsewhere", []),
        ("seed=1", ["sft", "ppo", "eval"]),
        ("model.lora_r=4", ["sft", "ppo", "eval"]),
        ("model.from_scratch.hidden_size=64", ["sft", "ppo", "eval"]),
        ("task.max_test_examples=3", ["sft", "ppo", "eval"]),
        ("sft.learning_rate=1", ["sft", "ppo", "eval"]),
        ("sft.use_peft=true", ["sft", "ppo", "eval"]),
        ("ppo.kl_coef=1", ["ppo", "eval"]),
        ("ppo.rewards=[ter]", ["ppo", "eval"]),
        ("ppo.rewards=[{name: bleu, lowercase: true}]", ["ppo", "eval"]),
        ("eval.num_beams=2", ["eval"]),
        ("eval.metrics=[ter]", ["eval"]),
    ],
)
def test_a_fingerprint_covers_what_a_stage_depends_on(override, changed):
    before, after = recipe_with(), recipe_with(override)
    different = [stage for stage in OWN if stage_fingerprint(before, stage) != stage_fingerprint(after, stage)]
    assert different == changed


def test_a_fingerprint_covers_an_external_sft_model():
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    recipe = recipe_with("ppo.sft_model_path=model")
    other_sft = recipe_with("ppo.sft_model_path=model", "sft.learning_rate=1")
    assert stage_fingerprint(recipe, "ppo") == stage_fingerprint(other_sft, "ppo")
    before = stage_fingerprint(recipe, "ppo")
    Path("model/model.safetensors").write_text("weights")
    assert stage_fingerprint(recipe, "ppo") != before
    Path("model/stage.json").write_text('{"fingerprint": "1"}')
    with_record = stage_fingerprint(recipe, "ppo")
    os.utime("model/model.safetensors", (0, 0))  # a copy with other times is the same model where a record says so
    assert stage_fingerprint(recipe, "ppo") == with_record
    Path("model/stage.json").write_text('{"fingerprint": "2"}')
    assert stage_fingerprint(recipe, "ppo") != with_record


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


def test_data_edited_while_a_stage_runs_does_not_pass_for_what_it_read():
    recipe = recipe_with()
    begin_stage(RunDirectory.of(recipe), recipe, "sft")
    Path("train.en").write_text("edited\n" * 10)
    finish_stage(RunDirectory.of(recipe), recipe, "sft")
    assert stage_status(RunDirectory.of(recipe), recipe, "sft") == "changed"
    assert setting_differences(RunDirectory.of(recipe), recipe, "sft") == ["train.en: its contents changed"]


def test_differences_name_each_setting_with_both_values():
    recipe = recipe_with()
    complete(recipe, "sft", "ppo", "eval")
    other = recipe_with("ppo.kl_coef=0.1", "sft.warmup_steps=3", "ppo.rewards=[bleu, {name: ter, weight: -1}]")
    assert setting_differences(RunDirectory.of(recipe), other, "eval") == [
        "sft.warmup_steps: (not set) -> 3.0",
        'ppo.rewards.1.name: (not set) -> "ter"',
        "ppo.rewards.1.weight: (not set) -> -1.0",
        "ppo.kl_coef: 0.05 -> 0.1",
    ]
    assert setting_differences(RunDirectory.of(other), recipe_with("ppo=null"), "eval")[-1] == (
        "ppo.run_name: null -> (not set)"
    )
    assert setting_differences(RunDirectory.of(recipe), recipe, "eval") == []


def control_of(recipe, name: str, reward: str = "constant", **changes) -> Path:
    """A finished ppo stage that pays `reward` from this recipe's SFT model."""
    sft = RunDirectory.of(recipe).sft
    other = load_recipe(
        "recipe.yaml", [f"name={name}", f"ppo.sft_model_path={sft}", f"ppo.rewards=[{{name: {reward}}}]"]
    )
    complete(other, "ppo")
    return RunDirectory.of(other).path


def test_a_constant_reward_run_from_the_same_sft_model_is_the_control():
    recipe = recipe_with()
    complete(recipe, "sft", "ppo", "eval")
    assert control_run(recipe) is None
    control_of(recipe, "paid", "ter")
    assert control_run(recipe) is None
    before = stage_fingerprint(recipe, "eval")
    assert stage_status(RunDirectory.of(recipe), recipe, "eval") == "complete"
    path = control_of(recipe, "control")
    assert control_run(recipe) == path == Path("runs/control")
    assert stage_fingerprint(recipe, "eval") != before  # the report is to be made again, with the control
    assert setting_differences(RunDirectory.of(recipe), recipe, "eval") == ["control: not there before"]
    assert control_run(recipe_with("eval.control=null")) is None
    assert control_run(recipe_with("eval.systems=[base, sft]")) is None
    complete(recipe, "sft")  # other weights: what started from the old ones is no control of them
    (RunDirectory.of(recipe).sft / "stage.json").write_text('{"stage": "sft"}')
    assert control_run(recipe) is None


def test_a_control_that_is_named_has_to_be_one():
    recipe = recipe_with()
    complete(recipe, "sft", "ppo")

    def problem(name: str) -> str | None:
        return missing_input(recipe_with(f"eval.control=runs/{name}"), "eval")

    assert problem("none").startswith("eval: eval.control: 'runs/none' is no run directory with a finished ppo stage")
    control_of(recipe_with("name=elsewhere"), "control")
    assert "'runs/control' did not start from the SFT model 'runs/demo/sft' as it is now" in problem("control")
    path = control_of(recipe, "paid", "ter")  # one that is named may pay what it likes
    assert problem("paid") is None
    assert control_run(recipe_with("eval.control=runs/paid")) == path
    assert missing_input(recipe_with("eval.control=runs/none", "eval.systems=[sft]"), "eval") is None


def test_a_record_that_is_not_whole_counts_as_changed():
    recipe = recipe_with()
    complete(recipe, "sft")
    Path("runs/demo/sft/stage.json").write_text('{"stage": "sf')
    assert stage_status(RunDirectory.of(recipe), recipe, "sft") == "changed"
    assert setting_differences(RunDirectory.of(recipe), recipe, "sft") == ["its record cannot be read"]


def test_missing_input():
    recipe = recipe_with("seed=2")
    command = "accelerate launch pipeline/{}.py recipe.yaml seed=2"
    assert missing_input(recipe, "sft") is None
    expected = f"ppo: no finished sft stage in runs/demo/sft; run: {command.format('sft')}"
    assert missing_input(recipe, "ppo") == expected
    begin_stage(RunDirectory.of(recipe), recipe, "sft")
    assert missing_input(recipe, "ppo") == expected
    finish_stage(RunDirectory.of(recipe), recipe, "sft")
    assert missing_input(recipe, "ppo") is None
    assert missing_input(recipe, "eval") == (
        f"eval: no finished ppo stage in runs/demo/ppo; run: {command.format('ppo')}"
    )
    assert missing_input(recipe_with("seed=2", "eval.systems=[base, sft]"), "eval") is None
    assert missing_input(recipe_with("ppo.sft_model_path=model"), "ppo") is None
