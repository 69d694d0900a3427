"""What SFT trains on: augmented examples and best samples; everything else stays that of the data."""

import json

import pytest

from pipeline import sft as sft_stage
from pipeline.models.sampling import Decoding
from pipeline.recipe import RecipeError, load_recipe
from pipeline.recipe.load import recipe_values
from pipeline.rewards import Handling, RewardConfig, build_rewards
from pipeline.rewards.best_of_n import BestOfNSettings, best_samples
from pipeline.stages import training_examples
from pipeline.stages.code_inputs import code_files
from pipeline.stages.directory import RunDirectory
from pipeline.stages.fingerprint import stage_settings
from pipeline.stages.plan import sft_sizes
from pipeline.stages.training_examples import SAMPLES_FILE, with_training_examples
from pipeline.tasks import Task

TEXT = """
name: demo
model: {{{model}}}
task: {{name: parallel, source: "{{split}}.en", target: "{{split}}.de", data_dir: data{task}}}
sft: {{per_device_train_batch_size: 4, num_train_epochs: 1{sft}}}
ppo: {{rewards: [{reward}], response_length: 8, per_device_train_batch_size: 2, gradient_accumulation_steps: 2}}
"""
SCRATCH = "from_scratch: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 300}"


@pytest.fixture
def recipe(tmp_path):
    """Each call loads a recipe over ten sentence pairs; keywords fill the template."""

    def load(task="", sft="", model=SCRATCH, reward="bleu"):
        (tmp_path / "data").mkdir(exist_ok=True)
        for split in ("train", "validation", "test"):
            for side in ("en", "de"):
                (tmp_path / "data" / f"{split}.{side}").write_text("".join(f"{side} word {i}\n" for i in range(10)))
        (tmp_path / "own.py").write_text("def twice(example):\n    return [example, example]\n")
        (tmp_path / "demo.yaml").write_text(TEXT.format(task=task, sft=sft, model=model, reward=reward))
        return load_recipe(tmp_path / "demo.yaml")

    return load


def test_augmented_examples_are_counted_in_the_plan_and_are_of_sft_alone(recipe, taught, tokenizer, examples):
    config = recipe(", augment: [{name: word_dropout, rate: 0.2, copies: 3}, 'own.py:twice']")
    assert "own.py:twice makes what it returns of each of 10" in sft_sizes(config, 1)
    config = recipe(", augment: [{name: word_dropout, rate: 0.2, copies: 3}, source_noise]")
    assert "word_dropout, source_noise makes 8 examples of each of 10" in sft_sizes(config, 1)
    assert "80 examples" in sft_sizes(config, 1) and "20 optimizer steps" in sft_sizes(config, 1)
    rows = examples.select(range(6))
    task = Task(rows, rows, rows)
    grown, figures = with_training_examples(config, RunDirectory.of(config), task, taught(), tokenizer)
    assert figures == {"augmented_examples": 48} == {"augmented_examples": len(grown.train)}
    assert grown.prompts is rows and grown.validation is rows
    assert grown.where("train", [8]).startswith("row 1 of the train split")


def test_the_code_and_the_keys_of_augmentation_are_part_of_what_made_a_stage(recipe):
    config = recipe(", augment: [own.py:twice]")
    assert [file.name for file in code_files(config, "sft").values()] == ["own.py"]
    assert stage_settings(config, "sft")["task.augment.0.name"].endswith("own.py:twice")
    assert not [key for key in stage_settings(recipe(), "sft") if "augment" in key or key == "sft.from"]
    assert recipe_values(recipe())["task"]["augment"] == []


def red(completions, **columns):
    """More of the word is better; none at all for an answer with `two`."""
    return [None if "two" in text else float(text.split().count("red")) for text in completions]


def test_the_best_of_the_samples_that_end_is_learnt(taught, tokenizer, examples):
    """By hand: all samples of a prompt under its seed, of which one is chosen by the reward."""
    rows, seen = examples.select(range(8)), []

    def reward(completions, **columns):
        seen.append(list(completions))
        return red(completions)

    [built] = build_rewards([RewardConfig(f"{__name__}:red")])
    rewards = [type(built)("red", reward)]
    arguments = (Decoding(8), rewards, Handling("skip"), 3)
    samples = best_samples(taught().eval(), tokenizer, rows, BestOfNSettings(samples=4), *arguments)
    [texts] = seen
    assert len(texts) == 32 and 4 <= len(samples) <= 8
    for sample in samples:
        own = texts[4 * sample.row : 4 * sample.row + 4]
        values = [value for value in red(own) if value is not None]
        assert sample.text in own and "two" not in sample.text and sample.reward == red([sample.text])[0]
        assert sample.mean == pytest.approx(sum(values) / len(values)) and sample.reward <= max(values)
    assert sum(sample.reward for sample in samples) > sum(sample.mean for sample in samples)
    again = best_samples(taught().eval(), tokenizer, rows, BestOfNSettings(samples=4, sample_batch_size=3), *arguments)
    assert again == samples
    never = Decoding(8, suppress_tokens=(tokenizer.eos_token_id,))
    assert best_samples(taught().eval(), tokenizer, rows, BestOfNSettings(), never, *arguments[1:]) == []


