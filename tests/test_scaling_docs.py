"""docs/hardware.md and the Slurm scripts: their commands are those that accelerate and run.py take."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from pipeline.cli.run_command import parse_arguments
from pipeline.stages.launch import machine_rank, process_count, sharding_engine

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every command of the page's fenced blocks, without variables set before it."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S)
    lines = "".join(text for kind, text in blocks if not kind).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in line if not re.match(r"[A-Z_]+=", word)] for line in words if line]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[-1])
def test_every_command_of_the_page_is_taken(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    if command[:2] == ["python", "pipeline/run.py"]:
        arguments, options = parse_arguments(command[2:])
        assert (ROOT / arguments.words[0]).is_file()
        assert process_count(options) == 16 if "multi_node" in str(options) else 8
        assert machine_rank(options) in (0, 1)
        if sharding_engine(options) == "DeepSpeed":
            assert arguments.only == "sft"
    elif command[:2] == ["accelerate", "launch"]:
        found = launch_command_parser().parse_args(command[2:])
        assert (ROOT / found.training_script).is_file() and (ROOT / found.training_script_args[0]).is_file()
        process_count(command[2 : command.index(found.training_script)])
    elif command[0] == "sbatch":
        assert (ROOT / command[1]).is_file()
    else:
        file = command[3:] if command[1:3] == ["-m", "pytest"] else command[1:]
        assert command[0] == "pip" or (command[0] == "python" and (ROOT / file[0]).is_file())


@pytest.mark.parametrize("script", ["docs/slurm.sh", "docs/slurm_fsdp2.sh"])
@pytest.mark.parametrize("slices", [None, "4"])
def test_the_slurm_scripts_give_each_machine_its_rank(tmp_path, monkeypatch, script, slices):
    """Run by bash, with stand-ins for Slurm and Python that tell what they are given."""
    monkeypatch.chdir(ROOT)
    subprocess.run(["bash", "-n", script], check=True)
    stand_ins = {
        "scontrol": '[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"',
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "python": 'printf "%s " "$@"; echo',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    slurm |= {} if slices is None else {"SLICES": slices}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"}
    command = ["bash", script, "recipes/quickstart.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        program, *words = shlex.split(line)
        arguments, options = parse_arguments(words)
        assert program == "pipeline/run.py" and arguments.words == ["recipes/quickstart.yaml"]
        found = launch_command_parser().parse_args([*options, "stage.py"])
        assert (found.num_machines, found.machine_rank, found.main_process_ip) == (2, rank, "node7")
        assert found.main_process_port == 29500 and Path(found.config_file).is_file()
        assert process_count(options) == 16
        if "fsdp2" in script:  # by default slices inside of a machine
            sizes = (found.parallelism_config_dp_replicate_size, found.parallelism_config_dp_shard_size)
            assert sizes == ((2, 8) if slices is None else (4, 4)) and sharding_engine(options) == "FSDP"
