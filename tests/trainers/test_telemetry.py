"""TRL's telemetry: off, unless the user's environment says otherwise."""

import os
import subprocess
import sys

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry

import pipeline
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments

OFF = "print(constants.HF_HUB_DISABLE_TELEMETRY)"


@pytest.mark.parametrize(
    ("settings", "code", "off"),
    [
        ({}, f"import pipeline; from huggingface_hub import constants; {OFF}", True),
        ({}, f"from huggingface_hub import constants; import pipeline; {OFF}", True),
        ({"HF_HUB_DISABLE_TELEMETRY": "0"}, f"import pipeline; from huggingface_hub import constants; {OFF}", False),
        ({"DO_NOT_TRACK": "0"}, f"from huggingface_hub import constants; import pipeline; {OFF}", False),
    ],
)
def test_telemetry_is_off_unless_the_environment_decides(settings, code, off):
    inherited = {name: value for name, value in os.environ.items() if name not in pipeline.TELEMETRY_VARIABLES}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env={**inherited, **settings}, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(off)]


@pytest.mark.parametrize("off", [True, False])
def test_a_trainer_of_trl_sends_nothing(off, base_directory, model_config, examples, tmp_path, monkeypatch):
    assert constants.HF_HUB_DISABLE_TELEMETRY  # set by the import of pipeline
    topics = []
    monkeypatch.setattr(_telemetry, "_send_telemetry_in_thread", lambda topic, **_: topics.append(topic))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", off)
    monkeypatch.delenv("CI", raising=False)
    arguments = sft_arguments({"max_steps": 1, "eval_strategy": "no"}, tmp_path, 0)
    build_sft_trainer(
        load_model(base_directory, model_config),
        arguments,
        load_tokenizer(base_directory, model_config),
        examples,
        examples,
        None,
        tmp_path / "metrics.jsonl",
    )
    _telemetry._TELEMETRY_QUEUE.join()
    assert topics == ([] if off else ["trl/other"])  # the second shows that the first could fail
