"""The commands of `relay` that need no training: recipes, check, report, and what is said of wrong words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from demo_run import OWN, complete, write_demo

from pipeline.cli import report_command
from pipeline.cli.main import COMMANDS, main
from pipeline.cli.recipe_files import RECIPES, recipe_files, recipe_path
from pipeline.evaluation.run_files import load_run
from pipeline.evaluation.runs import compare_runs
from pipeline.recipe import load_recipe, split_recipe_argument
from pipeline.stages import plan
from pipeline.stages.directory import RunDirectory
from pipeline.tasks import load_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert raised.value.code == 0 and f"usage: relay {command}" in text
    assert "example" in text and text.count(f"relay {command} ") > 1


def test_help_lists_the_commands_and_wrong_words_are_named(capsys):
    assert main(["--help"]) == main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS) and "relay run quickstart.yaml" in text
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("relay ")
    assert main(["runn", "x.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no command 'runn'") and "'run'" in error and "relay --help" in error


@pytest.mark.parametrize(
    "words",
    [
        ["run", "quickstart", "--only", "sft", "--only", "eval"],
        ["check", "quickstart", "--seeds", "0,1", "--seeds", "2,3"],
        ["init", "--data", "a.csv", "--data", "b.csv"],
        ["generate", "run", "--seed", "1", "--seed", "0"],
        ["compare", "a", "b", "--output", "c", "--output", "d"],
    ],
)
def test_an_option_given_twice_is_refused(words, capsys):
    with pytest.raises(SystemExit) as raised:
        main(words)
    option = next(word for word in words if word.startswith("--"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert raised.value.code == 2 and line == f"relay {words[0]}: error: argument {option}: given twice; give it once"


def test_help_loads_no_library_that_takes_seconds():
    code = (
        "import sys; from pipeline.cli.main import main; main(['recipes', 'list']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "quickstart " in done.stdout, done.stderr


def test_the_installed_recipes_are_those_of_the_repository(capsys):
    assert recipe_files() == {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
    assert RECIPES.resolve() == ROOT / "recipes"
    assert main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(recipe_files())
    assert all(len(line.split()) > 5 for line in lines)
    assert main(["recipes", "show", "scitldr"]) == 0
    assert capsys.readouterr().out == (ROOT / "recipes" / "scitldr.yaml").read_text()


def test_a_copied_recipe_reads_the_data_that_is_copied_with_it(capsys):
    assert main(["recipes", "copy", "quickstart"]) == 0
    assert capsys.readouterr().out.split() == ["quickstart.yaml", "phrasebook"]
    recipe = load_recipe("quickstart.yaml", ["task.max_train_examples=3"])
    assert Path(recipe.task.config.data_dir) == Path("phrasebook")
    assert len(load_task(recipe.task.name, recipe.task.config).train) == 3
    Path("phrasebook/train.en").write_text("mine")
    assert main(["recipes", "copy", "quickstart_t5", "--to", "."]) == 0  # shares the folder
    assert Path("phrasebook/train.en").read_text() == "mine"
    assert main(["recipes", "copy", "quickstart"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: recipes copy: quickstart.yaml exists") and "--to" in error
    assert main(["recipes", "copy", "xquad", "--to", "deep/er"]) == 0 and Path("deep/er/xquad.yaml").is_file()
    assert main(["recipes", "copy", "digits_whisper", "--to", "deep"]) == 0
    comment = Path("deep/digits_whisper.yaml").read_text().partition("name:")[0]
    assert "python digit_strings.py" in comment and Path("deep/digit_strings.py").is_file()
    assert "relay run digits_whisper.yaml" in comment and "recipes/" not in comment
    assert main(["recipes", "copy", "gsm8k", "--to", "math"]) == 0  # its reward comes with it
    assert sorted(path.name for path in Path("math").iterdir()) == ["gsm8k.yaml", "last_number.py"]
    assert main(["recipes", "copy", "digits_whisper", "--to", "sound"]) == 0  # and what makes its data
    assert sorted(path.name for path in Path("sound").iterdir()) == ["digit_strings.py", "digits_whisper.yaml"]


def test_an_unknown_recipe_is_named_with_the_one_that_may_be_meant(capsys):
    for words in (["show", "quikstart"], ["copy", "quikstart"]):
        assert main(["recipes", *words]) == 2
        assert "no recipe 'quikstart'" in (error := capsys.readouterr().err) and "'quickstart'" in error


def test_a_recipe_is_found_by_file_before_name():
    assert recipe_path("quickstart") == ROOT / "recipes" / "quickstart.yaml"
    assert recipe_path("mine.yaml") == Path("mine.yaml")
    Path("quickstart").mkdir()
    assert recipe_path("quickstart") == ROOT / "recipes" / "quickstart.yaml"
    Path("quickstart").rmdir()
    Path("quickstart").write_text("")
    assert recipe_path("quickstart") == Path("quickstart")


def test_check_prints_the_plan_and_writes_nothing(folder, capsys):
    write_demo()
    before = sorted(folder.iterdir())
    assert main(["check", "recipe.yaml", "ppo.kl_coef=0.02", "--only", "sft"]) == 0
    text = capsys.readouterr().out
    assert "recipe.yaml -> runs/demo" in text and "not started yet" in text and sorted(folder.iterdir()) == before
    assert main(["check", "quickstart", "task.max_train_examples=64"]) == 0
    assert "quickstart.yaml -> runs/quickstart" in capsys.readouterr().out
    assert main(["check", "recipe.yaml", "ppo.kl_cof=0.02"]) == 2
    assert "kl_cof" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("words", [[], ["seed=1"]])
def test_a_recipe_has_to_be_named(command, words, capsys):
    assert main([command, *words]) == 2
    assert capsys.readouterr().err.startswith("error: name a recipe")


def test_the_path_of_a_recipe_may_have_an_equals_sign(capsys):
    write_demo()
    file = Path("sweeps/lr=1e-5/recipe.yaml")
    file.parent.mkdir(parents=True)
    Path("recipe.yaml").rename(file)
    assert main(["check", str(file), "seed=1", "--only", "sft"]) == 0
    assert f"{file} -> runs/demo" in capsys.readouterr().out
    assert split_recipe_argument([str(file), "seed=1"]) == (file, ["seed=1"])  # of the command of a stage


def test_a_misspelt_name_of_a_recipe_is_named_with_the_one_that_may_be_meant(capsys):
    Path("quik").mkdir()
    for name, hint in (("quikstart", "did you mean 'quickstart'"), ("quik", "relay recipes list")):
        assert main(["check", name]) == 2
        assert f"no recipe {name!r}" in (error := capsys.readouterr().err) and hint in error
    assert main(["check", "mine.yaml"]) == 2 and "mine.yaml: no such recipe file" in capsys.readouterr().err


def test_run_hands_everything_to_the_chain(monkeypatch):
    calls = []
    monkeypatch.setattr("pipeline.cli.run_command.run_chain", lambda *given: calls.append(given) or 7)
    assert main(["run", "quickstart", "seed=1", "--from", "ppo", "--", "--num_processes", "2"]) == 7
    ((path, overrides, selection, options),) = calls
    assert path == recipe_files()["quickstart"] and (overrides, options) == (["seed=1"], ["--num_processes", "2"])
    assert (selection.start, selection.only, selection.force, selection.dry_run) == ("ppo", None, False, False)


def test_report_prints_the_verdict_and_opens_the_page(monkeypatch, capsys):
    folder = Path("runs/demo/eval")
    assert main(["report", "runs/demo"]) == 2
    assert "'runs/demo' holds no finished evaluation" in capsys.readouterr().err
    folder.mkdir(parents=True)
    report = {"verdict": "PPO is better.", "findings": ["It is longer."], "warnings": ["Few examples."]}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "stage.json").write_text('{"settings": {}}')
    opened = []
    monkeypatch.setattr(report_command.webbrowser, "open", lambda url: opened.append(url) or True)
    assert main(["report", "runs/demo"]) == 0 and opened == []
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["PPO is better.", "It is longer.", "warning: Few examples.", "report: runs/demo/eval/report.html"]
    assert main(["report", "runs/demo", "--open"]) == 0
    assert opened == [(folder / "report.html").resolve().as_uri()]
    monkeypatch.setattr(report_command.webbrowser, "open", lambda url: False)
    assert main(["report", "runs/demo", "--open"]) == 1 and "no browser" in capsys.readouterr().err


def test_report_and_compare_warn_of_models_that_were_made_again(capsys, monkeypatch):
    write_demo()
    for recipe in (load_recipe("recipe.yaml"), load_recipe("recipe.yaml", ["name=other"])):
        complete(recipe, *OWN)
        report = {"verdict": "PPO is better.", "findings": [], "warnings": [], "comparisons": [], "systems": {}}
        report |= {"settings": {}}
        (RunDirectory.of(recipe).eval / "report.json").write_text(json.dumps(report))
    assert main(["report", "runs/demo"]) == 0 and "warning" not in capsys.readouterr().out
    Path("runs/demo/ppo/stage.json").unlink()  # as in a stage that was interrupted
    assert main(["report", "runs/demo"]) == 0
    assert "warning: ppo was made again or interrupted after" in capsys.readouterr().out
    Path("runs/other/sft/stage.json").write_text("{}")
    runs = [load_run(Path(name)) for name in ("runs/demo", "runs/other")]
    [warning] = runs[1].report["warnings"]
    assert warning.startswith("sft was made again")
    first, second = (warning for warning in compare_runs(runs).warnings if "made again" in warning)
    assert first.startswith("demo: ppo was") and second.startswith("other: sft was")
    external = load_recipe("recipe.yaml", ["name=third", "ppo.sft_model_path=runs/other/sft"])
    complete(external, "ppo", "eval")
    shutil.copy("runs/demo/eval/report.json", "runs/third/eval")
    assert load_run(Path("runs/third")).report["warnings"] == []
    Path("runs/other/sft/stage.json").write_text('{"seed": 1}')
    assert load_run(Path("runs/third")).report["warnings"][0].startswith("runs/other/sft was made again")
    monkeypatch.chdir("runs")
    assert load_run(Path("third")).report["warnings"][0].startswith("runs/other/sft was made again")
    monkeypatch.chdir("..")
    shutil.rmtree("runs/demo/ppo")  # a report that was copied without its models
    assert main(["report", "runs/demo"]) == 0 and "warning" not in capsys.readouterr().out


def test_a_missing_stage_is_asked_for_with_a_command_that_is_there(monkeypatch):
    write_demo()
    recipe = load_recipe("recipe.yaml", ["seed=3"])
    assert plan.typed_command(recipe, "sft") == "relay run recipe.yaml seed=3 --only sft"
    monkeypatch.chdir(ROOT)
    assert plan.typed_command(recipe, "sft") == "accelerate launch pipeline/sft.py recipe.yaml seed=3"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_every_command(shell, capsys, tmp_path):
    pytest.importorskip("shtab", reason="needs the extra completion")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS) and "--interactive" in script and "--dry-run" in script
    if shell == "bash":
        (tmp_path / "relay.sh").write_text(script)
        ask = "source relay.sh; COMP_WORDS=(relay gen); COMP_CWORD=1; _shtab_relay; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
        assert done.stdout.split() == ["generate"], done.stderr


def test_completion_without_its_library_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2 and "pip install shtab" in capsys.readouterr().err
