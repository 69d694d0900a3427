"""A user's code: it is found before Relay's own files, by each form of its name, and all its files are listed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline.recipe import RecipeError, load_checked_recipe, load_recipe
from pipeline.rewards import RewardConfig, build_rewards
from pipeline.runtime import user_code
from pipeline.runtime.user_code import (
    UserCodeError,
    load_user_module,
    load_user_object,
    search_user_code,
    user_code_files,
)
from tests.faults.tiny_run import tiny_recipe

SCRIPTS = Path(pipeline.__file__).parent
REWARD = "def {name}(completions, **columns):\n    return [{value} for text in completions]\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A current folder of its own, and a path and modules that are put back."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(user_code, "_folders", [])
    before = set(sys.modules)
    yield tmp_path / "here"
    for name in set(sys.modules) - before:
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("beside", ["the recipe", "the current folder"])
def test_modules_of_the_user_win_over_files_of_relay_of_the_same_name(folder, tmp_path, beside):
    code = folder if beside == "the current folder" else tmp_path / "recipes"
    code.mkdir(exist_ok=True)
    write(code / "rewards.py", REWARD.format(name="brevity", value="-len(text)"))
    write(code / "metrics" / "__init__.py", "")
    write(
        code / "metrics" / "mine.py",
        "from pipeline.metrics import load_metric\n\ndef words(): return load_metric('token_f1')\n",
    )
    write(code / "tasks.py", "from pipeline.tasks.parallel import Config, files, load\n")
    recipe = tiny_recipe(
        tmp_path / "recipes" if beside == "the recipe" else folder,
        ppo={"rewards": ["rewards.brevity"], "gradient_accumulation_steps": 1},
        task={"name": "tasks.py", "data_dir": str(code)},
        eval={"metrics": ["metrics.mine.words"]},
    )
    for script, code in (("run.py", 0), ("eval.py", 2)):
        command = [sys.executable, SCRIPTS / script, recipe, *(["--dry-run"] if script == "run.py" else [])]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == code and "cannot import" not in done.stderr, done.stderr
    assert "no finished sft stage" in done.stderr  # of eval.py: the recipe itself is right


def test_every_form_of_a_name(folder):
    write(
        folder / "of_mine" / "sub" / "scores.py",
        REWARD.format(name="one", value=1) + "class Kind: two = staticmethod(one)\n",
    )
    write(folder / "of_mine" / "file.py", "from beside import one\n")
    write(folder / "of_mine" / "beside.py", REWARD.format(name="one", value=3))
    search_user_code(folder)
    for name in ("of_mine.sub.scores.one", "of_mine.sub.scores:one", "of_mine.sub.scores:Kind.two"):
        assert load_user_object(name)(["a"]) == [1]
    assert load_user_object("of_mine/file.py:one")(["a"]) == [3]
    assert load_user_object(f"{folder}/of_mine/file.py:one") is load_user_object("of_mine/file.py:one")
    assert load_user_module("of_mine/sub/scores.py").one(["a", "b"]) == [1, 1]
    [reward] = build_rewards([RewardConfig("of_mine/file.py:one")])
    assert reward.function(["a"]) == [3]


def test_a_file_is_found_from_another_folder(folder, tmp_path_factory):
    """As `relay compare` asks for what the recipe of a run named."""
    write(folder / "elsewhere" / "scores_of_a_run.py", REWARD.format(name="one", value=4))
    os.chdir(tmp_path_factory.mktemp("other"))
    search_user_code(Path.cwd(), folder)
    assert load_user_object("elsewhere/scores_of_a_run.py:one")(["a"]) == [4]
    with pytest.raises(UserCodeError, match=r"nothing\.py"):
        load_user_object("elsewhere/nothing.py:one")


def test_the_path_of_a_file_is_that_from_the_recipe(folder, tmp_path):
    write(tmp_path / "recipes" / "my_scores.py", REWARD.format(name="one", value=1) + "def two(): return 2\n")
    recipe = tiny_recipe(tmp_path / "recipes", ppo={"rewards": ["my_scores.py:one"], "gradient_accumulation_steps": 1})
    loaded = load_checked_recipe(recipe, [], 1)
    assert loaded.ppo.rewards[0].name == f"{tmp_path}/recipes/my_scores.py:one"
    os.chdir(tmp_path)
    assert load_checked_recipe(recipe, [], 1).ppo.rewards[0].name == "recipes/my_scores.py:one"
    again = load_recipe(recipe, ["ppo.rewards=[recipes/my_scores.py:one]"])  # as a saved recipe has it
    assert again.ppo.rewards[0].name == "recipes/my_scores.py:one"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.rewards=[my_scores.brevty]", ["ppo.rewards", "my_scores.brevty", "did you mean 'brevity'"]),
        ("ppo.rewards=[my_scores.py]", ["ppo.rewards", "path/file.py:thing"]),
        ("ppo.rewards=[other.py:brevity]", ["ppo.rewards", "other.py", "No such file"]),
        ("ppo.rewards=[chfr]", ["ppo.rewards", "did you mean 'chrf'"]),
        ("ppo.rewards=[learnt]", ["ppo.rewards", "did you mean 'learned'"]),
        ("ppo.kl_estimator=k33", ["ppo.kl_estimator", "did you mean 'k3'"]),
        ("eval.metrics=[my_scores:brevty]", ["eval.metrics", "did you mean 'brevity'"]),
        ("eval.metrics=[blue]", ["eval.metrics", "did you mean 'bleu'"]),
        ("task.name=tasks/none.py", ["task.name", "tasks/none.py", "No such file"]),
    ],
)
def test_names_that_are_wrong(folder, override, words):
    write(folder / "my_scores.py", REWARD.format(name="brevity", value=1))
    with pytest.raises(RecipeError) as refused:
        load_checked_recipe(tiny_recipe(folder, ppo={"gradient_accumulation_steps": 1}), [override], 1)
    assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)


def test_a_file_in_the_current_folder_replaces_no_library(folder):
    write(folder / "colorsys.py", "raise RuntimeError('the library was meant')\n")
    write(folder / "quiet_code.py", REWARD.format(name="one", value=1))
    search_user_code(folder)
    load_user_object("quiet_code.one")
    sys.modules.pop("colorsys", None)
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0)
    with pytest.raises(UserCodeError, match="RuntimeError: the library was meant"):
        sys.modules.pop("colorsys")
        load_user_object("colorsys.one")  # asked for by name, it is the user's


def test_all_files_of_a_users_code(folder):
    write(folder / "words_reward.py", "import json, numpy, pipeline.metrics\nfrom helpers.text import clean\n")
    write(folder / "helpers" / "__init__.py", "")
    write(folder / "helpers" / "text.py", "from . import tables\ndef clean():\n    from other_helper import x\n")
    write(folder / "helpers" / "tables.py", "import words_reward  # in a circle\n")
    write(folder / "helpers" / "unused.py", "")
    write(folder / "other_helper.py", "def broken(:\n")
    search_user_code(folder)
    expected = {"words_reward.py", "other_helper.py"} | {f"helpers/{n}.py" for n in ("__init__", "text", "tables")}
    for name in ("words_reward.score", "words_reward:score", "words_reward.py:score", f"{folder}/words_reward.py:x"):
        assert set(user_code_files([name])) == expected, name
    assert set(user_code_files(["helpers.unused.x"])) == {"helpers/__init__.py", "helpers/unused.py"}
    assert user_code_files(["pipeline.tasks.parallel", "numpy.mean", "json.dumps", "no_such.thing"]) == {}
