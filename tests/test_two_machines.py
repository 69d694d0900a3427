"""Two machines of one network: two namespaces that a virtual cable joins, and a run directory that both see.

Each has its own `accelerate launch` with the files and options that docs/hardware.md gives for true machines.
"""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240
ADDRESSES = ("10.203.0.1", "10.203.0.2")
ENGLISH = ("a dog runs", "the cat sleeps", "we eat bread", "a bird sings")
GERMAN = ("ein Hund läuft", "die Katze schläft", "wir essen Brot", "ein Vogel singt")
RECIPE = """
name: tiny
output_dir: {root}/runs
model: {{from_scratch: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 300}}}}
task: {{name: parallel, data_dir: {root}, source: "{{split}}.en", target: "{{split}}.de", language: de}}
sft: {{num_train_epochs: 1, per_device_train_batch_size: 2, gradient_checkpointing: false, learning_rate: 1e-2}}
ppo:
  rewards: [chrf]
  total_episodes: 8
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  response_length: 8
  learning_rate: 1e-2
  load_best_model_at_end: false
eval: {{metrics: [bleu], samples_per_prompt: 0, num_inspected: 0}}
"""


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """The names of two network namespaces at `ADDRESSES`; nothing but the cable leads out of them."""
    tag = uuid.uuid4().hex[:6]
    names, ends = [f"relay-{tag}-{rank}" for rank in range(2)], [f"r{tag}{rank}" for rank in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for name, end, address in zip(names, ends, ADDRESSES, strict=True):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', None) or error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def environment(machine: str) -> dict[str, str]:
    """Of a process on a machine: gloo and the launcher find the cable by its name."""
    links = subprocess.run(["ip", "-n", machine, "-o", "link"], capture_output=True, text=True, check=True).stdout
    cable = next(word.split("@")[0] for line in links.splitlines() for word in line.split()[1:2] if "lo:" not in word)
    return {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": cable.rstrip(":"),
    }


def options(rank: int, name: str = "multi_node") -> list[str]:
    """Of accelerate launch, as docs/hardware.md has them."""
    file = str(ROOT / "accelerate_configs" / f"{name}.yaml")
    where = ["--main_process_ip", ADDRESSES[0], "--main_process_port", "29500"]
    return ["--config_file", file, "--num_processes", "2", "--num_machines", "2", "--machine_rank", str(rank), *where]


def on_both(machines: list[str], *commands: list[str]) -> list[tuple[int, str]]:
    """Run one command on each machine at once; exit codes and what they said."""
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", machine, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(machine),
        )
        for machine, command in zip(machines, commands, strict=True)
    ]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in started]
        return [(process.returncode, words) for process, words in zip(started, said, strict=True)]
    finally:
        for process in started:
            process.kill()


def recipe(root: Path) -> Path:
    for split, copies in (("train", 4), ("validation", 1), ("test", 1)):
        (root / f"{split}.en").write_text("\n".join(ENGLISH * copies) + "\n")
        (root / f"{split}.de").write_text("\n".join(GERMAN * copies) + "\n")
    (root / "tiny.yaml").write_text(RECIPE.format(root=root))
    return root / "tiny.yaml"


# One start for all stages, because importing the libraries takes longer than each of them.
CHAIN = """
import sys
from accelerate.state import AcceleratorState, GradientState
from pipeline import eval, ppo, sft
for stage in (sft, ppo, eval):
    code = stage.main(sys.argv[1:])
    if code:
        sys.exit(code)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
"""


@pytest.mark.parametrize("name", ["multi_node", "fsdp2"])
def test_two_machines_run_the_chain(machines, tmp_path, name):
    """With a whole model on each, and with a slice on each; SFT has whole ones, because it runs on a CPU."""
    path, chain = recipe(tmp_path), tmp_path / "chain.py"
    chain.write_text(CHAIN)
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    commands = [[*launch, *options(rank, name), str(chain), str(path)] for rank in (0, 1)]
    for code, said in on_both(machines, *commands):
        assert code == 0, said
    run = tmp_path / "runs" / "tiny"
    for stage in ("sft", "ppo", "eval"):
        assert json.loads((run / stage / "stage.json").read_text())["processes"] == 2
    sft, start = (load_file(run / name / "model.safetensors") for name in ("sft", "base"))
    assert any((sft[name] != weight).any() for name, weight in start.items())
    adapter = load_file(run / "ppo" / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    report = json.loads((run / "eval" / "report.json").read_text())
    assert set(report["systems"]) == {"base", "sft", "ppo"} and report["settings"]["test_examples"] == 4
    assert {path.name for path in run.iterdir()} == {"base", "sft", "ppo", "eval", "recipe.yaml", ".lock"}
