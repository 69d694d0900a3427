"""The chain: what runs, what is skipped, what is kept, and how it stops. Stages are stand-ins without a model."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from demo_run import OWN, write_demo

import pipeline
from pipeline import run
from pipeline.recipe import load_recipe
from pipeline.stages import chain
from pipeline.stages import launch as process_group
from pipeline.stages.directory import STAGES, RunDirectory
from pipeline.stages.fingerprint import stage_state
from pipeline.stages.launch import default_launch_options, launch, process_count
from pipeline.stages.lock import run_lock

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
    write_demo()
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
    assert "x 1 = 8 episodes, mini-batch 4, micro-batch 2" in output
    assert "3 steps of 1 PPO epoch, 6 optimizer steps\n" in output
    assert output.splitlines()[0] == "recipe.yaml -> runs/demo"
    assert output.splitlines()[1].startswith("cpu with ") and output.splitlines()[1].endswith(", 1 process")
    assert output.splitlines()[-1] == "report: runs/demo/eval/report.html"
    assert launched() == ["sft", "ppo", "eval"]

    assert run.main(["recipe.yaml"]) == 0
    output = capsys.readouterr().out
    assert plan(output) == dict.fromkeys(OWN, ("skip", "complete and unchanged"))
    assert output.splitlines()[-1] == "report: runs/demo/eval/report.html"
    assert launched() == []


def test_the_report_of_a_run_that_is_not_kept_is_not_named(behaviour, capsys):
    assert chain.run_chain(Path("recipe.yaml"), [], chain.Selection(), [], is_kept=False) == 0
    output = capsys.readouterr().out
    assert plan(output) == dict.fromkeys(OWN, ("run", "not started yet")) and "report.html" not in output


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


@pytest.mark.parametrize("seeds", ["1", "1,1", "0,00", "1,x", "-1,2", ""])
def test_seeds_that_are_none(seeds, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(["recipe.yaml", f"--seeds={seeds}"])
    assert caught.value.code == 2
    assert "two or more different whole numbers such as 0,1,2" in capsys.readouterr().err


def test_a_failure_stops_the_chain_and_the_same_command_continues(behaviour, capsys):
    behaviour["ppo"] = 7
    assert run.main(["recipe.yaml"]) == 7
    assert capsys.readouterr().err.startswith("error: ppo failed with exit code 7")
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
    assert capsys.readouterr().err.startswith("error: sft ended without finishing runs/demo/sft")
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
        assert f"runs/demo/eval.outdated-{number}\n" in output
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
    command = "relay run recipe.yaml seed=1 --only sft"
    for selection in (["--only", "ppo"], ["--from", "ppo"], ["--only", "eval"]):
        assert run.main(["recipe.yaml", *selection, "seed=1"]) == 2
        message = f"error: {selection[1]}: no finished sft stage in runs/demo/sft; run: {command}\n"
        assert capsys.readouterr().err == message
    assert run.main(["recipe.yaml", "--only", "sft", "seed=1"]) == 0
    assert run.main(["recipe.yaml", "--from", "ppo"]) == 2
    said = capsys.readouterr().err
    assert "other settings (seed: 1 -> 0)" in said and said.endswith(" relay run recipe.yaml --only sft\n")
    assert run.main(["recipe.yaml", "--from", "ppo", "seed=1"]) == 0
    assert launched() == ["sft", "ppo", "eval"]


def test_stages_a_recipe_does_not_need(behaviour, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.recipe.checks.check_models", lambda recipe: None)  # there are no weights here
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    assert run.main(["recipe.yaml", "ppo.sft_model_path=model"]) == 0
    assert plan(capsys.readouterr().out)["sft"] == ("not needed", "ppo.sft_model_path is model")
    assert launched() == ["ppo", "eval"]
    assert run.main(["recipe.yaml", "ppo=null"]) == 0
    assert plan(capsys.readouterr().out)["ppo"] == ("not needed", "the recipe has no ppo section")
    assert launched() == ["sft", "eval"]
    assert run.main(["recipe.yaml", "ppo=null", "--only", "ppo"]) == 2
    assert capsys.readouterr().err.endswith("the recipe has no ppo section\n")


def test_a_recipe_that_cannot_run_starts_nothing(behaviour, capsys):
    for arguments, message in (
        (["recipe.yaml", "ppo.kl_coeff=1"], "override 'ppo.kl_coeff=1': ppo.kl_coeff: unknown key"),
        (["recipe.yaml", "eval.metrics=[blue]"], "override 'eval.metrics=[blue]': eval.metrics.0: unknown metric"),
        (["none.yaml"], "none.yaml: no such recipe file"),
        (["recipe.yaml", "--", "ppo.kl_coef=0.02"], "after -- come options of accelerate launch alone, found 'ppo.kl"),
        (["recipe.yaml", "--", "--config_file", "train.en"], "train.en: no configuration of accelerate launch"),
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
    assert "[-- accelerate launch options]" in capsys.readouterr().out


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
    found = {"fsdp": "FSDP1", "deepspeed": "DeepSpeed"}[engine]  # the version that accelerate takes by itself
    error = capsys.readouterr().err
    assert error.startswith(f"error: ppo: {found} shards the model")
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


@pytest.mark.parametrize(
    ("variables", "seen"),
    [({}, "1000 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE"), ({"GOMP_SPINCOUNT": "7"}, "7 None")],
    ids=["none", "policy", "count"],
)
def test_idle_threads_of_a_stage_make_room_for_other_jobs(monkeypatch, tmp_path, variables, seen):
    """Unless the user says how they wait."""
    monkeypatch.setattr(process_group, "SCRIPTS", tmp_path)
    Path("sft.py").write_text(
        "import os\nprint(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))\n"
    )
    command = process_group.stage_command("sft", "recipe.yaml", [], default_launch_options())
    inherited = {name: value for name, value in os.environ.items() if name not in pipeline.WAITING_VARIABLES}
    result = subprocess.run(command, capture_output=True, text=True, env=inherited | variables)
    assert (result.returncode, result.stdout) == (0, f"{seen}\n")


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
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    common = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    for devices, expected in ((1, ["--num_processes", "1"]), (4, ["--multi_gpu", "--num_processes", "4"])):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda devices=devices: devices)
        assert default_launch_options() == [*expected, *common]
        assert process_count(default_launch_options()) == devices
    monkeypatch.setattr(process_group, "default_config_file", "recipe.yaml")
    assert default_launch_options() == []


def test_processes_with_accelerators_share_the_cores(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS")
    two_machines = ["--multi_gpu", "--num_processes", "16", "--num_machines", "2"]

    def threads(options):
        return (
            launch_command_parser()
            .parse_args(process_group.stage_command("sft", "recipe.yaml", [], options)[3:])
            .num_cpu_threads_per_process
        )

    assert threads(default_launch_options()) == 4 and threads(two_machines) == 2
    assert threads([*two_machines, "--num_processes", "64"]) == 1
    assert threads([*two_machines, "--num_cpu_threads_per_process", "3"]) == 3
    assert threads(["--cpu", "--num_processes", "1"]) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # which accelerate takes
    assert threads(default_launch_options()) is None


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


def test_a_run_that_ignores_a_signal_goes_on():
    """As under nohup when the terminal is closed, and in the background of a script at Ctrl-C."""
    Path("touched.py").write_text("import pathlib, time; pathlib.Path('ready.txt').touch(); time.sleep(0.5)")
    for number in (signal.SIGHUP, signal.SIGINT):
        before = signal.signal(number, signal.SIG_IGN)
        try:
            signal_when_ready(number)
            assert launch([sys.executable, "-S", "touched.py"]) == 0
        finally:
            signal.signal(number, before)
        Path("ready.txt").unlink()


SEVERAL = """\
import pathlib, os, signal, sys, time
rank, times = os.environ.get("RANK", "0"), []
def note(number, frame):
    times.append(number)
    if len(times) == 2 and sys.argv[1] == "polite":
        pathlib.Path(f"stopped-{rank}.txt").write_text(" ".join(signal.Signals(number).name for number in times))
        sys.exit(130)
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
pathlib.Path(f"pid-{rank}.txt").write_text(str(os.getpid()))
for _ in range(1200):
    time.sleep(0.05)
    pathlib.Path(f"told-{rank}-{len(times)}.txt").touch()
