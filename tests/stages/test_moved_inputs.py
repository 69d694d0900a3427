"""The same data, models and code under other paths, and settings without effect, make no stage out of date."""

import json
import shutil
from pathlib import Path

import pytest
from demo_run import DATA_FILES, OWN, RECIPE, complete, recipe_with

from pipeline.recipe import Recipe, load_recipe
from pipeline.stages.directory import RunDirectory
from pipeline.stages.fingerprint import setting_differences, stage_status
from pipeline.stages.plan import plan_stages
from pipeline.stages.stage import begin_stage

COLUMNS = "task={name: columns, path: '%s', data_dir: %s, prompt: q, completion: a, train: '%s', validation: '%s', "
COLUMNS += "test: '%s'}"
SPLITS = ("train", "validation", "test")
PARTS = ("train[:80%]", "train[80%:90%]", "train[90%:]")
REWARD = "reward={pairs: {path: '%s', data_dir: %s}}"
LEARNED = "ppo.rewards=[learned]"


def statuses(recipe: Recipe, *stages: str) -> list[str]:
    """The status of stages, those of a recipe without a reward model unless others are named."""
    return [stage_status(RunDirectory.of(recipe), recipe, stage) for stage in stages or OWN]


def differences(recipe: Recipe, stage: str = "sft") -> list[str]:
    """What a stage would be made again for."""
    return setting_differences(RunDirectory.of(recipe), recipe, stage)


def copy_data(folder: str) -> Path:
    """Copy the data of the demo into a folder."""
    Path(folder).mkdir(exist_ok=True)
    for name in DATA_FILES:
        shutil.copy(name, folder)
    return Path(folder)


