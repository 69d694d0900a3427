"""Which model `relay generate` and `relay export` take, what it reads, and what is said where there is none."""

from pathlib import Path

import pytest
from demo_run import complete, recipe_with, write_demo

from pipeline.cli.finished_models import NEW_TOKENS, find_model, prompt_from
from pipeline.cli.main import main
from pipeline.stages.directory import RunDirectory

RUN = Path("runs/demo")


@pytest.fixture(autouse=True)
def demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_demo()


def test_a_run_answers_with_its_newest_model_unless_one_is_named():
    recipe = recipe_with()
    complete(recipe, "sft")
    assert find_model(RUN, None).source.name == "sft" and find_model(RUN, None).max_new_tokens == 8
    complete(recipe, "ppo")
    source = find_model(RUN, None).source
    assert (source.name, source.path, source.base) == ("ppo", RUN / "ppo", RUN / "sft")
    assert [find_model(RUN, name).source.path for name in ("base", "sft")] == [RUN / "base", RUN / "sft"]


def test_a_run_that_was_moved_has_its_models_with_it():
    complete(recipe_with(), "sft", "ppo")
    RUN.rename("elsewhere")
    finished = find_model(Path("elsewhere"), None)
    assert (finished.source.path, finished.source.base) == (Path("elsewhere/ppo"), Path("elsewhere/sft"))


def test_the_sft_model_may_be_one_from_elsewhere():
    recipe = recipe_with("ppo.sft_model_path=some/model")
    RunDirectory.of(recipe).save_recipe(recipe)
    assert find_model(RUN, None).source.path == "some/model"


def test_a_folder_with_a_model_needs_no_run():
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    finished = find_model(Path("model"), None)
    assert (finished.source.path, finished.recipe, finished.max_new_tokens) == (Path("model"), None, NEW_TOKENS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate", "nowhere", "Hello"], "generate: 'nowhere' is neither a run directory nor the folder of a model"),
        (["generate", "nowhere", "Hello", "--system", "sft"], "generate: --system sft: 'nowhere' is no run directory"),
        (["generate", "runs/demo", "Hello"], "generate: 'runs/demo' has no finished sft stage; run its recipe first"),
        (["export", "runs/demo", "new", "--system", "ppo"], "export: 'runs/demo' has no finished ppo stage"),
        (["export", "runs/demo", "."], "export: '.' exists; give a folder that is new or empty"),
        (["export", "runs/demo", "recipe.yaml"], "export: 'recipe.yaml' exists"),
        (["export", "model", "new"], "export: 'model' is no run directory"),
    ],
)
def test_a_model_that_is_not_there_is_named_in_one_sentence(words, sentence, capsys):
    recipe = recipe_with()
    RunDirectory.of(recipe).save_recipe(recipe)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}") and not Path("new").exists()


@pytest.mark.parametrize("words", [["--temperature", "0"], ["--max-new-tokens", "0"], ["--system", "best"]])
def test_options_out_of_range_are_named(words, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["generate", "runs/demo", "Hello", *words])
    assert raised.value.code == 2 and words[0] in capsys.readouterr().err


def test_a_source_text_goes_into_the_prompt_of_its_task_and_a_text_into_a_chat_where_there_is_one():
    user = [{"role": "user", "content": "Hi"}]
    assert prompt_from(recipe_with("task.prompt='German: {source} ='"), "Hi", False) == "German: Hi ="
    columns = ["task={name: columns, path: a.jsonl, prompt: q, references: a}", "model.chat_template='{{ messages }}'"]
    assert prompt_from(recipe_with(*columns), "Hi", True) == "Hi"  # a model from scratch stays with plain texts
    chat = recipe_with(*columns, "task.chat=true", "task.system=Be brief.")
    assert prompt_from(chat, "Hi", True) == [{"role": "system", "content": "Be brief."}, *user]
    assert prompt_from(None, "Hi", True) == user and prompt_from(None, "Hi", False) == "Hi"
