"""SFT under DeepSpeed's ZeRO in two processes on the CPU: it trains, saves and goes on as one plain process does.

Needs the extra `deepspeed`, and `DS_ACCELERATOR=cpu` for the process that runs it.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from ppo_toys import read_metrics
from two_processes import run_in_two

from pipeline import sft as sft_stage
from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = ("red", "blue", "green", "white", "black")
# DeepSpeed's ZeRO-3 leaves parameters of fewer than 100,000 numbers whole; an MLP layer of this model has 256 x 704.
RECIPE = """
name: NAME
output_dir: {root}/runs
model: {{from_scratch: {{hidden_size: 256, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 280}}}}
task: {{name: parallel, data_dir: {root}, source: "{{split}}.en", target: "{{split}}.de"}}
sft:
  num_train_epochs: 2
  per_device_train_batch_size: 4
  gradient_checkpointing: false
  learning_rate: 1e-3
  logging_steps: 1
  max_grad_norm: 1.0
eval: {{metrics: [bleu]}}
"""
KINDS = {"zero2": (2, False), "zero3": (3, False), "zero2-lora": (2, True), "zero3-lora": (3, True)}


def forget() -> None:
    """Accelerate's state of an earlier run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def environment(stage: int) -> dict[str, str]:
    """What accelerate launch puts into a process's environment for the file of a ZeRO stage."""
    file = str(ROOT / "accelerate_configs" / f"deepspeed_zero{stage}.yaml")
    options = ["--config_file", file, "--num_processes", "2", "--main_process_port", "0", "stage.py"]
    arguments, config, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    arguments.deepspeed_fields_from_accelerate_config = ",".join([*config.deepspeed_config, "mixed_precision"])
    found = prepare_deepspeed_cmd_env(arguments)[1]
    return {name: value for name, value in found.items() if name.startswith("ACCELERATE_")}


class Runs:
    """One recipe, run plainly by one process and under each kind by two."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for split, count in (("train", 16), ("validation", 5), ("test", 5)):
            pairs = [(WORDS[n % 5], WORDS[n // 5 % 5], WORDS[n * 3 % 5]) for n in range(count)]
            (root / f"{split}.en").write_text("".join(f"{a} {b}\n" for a, b, _ in pairs))
            (root / f"{split}.de").write_text("".join(f"{c} {b}\n" for _, b, c in pairs))
        (root / "recipe.yaml").write_text(RECIPE.format(root=root))

    def place(self, name: str) -> Path:
        return self.root / "runs" / name / "sft"

    def run(self, name: str, lora: bool, batch: int) -> None:
        """The sft stage."""
        forget()
        words = [f"name={name}", f"sft.use_peft={str(lora).lower()}", f"sft.per_device_train_batch_size={batch}"]
        words += ["model.lora_dropout=0"] * lora  # each process draws its own
        assert sft_stage.main([str(self.root / "recipe.yaml"), *words]) == 0

    def everything(self) -> None:
        """What a group of two does: each kind, and its second half once more from the checkpoint of the first."""
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it accelerate takes no engine
        for kind, (stage, lora) in KINDS.items():
            os.environ.update(environment(stage))
            self.run(kind, lora, 2)
            if torch.distributed.get_rank() == 0:
                shutil.copytree(self.root / "runs" / kind, self.root / "runs" / f"{kind}-again")
                again = self.place(f"{kind}-again")
                for path in (again / "stage.json", again / "model.safetensors"):
                    path.unlink()
                shutil.rmtree(again / "checkpoints" / "checkpoint-8")
            torch.distributed.barrier()
            self.run(f"{kind}-again", lora, 2)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Of the saved directory, as any user of transformers loads it."""
        return dict(load_model(self.place(name), ModelConfig(model_name_or_path="unused")).named_parameters())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """All runs; the children are forked before this process trains, because a fork has no threads of its parent."""
    found = Runs(tmp_path_factory.mktemp("deepspeed"))
    run_in_two(found.everything, found.root)
    for lora in (False, True):
        found.run(f"plain{'-lora' * lora}", lora, 4)
    forget()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_weights_of_one(runs, kind):
    """Within 2e-5: sums in another order, in float32, which Adam divides by the root of small squares."""
    lora = KINDS[kind][1]
    one, two, base = runs.weights("plain" + "-lora" * lora), runs.weights(kind), base_weights(runs, kind)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-5)
    moved = max((one[name] - base[name]).abs().max() for name in one)
    assert moved > 1e-3


def base_weights(runs: Runs, kind: str) -> dict[str, torch.Tensor]:
    """What the run began with."""
    return dict(
        load_model(runs.root / "runs" / kind / "base", ModelConfig(model_name_or_path="unused")).named_parameters()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_half_from_the_checkpoint_gives_the_same_bits(runs, kind):
    whole, again = runs.weights(kind), runs.weights(f"{kind}-again")
    for name, weight in whole.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=0)
    assert read_metrics(runs.place(f"{kind}-again")) == read_metrics(runs.place(kind))
    assert len(read_metrics(runs.place(kind))) == 8 + 2 + 1  # steps, evaluations, the summary


@pytest.mark.parametrize("kind", KINDS)
def test_the_curves_are_those_of_one_process(runs, kind):
    """But those of evaluations, which transformers averages by batches, and two processes make other batches."""
    one, two = (read_metrics(runs.place(name)) for name in ("plain" + "-lora" * KINDS[kind][1], kind))
    for first, second in zip(one, two, strict=True):
        for name in {"loss", "train_loss", "grad_norm"} & first.keys():
            assert second[name] == pytest.approx(first[name], rel=1e-4), (name, first, second)