def write_rows(file: Path, count: int, text: str = "text") -> None:
    """Write rows with columns of questions, answers, and pairs."""
    file.parent.mkdir(exist_ok=True)
    rows = [{"q": f"{text} {n}", "a": "b", "prompt": f"{n}", "chosen": "c", "rejected": "r"} for n in range(count)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_parallel_files_may_lie_elsewhere(tmp_path):
    complete(recipe_with(), *OWN)
    copy_data("two")
    for place in ("task.data_dir=two", f"task.data_dir={tmp_path}/two", "task.source='two/{split}.en'"):
        recipe = recipe_with(*[place], *(["task.target='two/{split}.de'"] if "source" in place else []))
        assert statuses(recipe) == ["complete"] * 3 and differences(recipe, "eval") == [], place
    Path("two/recipe.yaml").write_text(RECIPE.replace("parallel,", 'parallel, data_dir: "{recipe_dir}",'))
    assert statuses(load_recipe("two/recipe.yaml")) == ["complete"] * 3
    assert differences(load_recipe("two/recipe.yaml", ["seed=5"])) == ["seed: 0 -> 5"]
    Path("two/test.de").write_text("edited\n" * 10)
    assert statuses(load_recipe("two/recipe.yaml")) == ["changed"] * 3
    assert differences(load_recipe("two/recipe.yaml")) == ["two/test.de: its contents changed"]


def test_an_interrupted_stage_goes_on_with_its_data_elsewhere():
    begin_stage(RunDirectory.of(recipe_with()), recipe_with(), "sft")
    copy_data("two")
    assert statuses(recipe_with("task.data_dir=two"), "sft") == ["partial"]


@pytest.mark.parametrize("exchange", ["splits", "sides", "keys", "names"])
def test_files_that_change_places_are_other_data(exchange):
    for split in SPLITS:
        Path(f"{split}.en").write_text(f"{split}\n" * 10)
    complete(recipe_with(), "sft")
    two, overrides = copy_data("two"), ["task.data_dir=two"]
    pairs = {"splits": ("train.en", "test.en"), "sides": ("train.en", "train.de")}
    if exchange in pairs:
        for name, other in (pairs[exchange], pairs[exchange][::-1]):
            shutil.copy(name, two / other)
    elif exchange == "keys":
        overrides += ["task.source='{split}.de'", "task.target='{split}.en'"]
    else:
        overrides += ["task.train=test", "task.test=train"]
    assert statuses(recipe_with(*overrides), "sft") == ["changed"]


def test_two_files_do_not_pass_for_one_read_twice():
    for folder in ("en", "de", "both"):
        for split in SPLITS:
            Path(folder).mkdir(exist_ok=True)
            Path(folder, f"{split}.txt").write_text(f"{split} {folder[0]}\n")
    apart = recipe_with("task.source='en/{split}.txt'", "task.target='de/{split}.txt'")
    complete(apart, "sft")
    shutil.copytree("de", "both", dirs_exist_ok=True)
    once = recipe_with("task.source='both/{split}.txt'", "task.target='both/{split}.txt'")
    assert statuses(once, "sft") == ["changed"]


@pytest.mark.parametrize(("path", "parts"), [("{split}.jsonl", SPLITS), ("rows.jsonl", PARTS)])
def test_columns_of_files_may_lie_elsewhere(path, parts):
    names = [path.replace("{split}", split) for split in dict.fromkeys(part.partition("[")[0] for part in parts)]
    for number, name in enumerate(names):
        write_rows(Path("one", name), 10 + number)
    shutil.copytree("one", "two")
    complete(recipe_with(COLUMNS % (path, "one", *parts)), "sft")
    moved = recipe_with(COLUMNS % (path, "two", *parts))
    assert statuses(moved, "sft") == ["complete"] and differences(moved) == []
    other_parts = recipe_with(COLUMNS % (path, "two", *parts[:1], *parts[:0:-1]))
    assert statuses(other_parts, "sft") == ["changed"]
    assert {"task.validation", "task.test"} <= {line.partition(":")[0] for line in differences(other_parts)}
    for name in names:
        shutil.copy(f"two/{name}", f"two/{name}".replace("jsonl", "json"))  # which is read in another way
    assert statuses(recipe_with(COLUMNS % (path.replace("jsonl", "json"), "two", *parts)), "sft") == ["changed"]
    write_rows(Path("two", names[0]), 10, "edited")
    assert statuses(moved, "sft") == ["changed"]
    assert differences(moved) == [f"two/{names[0]}: its contents changed"]


def test_another_data_set_of_the_hub_is_other_data():
    task = "task={name: columns, path: nobody/%s, prompt: q, completion: a}"
    complete(recipe_with(task % "rows"), "sft")
    assert statuses(recipe_with(task % "rows"), "sft") == ["complete"]
    assert differences(recipe_with(task % "others")) == ['task.path: "nobody/rows" -> "nobody/others"']
    write_rows(Path("nobody/train.jsonl"), 3)
    local = recipe_with(
        task % "train.jsonl", *(f"task.{split}={part}" for split, part in zip(SPLITS, PARTS, strict=True))
    )
    assert statuses(local, "sft") == ["changed"]


def test_pairs_may_lie_elsewhere():
    stages = ("sft", "reward", "ppo", "eval")
    for split in SPLITS:
        write_rows(Path("one", f"{split}.jsonl"), 5)
    shutil.copytree("one", "two")
    complete(recipe_with(REWARD % ("{split}.jsonl", "one"), LEARNED), *stages)
    moved = recipe_with(REWARD % ("{split}.jsonl", "two"), LEARNED)
    assert statuses(moved, *stages) == ["complete"] * 4 and differences(moved, "eval") == []
    write_rows(Path("two/train.jsonl"), 5, "edited")
    assert statuses(moved, "sft", "reward") == ["complete", "changed"]
    assert differences(moved, "reward") == ["two/train.jsonl: its contents changed"]
    plan = plan_stages(moved, only=None, start=None, force=False)
    assert [planned.action for planned in plan] == ["skip", "run", "run", "run"]
    assert plan[2].reason.endswith("was made: reward: made again") and plan[2].replaces
    hub = recipe_with(REWARD % ("nobody/pairs", "."), LEARNED)
    assert statuses(hub, "reward") == ["changed"]
    complete(hub, "reward")
    assert statuses(recipe_with(REWARD % ("nobody/others", "."), LEARNED), "reward") == ["changed"]


def test_code_may_lie_elsewhere_once_a_stage_is_finished():
    for folder in ("one", "two"):
        Path(folder, "measure").mkdir(parents=True)
        Path(folder, "own.py").write_text("from words import WORDS\ndef hits(completions, **_): return [0.0]\n")
        Path(folder, "words.py").write_text("WORDS = ['a']\n")
        Path(folder, "measure/measure.py").write_text("import evaluate\n")

    def recipe(folder: str, function: str = "hits") -> Recipe:
        reward, metric = f"{folder}/own.py:{function}", f"evaluate:./{folder}/measure"
        return recipe_with(f"ppo.rewards=['{reward}']", f"eval.metrics=['{metric}']")

    complete(recipe("one"), *OWN)
    assert statuses(recipe("two")) == ["complete"] * 3 and differences(recipe("two"), "eval") == []
    assert statuses(recipe("two", "misses")) == ["complete", "changed", "changed"]
    Path("two/measure/measure.py").write_text("import evaluate\n# edited\n")
    assert statuses(recipe("two")) == ["complete", "complete", "changed"]
    Path("two/words.py").write_text("WORDS = ['b']\n")
    assert differences(recipe("two"), "ppo") == ["words.py: its contents changed"]
    begin_stage(RunDirectory.of(recipe("two")), recipe("two"), "ppo")
    shutil.copytree("two", "three")
    assert statuses(recipe("three"), "ppo") == ["changed"]  # its checkpoints name the reward


def test_models_may_be_named_by_another_path(tmp_path):
    Path("base").mkdir()
    Path("base/config.json").write_text("{}")
    shutil.copytree("base", "sft")
    Path("sft/stage.json").write_text("{}")

    def recipe(base: object, sft: object) -> Recipe:
        return recipe_with(f"model={{model_name_or_path: {base}}}", f"ppo.sft_model_path={sft}")

    complete(recipe("base", "sft"), "ppo", "eval")
    for names in ((tmp_path / "base", "sft"), ("./base", tmp_path / "sft"), (tmp_path / "base", tmp_path / "sft")):
        assert statuses(recipe(*names), "ppo", "eval") == ["complete"] * 2
        assert differences(recipe(*names), "eval") == []
    shutil.copytree("sft", "other")
    Path("other/stage.json").write_text('{"seed": 1}')
    assert statuses(recipe("base", "other"), "ppo") == ["changed"]
    assert 'ppo.sft_model_path: "sft" -> "other"' in differences(recipe("base", "other"), "ppo")


def test_one_model_under_two_keys_may_be_named_twice(tmp_path):
    Path("base").mkdir()
    Path("base/config.json").write_text("{}")
    model = "model={model_name_or_path: base}"
    complete(recipe_with(model, "ppo.sft_model_path=base"), "ppo")
    recipe = recipe_with(model, f"ppo.sft_model_path={tmp_path}/base")
    assert statuses(recipe, "ppo") == ["complete"] and differences(recipe, "ppo") == []


def test_settings_without_effect_make_nothing_out_of_date():
    keys = ["sft.report_to=wandb", "sft.run_name=a", "sft.dataloader_num_workers=2", "sft.disable_tqdm=true"]
    keys += ["sft.logging_steps=5", "ppo.logging_steps=5", "ppo.report_to=[tensorboard]", "ppo.run_name=b"]
    complete(recipe_with(), *OWN)
    assert statuses(recipe_with(*keys)) == ["complete"] * 3 and differences(recipe_with(*keys), "eval") == []
    complete(recipe_with(*keys), *OWN)
    assert statuses(recipe_with()) == ["complete"] * 3
    by_steps = ["sft.eval_strategy=steps", "sft.load_best_model_at_end=false"]  # evaluated as often as it is logged
    complete(recipe_with(*by_steps), "sft")
    assert differences(recipe_with(*by_steps, "sft.logging_steps=5")) == ["sft.logging_steps: (not set) -> 5.0"]
    complete(recipe_with(*by_steps, "sft.eval_steps=10"), "sft")
    assert statuses(recipe_with(*by_steps, "sft.eval_steps=10", "sft.logging_steps=5"), "sft") == ["complete"]
