"""SFT under accelerate_configs/fsdp2.yaml in two gloo processes, as Accelerate and transformers shard it.

Accelerate knows FSDP on accelerators alone: here it is told that the processes have some.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from two_processes import run_in_two

from pipeline import sft as sft_stage
from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = ("red", "blue", "green", "white", "black")
RECIPE = """
name: NAME
output_dir: {root}/runs
model: {{from_scratch: {{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 280}}}}
task: {{name: parallel, data_dir: {root}, source: "{{split}}.en", target: "{{split}}.de"}}
sft:
  num_train_epochs: 2
  per_device_train_batch_size: 4
  gradient_checkpointing: false
  learning_rate: 1e-3
  bf16: false
eval: {{metrics: [bleu]}}
"""
KINDS = {"all weights": ["sft.use_peft=false"], "lora": ["sft.use_peft=true", "model.lora_dropout=0"]}


def forget() -> None:
    """Accelerate's state of an earlier run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def allow_fsdp() -> None:
    """Let accelerate shard on a CPU, with the settings of the file."""
    options = ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml"), "--num_processes", "2", "stage.py"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(options))[0]
    settings = prepare_multi_gpu_env(arguments)
    os.environ |= {k: v for k, v in settings.items() if k.startswith("FSDP_")} | {"ACCELERATE_USE_FSDP": "true"}
    init = AcceleratorState.__init__

    def with_fsdp(self, *given, **more) -> None:
        init(self, *given, **more)
        if more.get("fsdp_plugin") is not None:
            AcceleratorState._shared_state["fsdp_plugin"] = more["fsdp_plugin"]
            for state in (AcceleratorState, PartialState):
                state._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


class Runs:
    """One recipe, run plainly by one process and in slices by two."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for split, count in (("train", 16), ("validation", 5), ("test", 5)):
            pairs = [(WORDS[n % 5], WORDS[n // 5 % 5], WORDS[n * 3 % 5]) for n in range(count)]
            (root / f"{split}.en").write_text("".join(f"{a} {b}\n" for a, b, _ in pairs))
            (root / f"{split}.de").write_text("".join(f"{c} {b}\n" for _, b, c in pairs))
        (root / "recipe.yaml").write_text(RECIPE.format(root=root))

    def run(self, kind: str, world: int) -> None:
        """The sft stage."""
        forget()
        words = [f"name={kind.replace(' ', '-')}-{world}", f"sft.per_device_train_batch_size={4 // world}"]
        assert sft_stage.main([str(self.root / "recipe.yaml"), *words, *KINDS[kind]]) == 0

    def both(self) -> None:
        """What each of two processes does."""
        allow_fsdp()
        for kind in KINDS:
            self.run(kind, 2)
            assert PartialState().distributed_type == DistributedType.FSDP

    def again(self) -> None:
        """What each of two processes does in a directory with checkpoints."""
        allow_fsdp()
        for kind in KINDS:
            self.run(kind, 2)

    def weights(self, kind: str, world: int, stage: str = "sft") -> dict[str, torch.Tensor]:
        """Of the saved directory, as any user of transformers loads it."""
        path = self.root / "runs" / f"{kind.replace(' ', '-')}-{world}" / stage
        return dict(load_model(path, ModelConfig(model_name_or_path="unused")).named_parameters())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """All runs."""
    made = Runs(tmp_path_factory.mktemp("sharded"))
    run_in_two(made.both, made.root)
    for kind in KINDS:
        made.run(kind, 1)
    forget()
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_weights_of_one(runs, kind):
    """Within 1e-5: sums in another order, in float32, which Adam divides by the root of small squares."""
    one, two, base = runs.weights(kind, 1), runs.weights(kind, 2), runs.weights(kind, 1, "base")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)
    assert max((one[name] - base[name]).abs().max() for name in one) > 1e-3


def test_a_run_goes_on_where_it_was_ended(runs):
    """To the bit, from the checkpoint of the first of two epochs."""
    ended = {kind: runs.weights(kind, 2) for kind in KINDS}
    for kind in KINDS:
        folder = runs.root / "runs" / f"{kind.replace(' ', '-')}-2" / "sft"
        first, last = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
        assert first.is_dir() and not list(folder.rglob(".metadata"))
        shutil.rmtree(last)
        for path in (*folder.glob("*.safetensors"), folder / "stage.json"):
            path.unlink()
    run_in_two(runs.again, runs.root)
    for kind in KINDS:
        assert all(torch.equal(weight, ended[kind][name]) for name, weight in runs.weights(kind, 2).items())
