"""The wheel in an environment and a folder with nothing else of Relay: from a recipe's name to its report."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "task.max_train_examples=64",
    "task.max_validation_examples=8",
    "task.max_test_examples=12",
    "sft.num_train_epochs=1",
    "sft.per_device_train_batch_size=8",
    "ppo.total_episodes=16",
    "ppo.per_device_train_batch_size=8",
    "ppo.gradient_accumulation_steps=1",
    "eval.n_bootstrap=10",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this repository; the build leaves nothing in it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    for name in ("pipeline", "recipes"):  # with the link from one to the other
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(copy)]
    subprocess.run([*command, "--wheel-dir", str(folder)], check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of commands of an environment with the wheel, and with the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    target = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (target / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return folder / "bin"


def test_the_wheel_holds_recipes_data_and_templates_and_nothing_of_the_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    assert {f"pipeline/cli/{path}" for path in recipes} <= set(names)
    assert {"pipeline/evaluation/pages/templates/report.html", "pipeline/cli/constraints.txt"} <= set(names)
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "pipeline").rglob("*.py")}
    python |= {f"pipeline/cli/{path}" for path in recipes if path.suffix == ".py"}  # a link to recipes/
    assert python == {name for name in names if name.endswith(".py")}
    assert wheel.name.startswith("trl_relay-")


@torch.no_grad()
def check_generate_and_export(relay: Callable[..., str], ppo: Path, folder: Path) -> None:
    """What is exported has the logits of the policy, and writes what the policy writes."""
    relay("export", "runs/quickstart", "exported")
    ids = torch.arange(5, 25).unsqueeze(0)
    exported = AutoModelForCausalLM.from_pretrained(folder / "exported").eval()
    adapter = AutoPeftModelForCausalLM.from_pretrained(ppo).eval()
    torch.testing.assert_close(exported(ids).logits, adapter(ids).logits, rtol=1e-4, atol=1e-4)
    assert ModelCard.load(folder / "exported" / "README.md").data.library_name == "transformers"
    # Of the run's own task the prompt is a source text; of a folder it is the whole prompt.
    prompts = {"runs/quickstart": "The old man reads a book.", "exported": "The old man reads a book.\n"}
    sample = ("--temperature", "1", "--max-new-tokens", "16", "--seed")
    drawn = [relay("generate", *words, *sample, "4") for words in prompts.items()]
    assert drawn[0] == drawn[1] and drawn[0].strip()
    assert drawn[0] != relay("generate", *next(iter(prompts.items())), *sample, "5")
    assert relay("generate", "runs/quickstart", "A cat", "--system", "sft", "--max-new-tokens", "1").count("\n") == 1


def check_compare_push_and_watch(relay: Callable[..., str], command: Path, folder: Path) -> None:
    """The commands about a run that need no terminal and no network."""
    shown = relay("generate", "runs/quickstart", "A cat", "--compare", "--max-new-tokens", "4")
    assert [name in shown for name in ("base", "sft", "ppo")] == [True] * 3
    relay("export", "runs/quickstart", "adapter", "--adapter")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    sent = relay("push", "runs/quickstart", "me/my-model", "--dry-run")
    assert "repository: me/my-model" in sent and "model.safetensors" in sent and str(folder) not in sent
    words = [str(command), "watch", "runs/quickstart", "--port", "0"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment()) as watching:
        try:
            url = watching.stdout.readline().split()[0]
            assert b"curves-ppo" in urlopen(url).read()
        finally:
            watching.terminate()


def environment() -> dict[str, str]:
    """The variables of this process, without the way to this repository."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture
def relay(installed, tmp_path) -> Callable[..., str]:
    """Run the installed command in an empty folder; return what it prints."""

    def run(*words: str) -> str:
        command = [str(installed / "relay"), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_machine_is_looked_at_and_a_recipe_is_begun_in_an_empty_folder(relay, tmp_path):
    shown = relay("doctor", "--tests")
    assert "a wheel" in shown and "tests: every stage runs here" in shown and not any(tmp_path.iterdir())
    tested = (ROOT / "constraints.txt").read_text().partition("\ntrl==")[2].split()[0]
    assert any(line.startswith("│ trl ") and tested in line for line in shown.splitlines())
    (tmp_path / "data.csv").write_text("question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(20)))
    assert "reward rougeL: 1.000" in relay("init", "own.yaml", "--model", "scratch", "--data", "data.csv")
    assert "own.yaml -> runs/own" in relay("check", "own.yaml")


def test_a_recipe_goes_from_its_name_to_its_report_in_an_empty_folder(installed, relay, tmp_path):
    code = "import pipeline, sys; print(pipeline.__file__)"
    where = subprocess.run([installed / "python", "-c", code], cwd=tmp_path, capture_output=True, env=environment())
    assert str(installed.parent) in where.stdout.decode()
    assert "quickstart " in relay("recipes", "list")
    assert relay("recipes", "copy", "quickstart").split() == ["quickstart.yaml", "phrasebook"]
    assert "quickstart.yaml -> runs/quickstart" in relay("check", "quickstart.yaml", *SHORT)
    assert not (tmp_path / "runs").exists()
    assert "report: runs/quickstart/eval/report.html" in relay("run", "quickstart.yaml", *SHORT)
    assert "complete and unchanged" in relay("run", "quickstart.yaml", *SHORT)
    assert relay("report", "runs/quickstart").splitlines()[-1] == "report: runs/quickstart/eval/report.html"
    ppo = tmp_path / "runs" / "quickstart" / "ppo"
    cards = [ModelCard.load(ppo / "README.md"), ModelCard.load(ppo.parent / "sft" / "README.md")]
    assert [card.data.library_name for card in cards] == ["peft", "transformers"]
    assert {result.metric_type for card in cards for result in card.data.eval_results} == {"bleu", "chrf"}
    check_generate_and_export(relay, ppo, tmp_path)
    check_compare_push_and_watch(relay, installed / "relay", tmp_path)
    relay("run", "quickstart.yaml", *SHORT, "name=other", "seed=1")
    relay("compare", "runs/quickstart", "runs/other")
    assert (tmp_path / "runs" / "comparison" / "report.html").is_file()
