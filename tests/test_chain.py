"""The stage scripts on a tiny recipe, in one process: what they leave on disk, and how they refuse."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pipeline import eval as eval_stage
from pipeline import ppo as ppo_stage
from pipeline import reward as reward_stage
from pipeline import sft as sft_stage
from pipeline.evaluation.curves import read_events
from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model, load_policy

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = ["a dog runs", "the cat sleeps", "we eat bread", "a bird sings"]
GERMAN = ["ein Hund läuft", "die Katze schläft", "wir essen Brot", "ein Vogel singt"]
RECIPE = """
name: tiny
output_dir: {root}/runs
model:
  from_scratch: {{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 300}}
task: {{name: parallel, data_dir: {root}, source: "{{split}}.en", target: "{{split}}.de", language: de}}
sft: {{num_train_epochs: 2, gradient_checkpointing: false, max_length: 64, learning_rate: 1e-2}}
ppo:
  rewards: [{reward}]
  total_episodes: 16
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  num_generations: 2
  response_length: 8
  learning_rate: 1e-2
  load_best_model_at_end: false  # so few steps seldom improve anything, and the tests look for what they changed
eval: {{metrics: [bleu, chrf], num_samples: 2}}
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe file over four sentence pairs; call it with a reward."""

    def write(reward="bleu", train=GERMAN * 3):
        for split, target in (("train", train), ("validation", GERMAN), ("test", GERMAN)):
            source = ENGLISH * 3 if split == "train" else ENGLISH
            (tmp_path / f"{split}.en").write_text("\n".join(source) + "\n")
            (tmp_path / f"{split}.de").write_text("\n".join(target) + "\n")
        path = tmp_path / "tiny.yaml"
        path.write_text(RECIPE.format(root=tmp_path, reward=reward))
        return str(path)

    return write


@pytest.mark.parametrize("architecture", ["llama", "t5", "bart"])
def test_the_chain_leaves_what_the_readme_says(recipe, tmp_path, capsys, architecture):
    path, overrides = recipe("{name: bleu}, {name: chrf, weight: 0.5}"), []
    if architecture != "llama":  # until it writes more than one text
        overrides = [
            f"model.from_scratch.architecture={architecture}",
            "sft.num_train_epochs=20",
            "ppo.learning_rate=0.1",
        ]
    for stage in (sft_stage, ppo_stage, eval_stage):
        assert stage.main([path, *overrides]) == 0
    run = tmp_path / "runs" / "tiny"
    assert "# torch: " in (run / "recipe.yaml").read_text()
    for stage in ("base", "sft", "ppo", "eval"):
        assert (run / stage / "stage.json").is_file()
    for stage in ("sft", "ppo"):
        assert [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert list((run / stage / "checkpoints").iterdir())
        assert json.loads((run / stage / "stage.json").read_text())["mixed_precision"] == "no"

    assert 0 <= json.loads((run / "sft" / "stage.json").read_text())["unfinished_share"] <= 1
    config = ModelConfig(model_name_or_path="unused")
    sft, policy = load_model(run / "sft", config), load_policy(run / "ppo", run / "sft", config)
    assert any((a != b).any() for a, b in zip(sft.parameters(), policy.parameters(), strict=True))

    report = json.loads((run / "eval" / "report.json").read_text())
    assert set(report["systems"]) == {"base", "sft", "ppo"}
    for system in report["systems"].values():
        assert set(system["metrics"]["bleu"]) == {"value", "low", "high", "signature"}
        assert len((run / "eval" / system["predictions"]).read_text().splitlines()) == len(ENGLISH)
        total = system["rewards"]["bleu"] + 0.5 * system["rewards"]["chrf"]
        assert system["mean_reward"] == pytest.approx(total, abs=1e-6)
        assert system["cumulative_reward"] == pytest.approx(4 * total, abs=1e-5)
    assert report["systems"]["sft"]["kl_to_sft"] == 0
    assert {(c["a"], c["b"], c["metric"]) for c in report["comparisons"]} >= {("sft", "ppo", "bleu")}
    assert "| bleu |" in (run / "eval" / "report.md").read_text()
    page = (run / "eval" / "report.html").read_text()
    assert 'id="tokens"' in page and page.count("<h3>ppo</h3>") == page.count("<h3>sft</h3>") == 1
    assert (
        report["best_of"]["ppo"]["prompts"] == len(ENGLISH) and len(report["best_of"]["ppo"]["curves"]["reward"]) == 4
    )
    cost = {stage["stage"]: stage for stage in report["cost"]}
    assert list(cost) == ["sft", "ppo", "eval"] and cost["ppo"]["episodes"] == 16
    for stage in cost.values():
        assert stage["seconds"] > 0 and stage["tokens"] > 0 and stage["peak_memory_mib"] > 50

    before = (run / "ppo" / "stage.json").read_text()
    assert ppo_stage.main([path, *overrides]) == 0
    assert "ppo: already complete" in capsys.readouterr().err
    assert (run / "ppo" / "stage.json").read_text() == before


def test_the_report_shows_further_systems_other_beams_and_the_control(recipe, tmp_path):
    path = recipe("{name: chrf}")
    for stage in (sft_stage, ppo_stage):
        assert stage.main([path]) == 0
    run = tmp_path / "runs" / "tiny"
    control = ["name=control", f"ppo.sft_model_path={run / 'sft'}", "ppo.shuffle_scores=true"]
    assert ppo_stage.main([path, *control]) == 0
    other = f"eval.systems=[sft, ppo, {{name: other, path: {run / 'sft'}}}]"
    assert eval_stage.main([path, other, "eval.beam_sizes=[2]", "eval.samples_per_prompt=0"]) == 0
    report = json.loads((run / "eval" / "report.json").read_text())
    assert list(report["systems"]) == ["sft", "ppo", "other", "control"]
    assert report["settings"]["control"] == "control"
    assert report["systems"]["other"]["same_weights_as_sft"] and not report["systems"]["ppo"]["same_weights_as_sft"]
    assert any("sft and other have identical weights" in warning for warning in report["warnings"])
    assert {(c["a"], c["b"]) for c in report["comparisons"]} == {
        ("sft", "ppo"),
        ("sft", "other"),
        ("sft", "control"),
        ("control", "ppo"),
    }
    assert any("The control with shuffled scores moved bleu by" in line for line in report["findings"])
    found = [(d["system"], d["decoding"]) for d in report["decodings"]]
    assert found == [(s, d) for s in report["systems"] for d in ("greedy", "beam search, 2 beams")]
    assert report["best_of"] == {}


def test_a_control_is_run_by_the_same_script_and_shown(recipe, tmp_path):
    path = recipe("{name: chrf}")
    for arguments in (["control=true"], ["control=true", "--stage", "control"]):
        assert (sft_stage.main([path, "control=true"]), ppo_stage.main([path, *arguments])) == (0, 0)
    assert eval_stage.main([path, "control=true", "eval.samples_per_prompt=0"]) == 0
    run = tmp_path / "runs" / "tiny"
    logs = [read_events(run / stage / "metrics.jsonl") for stage in ("ppo", "control")]
    ppo, control = ([event for event in log if "objective/scores" in event] for log in logs)
    assert len(control) == len(ppo) and control[0]["objective/scores"] == pytest.approx(ppo[0]["objective/scores"])
    assert control[0]["policy/grad_norm"] != ppo[0]["policy/grad_norm"]
    report = json.loads((run / "eval" / "report.json").read_text())
    assert list(report["systems"]) == ["base", "sft", "ppo", "control"]
    assert {("sft", "control"), ("control", "ppo")} <= {(c["a"], c["b"]) for c in report["comparisons"]}
    assert (report["settings"]["control"], report["settings"]["control_kind"]) == ("control", "shuffled scores")
    assert any("The control with shuffled scores moved bleu by" in line for line in report["findings"])
    assert not any("the reward earned" in line for line in report["findings"])  # four sentences show nothing
    assert [stage["stage"] for stage in report["cost"]] == ["sft", "ppo", "control", "eval"]
    assert report["cost"][2]["tokens"] > 0


def test_the_fair_baselines_are_made_and_shown(recipe, tmp_path, capsys):
    """PPO's rule is the longest answer here, which loss does not choose."""
    rule = ["ppo.metric_for_best_model=eval_length", "sft.num_train_epochs=4", "eval.samples_per_prompt=0"]
    arguments = [recipe("{name: chrf}"), "eval.baselines=[sft_by_metric, sft_longer]", *rule]
    stages = [(sft_stage, "sft"), (ppo_stage, "ppo"), (sft_stage, "sft_by_metric"), (sft_stage, "sft_longer")]
    for script, stage in stages:
        assert script.main([*arguments, "--stage", stage]) == 0
    assert eval_stage.main(arguments) == 0
    run = tmp_path / "runs" / "tiny"
    records = {stage: json.loads((run / stage / "stage.json").read_text()) for _, stage in stages}

    lengths = {int(step): value for step, value in records["sft_by_metric"]["eval_length_by_step"].items()}
    chosen = records["sft_by_metric"]["best_step"]
    assert len(lengths) == 4 and lengths[chosen] == max(lengths.values())
    config = ModelConfig(model_name_or_path="unused")
    saved, checkpoint, last = (
        load_model(folder, config).state_dict()
        for folder in (
            run / "sft_by_metric",
            run / "sft_by_metric" / "checkpoints" / f"checkpoint-{chosen}",
            run / "sft_by_metric" / "checkpoints" / f"checkpoint-{max(lengths)}",
        )
    )
    assert all(torch.equal(saved[name], checkpoint[name]) for name in saved)
    assert chosen == max(lengths) or any((saved[name] != last[name]).any() for name in saved)
    # The same training as SFT's, and the same evaluation as PPO's before its first step.
    sft = json.loads((run / "sft" / "checkpoints" / f"checkpoint-{max(lengths)}" / "trainer_state.json").read_text())
    started_from = max(lengths) if sft["best_global_step"] is None else sft["best_global_step"]
    first = read_events(run / "ppo" / "metrics.jsonl")[0]
    assert lengths[started_from] == first["eval_length"]

    factor = 1 + records["ppo"]["seconds"] / read_events(run / "sft" / "timing.jsonl")[-1]["seconds"]
    steps = records["sft_longer"]["steps"]
    assert steps == pytest.approx(factor * records["sft"]["steps"], abs=1) and steps > records["sft"]["steps"]
    report = json.loads((run / "eval" / "report.json").read_text())
    assert list(report["systems"]) == ["base", "sft", "ppo", "sft_by_metric", "sft_longer"]
    assert {("sft_by_metric", "ppo"), ("sft_longer", "ppo")} <= {(c["a"], c["b"]) for c in report["comparisons"]}
    assert any("(sft_by_metric: bleu" in line and "(sft_longer: bleu" in line for line in report["findings"])
    assert any("SFT's by eval_loss; PPO ended with the last checkpoint" in line for line in report["findings"])
    assert [stage["stage"] for stage in report["cost"]] == ["sft", "ppo", "sft_by_metric", "sft_longer", "eval"]

    before = (run / "sft_by_metric" / "model.safetensors").read_bytes()
    (run / "sft_by_metric" / "stage.json").unlink()  # interrupted while it chose
    assert sft_stage.main([*arguments, "--stage", "sft_by_metric"]) == 0
    assert (run / "sft_by_metric" / "model.safetensors").read_bytes() == before
    assert json.loads((run / "sft_by_metric" / "stage.json").read_text())["best_step"] == chosen


