"""README.md and docs/: links lead somewhere, commands are taken, recipes are read, and the README's Python runs."""

import json
import pkgutil
import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from ruamel.yaml import YAML
from trl import RewardConfig, SFTConfig

from pipeline.cli.main import COMMANDS as COMMANDS_OF_RELAY
from pipeline.cli.recipe_files import recipe_path
from pipeline.cli.run_command import parse_arguments
from pipeline.recipe import RewardSection, SFTSection, load_recipe, split_recipe_argument
from pipeline.stages.launch import process_count
from tools import recipe_reference

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_LINES = 160
MAX_MEDIAN_WORDS = 15
MODULES = ("pip", "pytest", "venv", "tools.phrasebook", "tools.recipe_reference")


def code_blocks(page: Path, kind: str) -> list[str]:
    """The texts of a page's fenced blocks of a kind; commands have none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [text for found, text in blocks if found == kind]


def commands(page: Path) -> list[list[str]]:
    """Every command of a page as words, without comments and without variables before it."""
    lines = "".join(code_blocks(page, "")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if not re.match(r"(?:  |\w+/$)", line)]
    return [[word for word in line if not re.match(r"[A-Z_]+=", word)] for line in words if line]


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


def check_recipe_arguments(words: list[str]) -> None:
    """Read the recipe with its overrides, where it is one of the repository's."""
    path, overrides = split_recipe_argument(words)
    if str(path).startswith("my_"):
        assert all("=" in override for override in overrides)
    else:
        load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=lambda value: value.stem if isinstance(value, Path) else value[-1]
)
def test_a_command_is_taken(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = command
    if words[0:1] == ["pipeline/run.py"]:
        arguments, options = parse_arguments(words[1:])
        check_recipe_arguments(arguments.words)
        process_count(options)
    elif command[:2] == ["accelerate", "launch"]:
        parsed = launch_command_parser().parse_args(words[1:])
        assert (ROOT / parsed.training_script).is_file()
        check_recipe_arguments(parsed.training_script_args)
    elif program == "relay":
        assert words[0] in COMMANDS_OF_RELAY
        if words[0] in ("run", "check"):
            load_recipe(recipe_path(Path(words[1]).stem), parse_arguments(words[2:])[0].words)
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[0:2] == ["pipeline/eval.py", "compare"]:
        assert len(words) == 4
    elif words[0:1] == ["-m"]:
        assert words[1] in MODULES
    elif words[0:1] == ["-c"]:
        compile(words[1], str(page), "exec")
    elif program == "python":
        assert words[0].startswith(("tests/", "recipes/")) and (ROOT / words[0]).is_file()
    else:
        assert program in ("pip", "sbatch", "source") and all(
            (ROOT / word).is_file() for word in words if word.startswith("docs")
        )


RECIPES = [(page, text) for page in PAGES for text in code_blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "text"), RECIPES, ids=[page.stem for page, _ in RECIPES])
def test_a_recipe_or_a_piece_of_one_is_read(page, text, tmp_path):
    pieces = {
        "name": "name: piece\n",
        "model": "model: {from_scratch: {architecture: llama}}\n",
        "task": 'task: {name: columns, path: "data/{split}.jsonl", prompt: question, references: answer}\n',
        "sft": "sft: {}\n",
    }
    pieces |= {"ppo": "ppo: {rewards: [bleu]}\n"} if "learned" not in text else {}
    missing = [piece for key, piece in pieces.items() if not re.search(rf"^{key}:", text, re.M)]
    (tmp_path / "recipe.yaml").write_text("".join(missing) + text, encoding="utf-8")
    load_recipe(tmp_path / "recipe.yaml")


