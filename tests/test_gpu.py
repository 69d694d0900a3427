"""What only a GPU can show: `make test-gpu`. `pytest tests/test_gpu.py --gpu-device cpu` runs it small on a CPU.

`RELAY_GPU_MODEL` may name the directory of a pretrained model (SmolLM2-135M) for the chain of a few steps.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from demo_run import write_demo
from peft import LoraConfig, get_peft_model

from pipeline.models import generation
from pipeline.models.adapters import adapter_config, fuse_adapter
from pipeline.models.generation import Decoding, generate
from pipeline.models.kernels import static_decode
from pipeline.trainers.checkpoints import list_checkpoints

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.gpu
SMOLLM = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12], [9], [13, 14, 15, 16, 17, 18, 19], [20, 21]]


@pytest.fixture
def device(request) -> str:
    """What everything runs on."""
    return request.config.getoption("--gpu-device")


@pytest.fixture
def demo(tmp_path, monkeypatch) -> Path:
    """A recipe over ten sentence pairs, in the current directory."""
    monkeypatch.chdir(tmp_path)
    write_demo()
    return tmp_path / "runs" / "demo"


def command(script: str, recipe: str | Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "pipeline" / f"{script}.py"), str(recipe), *overrides]


def environment(device: str) -> dict[str, str]:
    cpu = device == "cpu"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true" if cpu else "false"}


def run(arguments: list[str], device: str) -> str:
    """Run a command that ends well; what it wrote to stderr."""
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(device), timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def test_the_quickstart_learns_by_ppo_what_sft_left(device, tmp_path):
    short = ["sft.max_steps=2", "ppo.total_episodes=256"] if device == "cpu" else ["ppo.total_episodes=10240"]
    run(command("run", ROOT / "recipes" / "quickstart.yaml", f"output_dir={tmp_path}", *short), device)
    report = json.loads((tmp_path / "quickstart" / "eval" / "report.json").read_text())
    [gain] = [c for c in report["comparisons"] if (c["a"], c["b"], c["metric"]) == ("sft", "ppo", "bleu")]
    assert device == "cpu" or (gain["delta"] > 0 and gain["p_value"] < 0.05)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_chain_of_a_few_steps(device, demo, bits):
    sizes = {name: value if device != "cpu" else 32 for name, value in SMOLLM.items()}
    sizes |= {} if device != "cpu" else {"num_hidden_layers": 2, "num_attention_heads": 2}
    overrides = [f"model.from_scratch.{name}={value}" for name, value in sizes.items()]
    if pretrained := os.environ.get("RELAY_GPU_MODEL"):
        overrides = ["model.from_scratch=null", f"model.model_name_or_path={pretrained}"]
    if bits == 4:
        if find_spec("bitsandbytes") is None:
            pytest.skip("needs the extra `quantization`")
        overrides += ["model.load_in_4bit=true", "sft.use_peft=true", "ppo.load_best_model_at_end=false"]
    said = run(command("run", "recipe.yaml", *overrides), device)
    assert "cannot be captured" not in said
    report = json.loads((demo / "eval" / "report.json").read_text())
    assert {"sft", "ppo"} <= set(report["systems"])


def test_ppo_goes_on_where_a_signal_ended_it(device, demo):
    run(command("run", "recipe.yaml", "--only", "sft"), device)
    metrics = demo / "ppo" / "metrics.jsonl"
    stage = command("ppo", "recipe.yaml", "ppo.total_episodes=320")
    started = subprocess.Popen(stage, env=environment(device), stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
        assert started.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == 143
    assert "continuing from" in run(stage, device)
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "objective/kl" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 3


def test_sft_in_shards(device, demo):
    if device == "cpu":
        pytest.skip("accelerate has no FSDP on a CPU")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    launch += ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml")]
    run([*launch, str(ROOT / "pipeline" / "sft.py"), "recipe.yaml"], device)
    assert (demo / "sft" / "model.safetensors").is_file()


def test_ppo_and_the_evaluation_in_shards(device, demo):
    run(command("run", "recipe.yaml", "--only", "sft"), device)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    launch += ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml")]
    ppo, evaluation = ([*launch, str(ROOT / "pipeline" / f"{stage}.py"), "recipe.yaml"] for stage in ("ppo", "eval"))
    run(ppo, device)
    shutil.rmtree(list_checkpoints(demo / "ppo" / "checkpoints")[-1])
    (demo / "ppo" / "stage.json").unlink()
    assert "continuing from" in run(ppo, device)  # its slices
    run(evaluation, device)
    assert (demo / "ppo" / "adapter_model.safetensors").is_file() and (demo / "eval" / "report.json").is_file()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "t5", "bart"])
@pytest.mark.parametrize("decoding", [Decoding(24), Decoding(24, 1.0), Decoding(24, 0.7, 20, 0.9)], ids=str)
def test_tokens_are_those_of_a_cpu(device, architecture, decoding, monkeypatch, capsys):
    """In float32, row by row: the CPU's by the decode loop, the GPU's by graphs; some prompts wait."""
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    from test_decoding import build
    from test_sampling_options import Tokenizer

    def written(model: torch.nn.Module, devices: set[str]) -> list[list[list[int]]]:
        monkeypatch.setattr(generation, "STATIC_DEVICES", devices)
        rows = []
        for size in (6, 2):
            torch.manual_seed(0)
            rows.append(generate(model, Tokenizer, PROMPTS, decoding, size))
        return rows

    model = build(architecture, attn_implementation="sdpa")
    torch.manual_seed(1)
    network = get_peft_model(
        model, adapter_config(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    )
    fuse_adapter(network.eval())  # which changes nothing on a CPU
    expected = written(model, set())
    model = model.to(device)
    assert written(model, {device}) == expected and written(model, {device}) == expected
    memory = static_decode._MEMORIES[model]
    assert "cannot be captured" not in capsys.readouterr().err
    assert device == "cpu" or all(step.graph is not None for step in memory._steps.values())
