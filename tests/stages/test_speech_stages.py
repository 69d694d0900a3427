"""Speech as the stages see it: clips instead of sound, what is left out and what is refused; the whole chain."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from speech_toys import tone, write_data, write_wav

import pipeline
from pipeline.models.loading import load_tokenizer
from pipeline.models.speech import Clip
from pipeline.recipe import load_recipe
from pipeline.recipe.checks import check_recipe
from pipeline.stages.directory import RunDirectory
from pipeline.stages.task import load_recipe_task
from pipeline.tasks import TaskError

ROOT = Path(pipeline.__file__).resolve().parent.parent
RECIPE = """\
name: spoken
output_dir: {folder}
model: {{{model}, lora_r: 2, lora_target_modules: decoder-linear, dtype: float32}}
task: {{name: speech, path: "{{split}}.jsonl", data_dir: {folder}, language: en}}
sft: {{num_train_epochs: 1, per_device_train_batch_size: 4, bf16: false}}
ppo: {{rewards: [wer, {{name: cer, weight: 0.5}}], response_length: 8, per_device_train_batch_size: 4,
      gradient_accumulation_steps: 1, total_episodes: 8, num_generations: 2, bf16: false}}
eval: {{metrics: [wer, cer], samples_per_prompt: 2, max_new_tokens: 8, n_bootstrap: 50}}
"""
SCRATCH = (
    "from_scratch: {architecture: whisper, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "vocab_size: 290, max_position_embeddings: 32, num_mel_bins: 8, max_seconds: 1}"
)


@pytest.fixture
def folder(tmp_path):
    return write_data(tmp_path / "data", train=6, validation=3, test=4)


@pytest.fixture
def recipe(folder, whisper_directory):
    """Each call gives the recipe with these overrides, over the tiny model that hears."""

    def make(*overrides: str, model: str = f"model_name_or_path: {whisper_directory}"):
        (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, model=model))
        return load_recipe(folder / "recipe.yaml", overrides)

    return make


def load(recipe):
    return load_recipe_task(recipe, RunDirectory.of(recipe))[1]


def add_row(folder, **row) -> None:
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"audio": "train/0.wav", "text": "one", "speaker": "x", **row}) + "\n")


def test_every_row_has_its_clip_and_language(recipe):
    task = load(recipe())
    row = task.train[0]
    assert row["clip"]["language"] == "en" and task.sound is None
    assert "sound" not in row and "spoken_language" not in row
    clip = {key: value for key, value in row["clip"].items() if key != "language"}
    assert np.isfinite(Clip(**clip).features()).all()


def test_a_model_from_scratch_is_told_the_languages_of_the_data(recipe):
    loaded = recipe(model=SCRATCH)
    assert load(loaded).train[0]["clip"]["language"] == "en"
    assert "<|en|>" in load_tokenizer(RunDirectory.of(loaded).base, loaded.model).get_vocab()
    assert load(recipe("task.language=null", model=SCRATCH)).train[0]["clip"]["language"] is None


def test_clips_beyond_the_window_are_left_out_and_counted(recipe, folder):
    write_wav(folder / "train/long.wav", tone(["one"] * 8))
    add_row(folder, audio="train/long.wav")
    task = load(recipe())
    assert len(task.train) == 6 and len(task.left_out) == 1
    assert "line 7" in task.left_out[0] and "has 1.4 s, and the model hears 1 s" in task.left_out[0]


@pytest.mark.parametrize("kind", ["broken", "silent", "rate"])
def test_a_clip_that_cannot_be_used_is_refused_or_left_out(recipe, folder, kind):
    path = write_wav(folder / "train/bad.wav", tone(["one"]) * (kind != "silent"))
    data = bytearray(path.read_bytes())
    if kind == "rate":
        data[24:28], data[28:32] = (7).to_bytes(4, "little"), (14).to_bytes(4, "little")
    path.write_bytes(data[:30] if kind == "broken" else data)
    add_row(folder, audio="train/bad.wav")
    words = {"broken": "cannot be decoded", "silent": "is silent", "rate": "has the sampling rate 7"}[kind]
    with pytest.raises(TaskError, match=rf"the clip 'train/bad.wav' {words}.*line 7.*task.skip_broken_rows: true"):
        load(recipe())
    task = load(recipe("task.skip_broken_rows=true"))
    assert len(task.train) == 6 and len(task.left_out) == 1 and words in task.left_out[0]


def test_languages_are_checked_by_row(recipe, folder):
    with pytest.raises(TaskError, match=r"task.language: 'dee' is no language of this model; did you mean 'de'\?"):
        load(recipe("task.language=dee"))
    with pytest.raises(TaskError, match=r"task.language: missing, and this model is told"):
        load(recipe("task.language=null"))
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "locale": "de" if number else "en"}) for number, row in enumerate(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    add_row(folder, locale="xx")
    by_row = ("task.language=null", "task.language_column=locale")
    with pytest.raises(TaskError, match=r"'xx' is no language of this model.*line 7"):
        load(recipe(*by_row))
    task = load(recipe(*by_row, "task.skip_broken_rows=true"))
    assert [clip["language"] for clip in task.train["clip"]] == ["en", *["de"] * 5]


def test_speech_needs_a_model_that_hears_and_the_other_way_round(recipe, base_directory):
    with pytest.raises(ValueError, match=r"task.name: speech needs a model that hears"):
        check_recipe(recipe("model.lora_target_modules=all-linear", model=f"model_name_or_path: {base_directory}"))
    with pytest.raises(ValueError, match=r"task.name: the model hears sound, found 'columns'; use speech"):
        check_recipe(recipe("task.name=columns", "task.prompt=audio", "task.completion=text"))


def test_what_speech_cannot_have_is_refused(recipe):
    with pytest.raises(ValueError, match=r"eval.max_new_tokens: the decoder writes at most 60 tokens"):
        check_recipe(recipe("eval.max_new_tokens=61"))
    with pytest.raises(ValueError, match=r"ppo.response_length: the decoder writes at most 60 tokens"):
        check_recipe(recipe("ppo.response_length=61"))
    pairs = "reward.pairs={path: a.jsonl, prompt: p, chosen: c, rejected: r}"
    with pytest.raises(ValueError, match=r"reward: a reward model reads the prompt as text"):
        check_recipe(recipe(pairs, "ppo.rewards=[wer]"))


def test_the_chain_runs_in_two_processes_and_reports(recipe, folder):
    recipe(model=SCRATCH)
    command = [sys.executable, str(ROOT / "pipeline/run.py"), str(folder / "recipe.yaml"), "task.cluster=speaker"]
    done = subprocess.run([*command, "--", "--num_processes", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((folder / "spoken/eval/report.json").read_text())
    assert {"wer", "cer"} <= set(report["systems"]["ppo"]["metrics"]) and report["settings"]["cluster"] == "speaker"
    errors = report["recognition"]["ppo"]
    assert set(errors["groups"]) == {"speaker0", "speaker1"} and len(errors["oracle"]) == 2
    text = (folder / "spoken/eval/report.md").read_text()
    assert "Word errors by kind" in text and "| sft | 1 - wer |" in text and "| ppo | wer |" not in text
    assert "| copied from the prompt | - |" in text and report["systems"]["ppo"]["texts"]["novel_2"] is None
    assert 'id="errors"' in (folder / "spoken/eval/report.html").read_text()
    lines = map(json.loads, (folder / "spoken/ppo/metrics.jsonl").read_text().splitlines())
    assert next(line["objective/kl"] for line in lines if "objective/kl" in line) == 0
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