def anchors(page: Path) -> set[str]:
    """The ids that a page's headings get."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w]+", "-", re.sub(r"[^\w\s-]", "", title.lower())).strip("-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'<img src="([^"]+)"', text)]:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_files_that_pages_name_in_backticks_exist():
    for page in PAGES:
        for name in re.findall(
            r"`((?:tests|recipes|accelerate_configs|tools|pipeline|notebooks)/[\w./-]+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_objects_of_the_python_api_exist():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for path, members in re.findall(r"^::: (\S+)\n(?:    options:\n      members: \[(.*)\]\n)?", text, re.M):
        documented = pkgutil.resolve_name(path)
        assert documented.__doc__, path
        assert all(hasattr(documented, name) for name in members.split(", ") if name), path


def section_keys() -> dict[str, set[str]]:
    """The keys of each section of a recipe."""
    names = {section: [section] for section in ("model", "ppo", "eval")} | {"task": ["columns", "parallel"]}
    classes = {section: [recipe_reference.CLASSES[name] for name in kinds] for section, kinds in names.items()}
    classes |= {"sft": [SFTConfig, SFTSection], "reward": [RewardConfig, RewardSection]}
    return {section: {f.name for cls in kinds for f in fields(cls)} for section, kinds in classes.items()}


def test_keys_that_pages_name_exist():
    known = section_keys()
    known["task"].add("name")
    for page in PAGES:
        for section, key in re.findall(r"[`' ](model|task|sft|reward|ppo|eval)\.(\w+)\b(?!\.)", page.read_text()):
            assert key in known[section] | {"py", "jsonl"}, f"{page.name}: {section}.{key}"


def sentences(text: str) -> list[str]:
    """The prose of a page by sentence: without code, tables, headings and pictures."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    prose = re.sub(r"^(?:\||#|!\[|<img).*$", "", text, flags=re.M)
    prose = re.sub(r"^\s*[-*] ", "\n", prose, flags=re.M)
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", prose)]
    return [sentence for p in paragraphs for sentence in re.split(r"(?<=[.!?])[\s*]+(?=[A-Z`\[])", p) if sentence]


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    lengths = sorted(len(sentence.split()) for sentence in sentences(text))
    assert len(text.splitlines()) <= MAX_README_LINES
    assert lengths[len(lengths) // 2] <= MAX_MEDIAN_WORDS


def test_the_readme_has_the_commands_of_the_contract():
    shown = [" ".join(command[:3]) for command in commands(README)]
    for script in ("sft", "reward", "ppo", "eval"):
        assert f"accelerate launch pipeline/{script}.py" in shown
    assert {"make quickstart", "make test"} <= set(shown)
    assert any(command.startswith("python pipeline/run.py") for command in shown)


def test_the_python_of_the_readme_runs(base_directory, tmp_path, monkeypatch, fresh_accelerate):
    (code,) = code_blocks(README, "python")
    for old, new in (('"runs/my_run/sft"', repr(str(base_directory))), ("total_episodes=512", "total_episodes=128")):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "readme"})  # the page's own words
    assert (tmp_path / "runs/from_python/ppo/adapter_model.safetensors").is_file()


def test_the_citation_names_this_version():
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["type"] == "software"


def test_the_recipe_reference_is_up_to_date():
    page = recipe_reference.PAGE.read_text(encoding="utf-8")
    assert recipe_reference.filled(page) == page, "run: python -m tools.recipe_reference"


def test_the_site_is_built_without_a_warning(tmp_path, monkeypatch):
    pytest.importorskip("material", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    build(load_config("mkdocs.yml", strict=True, site_dir=str(tmp_path)))
    page = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "processing_class" in page and 'src="http' not in page


@pytest.mark.parametrize("name", ["ppo", "eval", "model", "columns", "sampled pairs"])
def test_every_key_has_its_reason(name):
    comments = recipe_reference.field_comments(recipe_reference.CLASSES[name])
    assert [key for key, comment in comments.items() if not comment] == []


def test_the_badges_are_true():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    tested = ", ".join(f"{name} {pins[name]}" for name in ("torch", "transformers", "trl"))
    python = project["requires-python"].removeprefix(">=")
    true = {"licence": project["license"], "python": f"{python} or later", "tested": tested}
    badges = re.findall(r"!\[([^\]]+)\]\(docs/assets/badges/(\w+)\.svg\)", README.read_text(encoding="utf-8"))
    assert {name for _, name in badges} == true.keys()
    for name, words in true.items():
        svg = (ROOT / "docs" / "assets" / "badges" / f"{name}.svg").read_text(encoding="utf-8")
        assert svg.count(words) == 3, name  # its title, its label and what is drawn


def test_the_sample_run_is_small_and_names_no_machine():
    run = ROOT / "docs" / "assets" / "quickstart"
    files = {str(path.relative_to(run)): path.read_text(encoding="utf-8") for path in run.rglob("*") if path.is_file()}
    logs = {f"{stage}/metrics.jsonl" for stage in ("sft", "ppo")}
    assert files.keys() == {"recipe.yaml", "eval/report.html", "eval/report.json", *logs}
    assert sum(len(text.encode()) for text in files.values()) < 500_000
    for name, text in files.items():
        assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|mnt|Users|var)/", text), name
    report = json.loads(files["eval/report.json"])
    assert report["verdict"].startswith("PPO is better") and report["settings"]["name"] == "quickstart"
    assert report["verdict"].replace("<", "&lt;") in files["eval/report.html"]
    assert len(files["ppo/metrics.jsonl"].splitlines()) > 80
    assert load_recipe(run / "recipe.yaml").name == "quickstart"