def test_sft_learns_the_samples_and_an_interrupted_stage_reads_them(
    recipe, taught, taught_directory, tokenizer, examples, capsys
):
    model = f"model_name_or_path: {taught_directory}"
    config = recipe(sft=", from: best_of_n, samples: 3, temperature: 0.9", model=model, reward="own.py:twice")
    config = recipe(sft=", from: best_of_n, samples: 3, temperature: 0.9", model=model, reward="rouge1")
    assert "the best of 3 samples" in sft_sizes(config, 1)
    rows, run = examples.select(range(12)), RunDirectory.of(config)
    task, _ = Task(rows, rows, rows), run.sft.mkdir(parents=True)
    chosen, figures = with_training_examples(config, run, task, taught(), tokenizer)
    lines = [json.loads(line) for line in (run.sft / SAMPLES_FILE).read_text().splitlines()]
    assert chosen.train["completion"][:] == [line["text"] for line in lines]
    assert chosen.train["prompt"][:] == [rows["prompt"][line["row"]] for line in lines]
    assert figures["best_of_n"]["best_reward"] > figures["best_of_n"]["mean_reward"]
    assert figures["best_of_n"]["prompts"] == len(lines) and chosen.prompts is rows
    (run.sft / SAMPLES_FILE).write_text(json.dumps({**lines[0], "text": "kept"}) + "\n")
    resumed, _ = with_training_examples(config, run, task, taught(), tokenizer)
    assert resumed.train["completion"][:] == ["kept"] and "11 prompts are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sft": ", from: best_of_n"}, "one built from scratch has learnt nothing"),
        ({"sft": ", from: best_of_n", "reward": "learned", "model": "model_name_or_path: x"}, "is made after SFT"),
        ({"sft": ", samples: 4"}, "sft.samples: it would do nothing without from: best_of_n"),
        ({"sft": ", from: best"}, "sft.from: expected one of references, best_of_n"),
        ({"sft": ", from: best_of_n, samples: 1", "model": "model_name_or_path: x"}, "at least 2"),
    ],
)
def test_best_of_n_that_cannot_be_is_refused(recipe, keys, words):
    with pytest.raises(RecipeError) as caught:
        recipe(**keys)
    assert words in str(caught.value)


def test_a_recipe_with_both_is_saved_and_read_again(recipe, tmp_path):
    config = recipe(", augment: [source_noise]", ", from: best_of_n, samples: 6", "model_name_or_path: x")
    values = recipe_values(config)
    assert (values["sft"]["from"], values["sft"]["samples"]) == ("best_of_n", 6)
    (tmp_path / "saved.yaml").write_text(json.dumps(values))
    assert load_recipe(tmp_path / "saved.yaml") == config


def test_a_sharded_model_is_not_sampled_from(recipe, taught, tokenizer, examples, monkeypatch):
    monkeypatch.setattr(training_examples, "launched_engine", lambda: "FSDP")
    config = recipe(sft=", from: best_of_n", model="model_name_or_path: x")
    task = Task(examples, examples, examples)
    with pytest.raises(ValueError, match=r"sft.from: best_of_n .*multi_gpu.yaml"):
        with_training_examples(config, RunDirectory.of(config), task, taught(), tokenizer)


def test_the_stage_trains_on_best_samples_that_are_augmented(taught_directory, examples, tmp_path):
    rows = [{key: row[key] for key in ("prompt", "references")} for row in examples.select(range(12))]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"{{name: columns, path: '{tmp_path}/{{split}}.jsonl', prompt: prompt, references: references,"
    text = TEXT.format(
        task="", sft=", from: best_of_n", model=f"model_name_or_path: {taught_directory}", reward="bleu"
    )
    text = "\n".join(
        f"task: {task} augment: [word_dropout]}}" if "task:" in line else line for line in text.split("\n")
    )
    (tmp_path / "demo.yaml").write_text(text + f"output_dir: {tmp_path}/runs\n")
    assert sft_stage.main([str(tmp_path / "demo.yaml"), "sft.bf16=false"]) == 0
    record = json.loads((tmp_path / "runs/demo/sft/stage.json").read_text())
    assert record["augmented_examples"] == 2 * record["best_of_n"]["prompts"] > 0
    assert record["steps"] == -(-record["augmented_examples"] // 4) and 0 <= record["unfinished_share"] <= 1
