"""Systems without modules of Linux are refused in one sentence; Apple's GPU is left alone in one sentence."""

import subprocess
import sys
from pathlib import Path

import torch
from accelerate import state

import pipeline
from pipeline.stages.launch import default_launch_options
from pipeline.stages.plan import device_name
from pipeline.trainers.huggingface.sft import sft_arguments
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.setup import make_accelerator
from pipeline.trainers.precision import native_bf16

PIPELINE = Path(pipeline.__file__).parent
WITHOUT = """
import os, runpy, signal, sys
import accelerate, datasets, evaluate, peft, trl  # which have code of their own for other systems
from trl import RewardTrainer, SFTTrainer
sys.modules["fcntl"] = sys.modules["resource"] = None
del os.killpg, os.fork, signal.SIGALRM
"""


def run(code):
    command = [sys.executable, "-c", WITHOUT + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=PIPELINE.parent)


def test_a_script_ends_with_one_sentence():
    for script in ("run", "ppo"):
        done = run(f"sys.argv = ['x']; runpy.run_path({str(PIPELINE / script) + '.py'!r}, run_name='__main__')")
        *libraries, sentence = (
            done.stderr.splitlines()
        )  # peft imports bitsandbytes, which may say something of its own
        assert done.returncode == 2 and sentence.startswith("error: ") and "WSL" in sentence, done.stderr
        assert not any("Relay" in line or "Traceback" in line for line in libraries), done.stderr


def test_the_trainer_alone_can_be_imported():
    done = run("import pipeline.trainers.ppo.trainer, pipeline.models.loading, pipeline.rewards")
    assert done.returncode == 0, done.stderr


def test_apples_gpu_is_left_alone(monkeypatch, fresh_accelerate, capfd, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(state, "is_mps_available", lambda: True)
    options = default_launch_options()
    assert "--cpu" in options and "mps" in device_name(options) and device_name(options).startswith("cpu")
    assert make_accelerator(PPOConfig(bf16=False), tmp_path).device.type == "cpu"
    assert "mps" in capfd.readouterr().err
    assert sft_arguments({"bf16": False}, tmp_path, 0).device.type == "cpu"
    assert isinstance(native_bf16(), bool)
