"""The four stages, by their scripts, in two gloo processes against one with the same global batch.

The evaluation of a run is the same to the byte. A classifier's score of a text was seen to differ in its last float32
bit between one process and two although its batch was the same, so figures of the report on it may differ by
`LAST_BITS` (seen: 2.5e-8 of their size); its pairs and samples may not.

Stages that train add float32 gradients in another order, and Adam divides by their size, so that a rounding of 1e-7
grows where a gradient is small; the chain carries it from stage to stage. Weights that differed by up to 4e-5
(decoder-only) and 2.3e-4 (T5) and figures that did by up to 1.5e-3 of their size, and otherwise by 4e-5 in
absolute terms, were seen; `WEIGHTS` and `FIGURES` allow more than three times that. Texts, counts and ranks are equal.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import forks
import pytest
import safetensors.torch
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification
from two_processes import run_in_two

from pipeline import eval as eval_stage
from pipeline import ppo as ppo_stage
from pipeline import reward as reward_stage
from pipeline import sft as sft_stage

WEIGHTS = 1e-3  # the largest difference of a weight
FIGURES = {"rel": 5e-3, "abs": 5e-4}
LAST_BITS = {"rel": 1e-5, "abs": 1e-6}
STAGES = {"sft": sft_stage, "reward": reward_stage, "ppo": ppo_stage, "eval": eval_stage}
ENGLISH = ["a dog runs", "the cat sleeps", "we eat bread", "a bird sings"]
GERMAN = ["ein Hund läuft", "die Katze schläft", "wir essen Brot", "ein Vogel singt"]
RECIPE = """
name: tiny
output_dir: {root}/{world}
model:
  from_scratch:
    architecture: {architecture}
    hidden_size: 32
    num_hidden_layers: 1
    num_attention_heads: 2
    vocab_size: 300
task: {{name: parallel, data_dir: {root}, source: "{{split}}.en", target: "{{split}}.de", language: de}}
sft:
  num_train_epochs: 4
  per_device_train_batch_size: {batch}
  per_device_eval_batch_size: {batch}
  gradient_checkpointing: false
  max_length: 64
  learning_rate: 1e-2
reward:
  pairs: {{from: [sft, references], metric: chrf, samples: 3, min_margin: 0.0}}
  min_accuracy: 0
  num_train_epochs: 2
  per_device_train_batch_size: {batch}
  per_device_eval_batch_size: {batch}
  learning_rate: 1e-2
ppo:
  rewards: [{{name: learned}}, {{name: chrf, weight: 0.5}}]
  total_episodes: 24
  per_device_train_batch_size: 4
  gradient_accumulation_steps: {accumulation}
  num_generations: 2
  response_length: 8
  learning_rate: 1e-2
  local_rollout_forward_batch_size: 2
  load_best_model_at_end: false
eval:
  metrics: [bleu, chrf, ter]
  num_samples: 2
  beam_sizes: [2]
  samples_per_prompt: 2
  per_device_eval_batch_size: 2
"""


def write_recipe(root: Path, world: int, architecture: str) -> str:
    """A recipe over twelve sentence pairs, for a number of processes and the same global batch."""
    for split in ("train", "validation", "test"):
        numbered = [f"{text} {n}" for n in range(3) for text in ENGLISH]
        english = {"train": numbered, "validation": ENGLISH, "test": numbered[3:8]}[split]
        (root / f"{split}.en").write_text("\n".join(english) + "\n")
        # Held-out texts of one length: transformers takes the mean over batches, however many tokens each has.
        # An odd number of test rows: the processes have shares of different sizes.
        german = {"train": GERMAN * 3, "validation": GERMAN[:1] * 4, "test": (GERMAN * 2)[3:8]}[split]
        (root / f"{split}.de").write_text("\n".join(german) + "\n")
    path, sizes = root / f"{world}.yaml", {"batch": 4 // world, "accumulation": 2 // world}
    path.write_text(RECIPE.format(root=root, world=world, architecture=architecture, **sizes))
    return str(path)


def writes_of(run: Path, call) -> list[tuple[str, str]]:
    """How and where a call writes files of a run, in order."""
    found: list[tuple[str, str]] = []

    def note(how: str, path: object) -> None:
        if isinstance(path, str | os.PathLike) and str(path).startswith(f"{run}/"):
            found.append((how, str(Path(path).relative_to(run))))

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR) and not os.path.isdir(arguments[0]):
            note("append" if (arguments[2] or 0) & os.O_APPEND else "write", arguments[0])
        elif event == "os.rename":
            note("rename", arguments[1])

    def serialize(tensors, filename, *rest, **more):
        note("write", filename)
        return serialize_file(tensors, filename, *rest, **more)

    serialize_file, safetensors.torch.serialize_file = safetensors.torch.serialize_file, serialize
    sys.addaudithook(hook)
    call()
    return list(found)


def state_of(run: Path) -> dict[str, int]:
    """When each file of a run was written."""
    return {str(p.relative_to(run)): p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}


def without_key(file: str) -> str:
    """The name of a file of kept texts without its key, which says what they depend on: the other run's models."""
    return re.sub(r"\.[0-9a-f]{64}\.", ".", file)


class Chains:
    """The chain of one process and of two, and what was written."""

    def __init__(self, root: Path, architecture: str) -> None:
        self.root = root
        self.recipes = {world: write_recipe(root, world, architecture) for world in (1, 2)}

    def run_of(self, world: int) -> Path:
        """A run directory."""
        return self.root / str(world) / "tiny"

    def stages(self, world: int, *names: str, overrides: Sequence[str] = ()) -> None:
        """Run stages in this process, which may be one of two."""
        for name in names or STAGES:
            assert STAGES[name].main([self.recipes[world], *overrides]) == 0

    def in_two(self) -> None:
        """What each of two processes does: the chain, and once more what is complete."""
        run, rank = self.run_of(2), int(os.environ["RANK"])
        found = writes_of(run, lambda: self.stages(2))
        (self.root / f"writes-{rank}.json").write_text(json.dumps(found))
        PartialState().wait_for_everyone()
        before = state_of(run)
        self.stages(2)
        assert state_of(run) == before

    def lines(self, world: int, file: str) -> object:
        """A file of JSON or of JSON lines."""
        text = (self.run_of(world) / file).read_text()
        return [json.loads(line) for line in text.splitlines()] if file.endswith("l") else json.loads(text)


@pytest.fixture(scope="module", params=["llama", "t5"])
def chains(request, tmp_path_factory) -> Chains:
    """Both chains."""
    made = Chains(tmp_path_factory.mktemp("chains"), request.param)
    run_in_two(made.in_two, made.root)
    assert forks.run(lambda: made.stages(1)) == 0
    return made