@pytest.mark.parametrize(("variable", "engine"), [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP1")])
def test_a_stage_refuses_engines_that_shard_otherwise_than_it_does(recipe, capsys, monkeypatch, variable, engine):
    """By what accelerate launch puts into the environment, whatever else is missing."""
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    for stage in (reward_stage, ppo_stage, eval_stage):
        assert stage.main([recipe("bleu")]) == 2
        error = capsys.readouterr().err
        name = stage.__name__.rpartition(".")[2]
        assert error.startswith(f"error: {name}: {engine} shards the model over the processes, and ")
        assert "launch it with accelerate_configs/multi_gpu.yaml" in error and error.count("\n") == 1


def test_a_stage_without_its_input_names_the_command(recipe, capsys):
    path = recipe()
    assert ppo_stage.main([path]) == 2
    assert f"run: accelerate launch pipeline/sft.py {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no reward today')", "raised RuntimeError: no reward today"),
        ("return [1.0]", "returned 1 values, expected one for each of 2 completions"),
        ("return [float('nan')] * len(completions)", "expected a finite number or None"),
    ],
)
def test_a_broken_reward_stops_the_chain_before_anything_trains(recipe, tmp_path, monkeypatch, capsys, body, message):
    (tmp_path / "broken_rewards.py").write_text(f"def reward(prompts, completions, **columns):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_rewards", raising=False)
    path = recipe("broken_rewards.reward")
    assert sft_stage.main([path]) == 1
    error = capsys.readouterr().err
    assert "reward 'broken_rewards.reward'" in error and message in error
    assert not (tmp_path / "runs" / "tiny" / "sft" / "metrics.jsonl").exists()
