"""Every recipe in recipes/ is read, and those about columns fit the data they describe."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from speech_toys import write_data

from pipeline import run
from pipeline.metrics import load_metric
from pipeline.recipe import load_recipe
from pipeline.rewards import build_rewards
from pipeline.tasks import SPLITS, load_task, preferences

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
ROWS = {
    "scitldr": {"abstract": "We study cats.", "summaries": ["Cats, studied.", "On cats."], "title": "Cats"},
    "xquad": {"context": "The cat sat on the mat.", "question": "Who sat?", "answers": ["The cat", "the cat"]},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_named_like_its_file(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem


# Of recipes with recorded results: what PPO trained with, whatever the defaults are today.
RECORDED = {
    "quickstart": (5e-4, 5e-4, 0.1, 0.01, 32),
    "quickstart_t5": (1.5e-3, 1.5e-3, 0.1, 0.01, 32),
    "quickstart_reward_model": (5e-4, 5e-4, 0.1, 0.1, 32),
    "multi30k_en_de": (2e-3, None, 0.0, 0.01, 48),
    "multi30k_encoder_decoder": (2e-3, None, 0.0, 0.01, 48),
}


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in RECORDED], ids=lambda path: path.stem)
def test_a_recorded_recipe_does_not_follow_new_defaults(path):
    recipe, (rate, value_rate, vf_coef, kl_coef, length) = load_recipe(path), RECORDED[path.stem]
    ppo = recipe.ppo
    assert (ppo.policy_learning_rate, ppo.value_loss_weight, ppo.kl_coef) == (rate, vf_coef, kl_coef)
    assert value_rate in (None, ppo.value_function_learning_rate)
    assert (ppo.num_ppo_epochs, ppo.lam, ppo.adam_epsilon, ppo.response_length) == (2, 1.0, 1e-5, length)
    assert (ppo.score_scaling, ppo.dual_clip, ppo.missing_eos_penalty, ppo.score_clip) == ("none", None, None, None)
    assert recipe.model.dtype == "float32"


@pytest.mark.parametrize("name", ROWS)
def test_a_columns_recipe_fits_its_data(name, tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(ROWS[name]) + "\n")
    path = next(path for path in RECIPES if path.stem == name)
    recipe = load_recipe(path, [f"task.data_dir={tmp_path}"])
    example = load_task(recipe.task.name, recipe.task.config).train[0]
    references = ROWS[name].get("summaries") or ROWS[name]["answers"]
    assert example["references"] == references and example["completion"] == references[0]
    assert "{" not in example["prompt"]
    assert all(
        str(value) in example["prompt"] for key, value in ROWS[name].items() if key in recipe.task.config.prompt
    )


def test_the_overrides_in_the_comments_of_recipes_are_read():
    """Lines of a comment that hold nothing but overrides, perhaps after a word and a colon."""
    read = 0
    for path in RECIPES:
        lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#  ")]
        lines = [re.sub(r"^[\w+]+:\s+", "", line) for line in lines]
        lines = [line for line in lines if re.match(r"'?[a-z]+[\w.]*=", line)]
        for words in [shlex.split(" ".join(lines))] if path.stem == "xquad" else map(shlex.split, lines):
            recipe, read = load_recipe(path, words), read + len(words)
            assert path.stem != "xquad" or recipe.task.config.references == "{answers[text]}"
    assert read >= 10


@pytest.fixture
def chat_model(taught_directory, tokenizer, tmp_path):
    """Return the directory of a model with a chat template."""
    model = shutil.copytree(taught_directory, tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(model)
    return model


def plan(name, model, tmp_path, capsys, **overrides):
    """Return what the dry run of a recipe prints with another model and the data in `tmp_path`."""
    overrides = {"model.model_name_or_path": model, "output_dir": tmp_path / "runs", **overrides}
    path = next(path for path in RECIPES if path.stem == name)
    code = run.main([str(path), *(f"{key}={value}" for key, value in overrides.items()), "--dry-run"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def write_rows(folder, *names, **row):
    for name in names:
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")


TURNS = [{"role": "user", "content": "say north"}]


def test_the_minimal_dialogue_recipe_is_planned_with_a_chat_model(chat_model, tmp_path, capsys):
    write_rows(tmp_path, *SPLITS, messages=TURNS, responses=["red", "blue two one"])
    overrides = {"ppo.sft_model_path": chat_model, "task.data_dir": tmp_path}
    shown = plan("smollm2_dialogue", chat_model, tmp_path, capsys, **overrides)
    assert "learning_rate 3e-05 (LoRA)" in shown and "response_length 8, by the length of the references" in shown


def test_the_dialogue_recipe_learns_a_reward_from_its_pairs(chat_model, tmp_path, capsys):
    write_rows(tmp_path, *SPLITS, messages=TURNS, responses=["red", "blue two one"])
    write_rows(tmp_path, "pairs_train", "pairs_test", messages=TURNS, chosen="red", rejected="blue")
    overrides = {"task.data_dir": tmp_path, "reward.pairs.data_dir": tmp_path}
    assert "reward  run" in plan("dialogue", chat_model, tmp_path, capsys, **overrides)
    recipe = load_recipe(RECIPES[0].with_name("dialogue.yaml"), [f"reward.pairs.data_dir={tmp_path}"])
    pairs = preferences.load(recipe.reward.pairs, preferences.PromptForm(chat=True))
    assert pairs.train[0] == preferences.Preference(TURNS, "red", "blue", None)
    rewards = {reward.name for reward in recipe.ppo.rewards}
    assert rewards == {"learned"} and rewards.isdisjoint(metric.name for metric in recipe.eval.metrics)


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_of_a_chat_model_is_planned_with_its_data(name, chat_model, tmp_path, capsys):
    write_rows(tmp_path, *SPLITS, **ROWS[name])
    shown = plan(name, chat_model, tmp_path, capsys, **{"task.data_dir": tmp_path})
    assert "turn of a user in a chat" in shown and "50 steps" in shown


GSM8K = [
    ("A farm has 3 cows and 4 hens. How many animals?", "There are 3 + 4 = <<3+4=7>>7 animals.\n#### 7"),
    ("Half of 2,400?", "Half of 2,400 is 1,200.\n#### 1,200"),
    ("What is 2 less than 1.5?", "1.5 - 2 = -0.5\n#### -0.5"),
]


def test_the_gsm8k_recipe_on_three_local_rows(chat_model, tmp_path, capsys):
    for split in ("train", "test"):
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in GSM8K]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    local = {"task.path": tmp_path / "{split}.jsonl", "task.subset": "null", "task.train": "train[:2]"}
    local |= {"task.validation": "train[2:]", "ppo.per_device_train_batch_size": 2, "ppo.response_length": 16}
    assert "100 steps" not in plan("gsm8k", chat_model, tmp_path, capsys, **local)
    recipe = load_recipe(RECIPES[0].with_name("gsm8k.yaml"), [f"{key}={value}" for key, value in local.items()])
    task = load_task(recipe.task.name, recipe.task.config)
    assert (len(task.train), len(task.validation), len(task.test)) == (2, 1, 3)
    completions = ["So it is 6, no, 7.", "$1200.00", "It is 5, or .5"]
    [reward] = build_rewards(recipe.ppo.rewards)
    assert reward.function(completions=completions, references=task.test["references"]) == [1.0, 1.0, 0.0]
    chats = [[{"role": "assistant", "content": text}] for text in ("7", "no number", "-0.50")]
    assert reward.function(completions=chats, references=task.test["references"]) == [1.0, 0.0, 1.0]
    metric = load_metric(recipe.eval.metrics[0].name)
    score = metric.corpus_score(completions, task.test["references"], n_bootstrap=0)
    assert (metric.name, score.value) == ("last_number", pytest.approx(200 / 3))


@pytest.mark.parametrize("name", ["quickstart", "quickstart_t5", "quickstart_reward_model"])
def test_a_quickstart_finds_its_sentences_from_any_folder(name, tmp_path, monkeypatch):
    path = next(path for path in RECIPES if path.stem == name)
    monkeypatch.chdir(path.parent.parent)
    beside = load_recipe(path, ["task.max_train_examples=3"])
    assert beside == load_recipe(f"recipes/{name}.yaml", ["task.max_train_examples=3"])  # the same files to a stage
    assert beside.task.config.data_dir == "recipes/phrasebook"
    monkeypatch.chdir(tmp_path)
    away = load_recipe(path, ["task.max_train_examples=3"])
    assert away.task.config.data_dir == str(path.parent / "phrasebook")
    task = load_task(away.task.name, away.task.config)
    assert task.train["source"][0] == "At midday the lazy singer bought a key in an old bakery."
    pairs = load_recipe(path, ["reward={pairs: {path: a.jsonl, data_dir: '{recipe_dir}/x'}}"]).reward.pairs
    assert pairs.data_dir == str(path.parent / "x")
    assert (len(task.train), len(task.validation), len(task.test), task.language) == (3, 256, 2000, "de")


def test_the_whisper_recipe_is_planned_with_a_model_that_hears(taught_whisper_directory, tmp_path, capsys):
    data = write_data(tmp_path / "data")
    for split in SPLITS:
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        renamed = [{"path": r["audio"], "sentence": r["text"], "client_id": r["speaker"]} for r in rows]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    overrides = {"task.data_dir": data, "task.audio": "path"}
    shown = plan("whisper_tiny", taught_whisper_directory, tmp_path, capsys, **overrides)
    assert "sft" in shown and "response_length 8, by the length of the references" in shown


def test_the_digits_recipe_is_planned_with_its_data(tmp_path, capsys):
    data = write_data(tmp_path / "data")
    path = next(path for path in RECIPES if path.stem == "digits_whisper")
    code = run.main([str(path), f"task.data_dir={data}", f"output_dir={tmp_path / 'runs'}", "--dry-run"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "96 steps" in shown.out and "control" in shown.out