def assert_alike(one: object, two: object, where: str = "", tolerance: dict[str, float] = FIGURES) -> None:
    """Equal but for the rounding of floats."""
    if isinstance(one, dict) and isinstance(two, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_alike(one[key], two[key], f"{where}.{key}", tolerance)
    elif isinstance(one, list) and isinstance(two, list):
        assert len(one) == len(two), where
        for number, pair in enumerate(zip(one, two, strict=True)):
            assert_alike(*pair, f"{where}[{number}]", tolerance)
    elif isinstance(one, float) and isinstance(two, float):
        assert two == pytest.approx(one, **tolerance, nan_ok=True), where
    else:
        assert one == two, where


@pytest.mark.parametrize(
    "file",
    ["sft/model", "reward/adapter_model", "reward/reward_head", "ppo/adapter_model", "ppo/value_head"],
)
def test_weights_are_those_of_one_process(chains, file):
    one, two = (load_file(chains.run_of(world) / f"{file}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=WEIGHTS)
    if file == "ppo/adapter_model":  # B of every LoRA layer began at 0
        assert max(float(w.abs().max()) for name, w in one.items() if "lora_B" in name) > 20 * WEIGHTS


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_logs_are_those_of_one_process(chains, stage):
    one, two = (chains.lines(world, f"{stage}/metrics.jsonl") for world in (1, 2))
    for line in (*one, *two):
        line.pop("total_flos", None)  # counts padding, of which smaller batches have less
    assert len(one) > 2
    assert_alike(one, two)


def test_pairs_predictions_and_reports_are_those_of_one_process(chains):
    for name in ("pairs.jsonl", "samples.jsonl", "pairs.json"):
        assert chains.lines(1, f"reward/{name}") == chains.lines(2, f"reward/{name}")
    reward, report = ([chains.lines(w, f) for w in (1, 2)] for f in ("reward/report/report.json", "eval/report.json"))
    for found in reward:
        assert found["settings"].pop("model")  # another directory
    for found in report:
        assert len(found.pop("cost")) == 4
    assert_alike(*reward)
    assert_alike(*report)
    for system in ("base", "sft", "ppo"):
        assert_alike(*(chains.lines(world, f"eval/predictions/{system}.jsonl") for world in (1, 2)))


def test_two_processes_leave_the_files_of_one_each_written_once(chains):
    one, two = (set(map(without_key, state_of(chains.run_of(world)))) for world in (1, 2))
    assert one == two and not any(".mark" in file for file in two)
    for stage in STAGES:
        assert json.loads((chains.run_of(2) / stage / "stage.json").read_text())["processes"] == 2
    main, other = (json.loads((chains.root / f"writes-{rank}.json").read_text()) for rank in (0, 1))
    assert [path for _, path in other if "/.phase-1" not in path] == []
    once = [path for how, path in main if how == "write" and "/.phase-0" not in path and ".mark" not in path]
    # Every stage writes the recipe, whole; the evaluation adds its figures to the model cards.
    once = [path for path in once if not path.startswith("recipe.yaml.") and "README.md" not in path]
    assert {"sft/model.safetensors", "ppo/adapter_model.safetensors", "eval/report.json"} <= set(once)
    assert sorted(once) == sorted(set(once))
    assert [path for how, path in main if how == "rename"].count("eval/stage.json") == 1


def report_bytes(directory: Path) -> dict[str, bytes]:
    """What an evaluation wrote, without what it cost and the charts of that."""
    report = json.loads((directory / "report.json").read_text())
    report.pop("cost")
    files = {p.name: p.read_bytes() for p in (directory / "predictions").iterdir()}
    return files | {"report.json": json.dumps(report).encode()}


@pytest.mark.parametrize("size", [2, 8])
def test_the_evaluation_of_a_run_is_the_same_to_the_byte(chains, size):
    """Every metric, interval and p-value; samples, beams, best of n and a learned reward included.

    Five test rows are three batches of two, of which one process has two, or one batch, which leaves a process idle.
    """
    directory, overrides, found = chains.run_of(1) / "eval", [f"eval.per_device_eval_batch_size={size}"], []
    for world in (1, 2):
        shutil.rmtree(directory)
        if world == 1:
            assert forks.run(lambda: chains.stages(1, "eval", overrides=overrides)) == 0
        else:
            run_in_two(lambda: chains.stages(1, "eval", overrides=overrides), chains.root)
        assert json.loads((directory / "stage.json").read_text())["processes"] == world
        found.append(report_bytes(directory))
    assert found[0] == found[1]
    report = json.loads(found[0]["report.json"])
    assert report["systems"]["ppo"]["samples"] == 5 and report["systems"]["ppo"]["kl_to_sft"] > 0
    assert all(0 < comparison["p_value"] <= 1 for comparison in report["comparisons"])


def test_two_processes_score_by_a_classifier_as_one_does(chains, tokenizer):
    """Its pairs are sampled and its scores made by every process."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=320, num_labels=1, pad_token_id=0, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(chains.root / "classifier")
    tokenizer.save_pretrained(chains.root / "classifier")
    # More texts than a classifier reads at once, so that both processes have some.
    pairs = "{from: [sft, references], samples: 16, min_margin: 0.0}"
    section = f"reward={{pairs: {pairs}, min_accuracy: 0, model: {chains.root}/classifier}}"
    found = []
    for world in (1, 2):

        def stage() -> int:
            return reward_stage.main([chains.recipes[1], section])

        if world == 1:
            assert forks.run(stage) == 0
        else:
            run_in_two(stage, chains.root)
        directory = chains.run_of(1) / "reward"
        assert json.loads((directory / "stage.json").read_text())["processes"] == world
        texts = [(directory / file).read_bytes() for file in ("pairs.jsonl", "samples.jsonl")]
        figures = [json.loads((directory / f).read_text()) for f in ("report/report.json", "reward_model.json")]
        found.append((texts, figures))
        shutil.rmtree(directory)
    assert found[0][0] == found[1][0]
    assert_alike(found[0][1], found[1][1], tolerance=LAST_BITS)