"""


def signal_again_and_again(times, processes):
    """Send this process SIGINT, and again whenever all processes of the stage have noted it."""

    def send():
        for number in range(times):
            while not all(Path(f"told-{rank}-{number}.txt").exists() for rank in range(processes)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize(("processes", "kind", "times"), [(2, "polite", 2), (2, "deaf", 3), (1, "polite", 2)])
def test_ctrl_c_again_reaches_every_process_of_a_stage(processes, kind, times, monkeypatch, capfd):
    """Torch starts several in sessions of their own: the second ends them in their own way, the third kills them."""
    Path("several.py").write_text(SEVERAL)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    kinds = {1: ["--cpu"], 2: ["--multi_gpu", "--main_process_port", "0"]}
    options = [*kinds[processes], "--num_processes", str(processes), "--num_machines", "1"]
    command = [sys.executable, "-m", "pipeline.stages.first_failure", *options]
    signal_again_and_again(times, processes)
    assert launch([*command, "--mixed_precision", "no", "--dynamo_backend", "no", "several.py", kind]) == 130
    for rank in range(processes):
        assert not process_is_alive(int(Path(f"pid-{rank}.txt").read_text()))
        assert kind == "deaf" or Path(f"stopped-{rank}.txt").read_text() == "SIGINT SIGINT"
    assert "Traceback" not in capfd.readouterr().err


def process_is_alive(number):
    """Whether a process runs, and is no zombie that nobody has waited for."""
    return psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE
