"""accelerate_configs/: what accelerate itself makes of each file, and what each says of its own trial."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from pipeline.runtime.distributed import launched_engine
from pipeline.stages.engines import engine_problem, fsdp_problem
from pipeline.stages.launch import process_count, sharding_engine

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
PROCESSES = {
    "cpu": 1,
    "single_gpu": 1,
    "multi_gpu": 8,
    "multi_node": 16,
    "fsdp2": 8,
    "fsdp2_multi_node": 16,
    "deepspeed_zero2": 8,
    "deepspeed_zero3": 8,
}
ENGINES = {"fsdp2": "FSDP", "fsdp2_multi_node": "FSDP", "deepspeed_zero2": "DeepSpeed", "deepspeed_zero3": "DeepSpeed"}
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def checked(*options: str) -> Namespace:
    """The options with the file's settings in them, after accelerate launch's own checks."""
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*options, "stage.py"]))
    return arguments


def test_there_is_a_file_for_each_kind_of_hardware():
    assert {file.stem for file in FILES} == set(PROCESSES)


@every_file
def test_accelerate_takes_every_key(file):
    """It refuses keys of a file that it does not know; one of an engine's settings it would copy without a word."""
    config = load_config_from_file(str(file))
    found = checked("--config_file", str(file))
    known = {action.dest for action in launch_command_parser()._actions}
    sections = {**config.fsdp_config, **config.deepspeed_config, **config.parallelism_config}
    assert set(sections) <= known
    assert found.num_processes == PROCESSES[file.stem] and found.mixed_precision == "no"
    assert found.use_fsdp == file.stem.startswith("fsdp2")
    assert found.use_deepspeed == file.stem.startswith("deepspeed")
    assert found.multi_gpu == (file.stem in ("multi_gpu", "multi_node"))
    for key, value in sections.items():
        assert vars(found)[key] == value


@every_file
def test_each_file_says_what_exercised_it(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = " ".join(
        line.removeprefix("# ") for line in lines[: next(i for i, x in enumerate(lines) if x[0] != "#")]
    )
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", comment)
    assert named or "not run yet" in comment.lower()
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), (
            f"{file.name} names no test: {path}::{test}"
        )


@every_file
def test_processes_and_engine_of_each_file(file, monkeypatch):
    options = ["--config_file", str(file)]
    assert process_count(options) == PROCESSES[file.stem]
    assert sharding_engine(options) == ENGINES.get(file.stem)
    if PROCESSES[file.stem] > 1:
        assert process_count([*options, "--num_processes", "2"]) == 2
        assert process_count([*options, "--num_machines", "2", "--num_processes", "5"]) == 4  # two on each
    assert process_count([*options, "--cpu"]) == 1 and sharding_engine([*options, "--cpu"]) is None
    assert sharding_engine([*options, "--multi_gpu"]) is None
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert process_count(options) == PROCESSES[file.stem]


def test_engines_by_option_and_by_environment(monkeypatch):
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        monkeypatch.delenv(f"ACCELERATE_USE_{name}", raising=False)
    assert sharding_engine(["--num_processes", "2"]) is None and launched_engine() is None
    for option, engine in (("fsdp", "FSDP1"), ("deepspeed", "DeepSpeed"), ("megatron_lm", "Megatron-LM")):
        assert sharding_engine([f"--use_{option}"]) == engine
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{option.upper()}", "true")
            assert launched_engine() == engine
            patch.setenv("FSDP_VERSION", "2")
            assert launched_engine() == engine.removesuffix("1")
        refused = {stage for stage in ("sft", "reward", "ppo", "eval") if engine_problem(stage, engine)}
        assert refused == {"reward", "ppo", "eval"} | ({"sft"} if engine == "Megatron-LM" else set())
    assert sharding_engine(["--use_fsdp", "--fsdp_version", "2"]) == "FSDP"
    assert engine_problem("ppo", None) is None and engine_problem("ppo", "FSDP") is None
    assert "fsdp_version: 2" in engine_problem("ppo", "FSDP1")
    assert "model.load_in_4bit" in engine_problem("ppo", "FSDP", in_4_bits=True)


def test_settings_that_relays_own_sharding_does_not_do_are_refused(monkeypatch):
    file = str(ROOT / "accelerate_configs" / "fsdp2.yaml")
    settings = checked("--config_file", file)
    for name in ("cpu_ram_efficient_loading", "offload_params", "activation_checkpointing", "reshard_after_forward"):
        monkeypatch.setenv(f"FSDP_{name.upper()}", str(vars(settings)[f"fsdp_{name}"]).lower())
    assert fsdp_problem("ppo", "FSDP") is None
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert "needs fsdp_offload_params: false" in fsdp_problem("ppo", "FSDP")
    assert fsdp_problem("sft", "FSDP") is None and fsdp_problem("ppo", None) is None


STAGE = """
import json, os
from accelerate import PartialState
state = PartialState(cpu=True)
names = [None] * state.num_processes
if state.num_processes > 1:
    import torch
    torch.distributed.all_gather_object(names, state.process_index)
if state.is_main_process:
    print(json.dumps([state.num_processes, names, state.device.type, os.environ["ACCELERATE_MIXED_PRECISION"]]))
state.wait_for_everyone()
state.destroy_process_group()  # one that goes while another still talks to it aborts that one
"""


@pytest.mark.parametrize(
    ("name", "options", "count"), [("single_gpu", [], 1), ("multi_gpu", ["2"], 2), ("fsdp2", ["2"], 2)]
)
def test_a_stage_starts_with_the_processes_of_its_file(name, options, count, tmp_path):
    """Truly launched, on the CPU; what the stages do in several processes is tested with the stages."""
    (tmp_path / "stage.py").write_text(STAGE)
    options = ["--num_processes", *options] if options else []
    options = [
        "--config_file",
        str(ROOT / "accelerate_configs" / f"{name}.yaml"),
        *options,
        "--main_process_port",
        "0",
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(tmp_path / "stage.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [count, list(range(count)) if count > 1 else [None], "cpu", "no"]
    assert process_count(options) == count
