"""Recipes that cannot be meant, through the loader, the chain and a stage: one sentence, exit code 2, nothing left."""

import os
import re
import sys
from pathlib import Path

import pytest
from tiny_run import MAINS, RECIPE, outcome, write_recipe, write_rows

from pipeline.recipe import RecipeError, load_recipe

LAUGHS = "x: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"x{n}: &{b} [{', '.join(['*' + a] * 10)}]\n" for n, (a, b) in enumerate(zip("abcdefgh", "bcdefghi", strict=True))
)
CHAIN = "x: &x0 [1]\n" + "".join(f"x{n}: &x{n} [*x{n - 1}]\n" for n in range(1, 40))
# What takes the place of the line `seed: 0`, and words of the message.
TEXTS = {
    "unknown key": ("sede: 3", ["recipe.yaml:2: sede: unknown key", "'seed'"]),
    "duplicate key": ("seed: 1\nseed: 2", ["recipe.yaml:3: seed: duplicate key", "recipe.yaml:2"]),
    "python object": (
        "seed: !!python/object/apply:os.system ['touch owned']",
        ["recipe.yaml:2: seed: tags are not allowed", "!!python/object/apply:os.system"],
    ),
    "tag of one's own": ("seed: !run 3", ["recipe.yaml:2: seed: tags are not allowed", "!run"]),
    "tag of YAML": ("seed: !!int 3", ["recipe.yaml:2: seed: tags are not allowed", "!!int"]),
    "tag in full": ("seed: !<tag:yaml.org,2002:python/name:os.system> x", ["seed: tags are not allowed"]),
    "word for a number": ("seed: no", ["recipe.yaml:2: seed: expected a whole number, found 'no'"]),
    "billion laughs": (LAUGHS, ["recipe.yaml:3: x2.7.8: more than 10,000 values"]),
    "aliases in a row": (CHAIN, ["recipe.yaml:19: x19.0.0: ", "more than 20 levels deep"]),
    "alias of itself": ("x: &x [*x]", ["recipe.yaml:2: x.0.0: ", "more than 20 levels deep"]),
    "alias of nothing": ("seed: *x", ["recipe.yaml:2: ", "alias 'x'"]),
    "deep nesting": (f"x: {'[' * 3000}", ["recipe.yaml: ", "more than 20 levels deep"]),
    "deep mappings": (f"x: {'{a: ' * 25}1{'}' * 25}", ["recipe.yaml:2: x.a.a: ", "more than 20 levels deep"]),
    "huge number": (f"seed: {'9' * 5000}", ["recipe.yaml:2: seed: ", "found one of 5000 digits"]),
    "huge hexadecimal number": (f"seed: 0x{'f' * 5000}", ["recipe.yaml:2: seed: ", "whole numbers are at most"]),
    "number beyond 64 bits": ("seed: 18446744073709551616", ["recipe.yaml:2: seed: ", "at most 9223372036854775807"]),
    "control character": ("seed: \x1b[31m", ["recipe.yaml:2: ", "control character U+001B"]),
    "NUL": ("seed: \0", ["recipe.yaml:2: ", "control character U+0000"]),
    "escape in a key": ('"a\\e[31m\\nb": 1', ["recipe.yaml:2: a\\x1b[31m\\nb: unknown key"]),
    "half a character": ('output_dir: "\\ud800"', ["recipe.yaml:2: output_dir: '\\ud800'", "half of a character"]),
    "escape beyond Unicode": ('output_dir: "\\UFFFFFFFF"', ["recipe.yaml: not valid YAML: "]),
    "merge key": ("<<: {seed: 1}", ["recipe.yaml:2: recipe: a key must be text, found <<"]),
    "tab": ("\tseed: 1", ["recipe.yaml:2: not valid YAML: "]),
    "second document": ("---\nname: other", ["recipe.yaml:2: not valid YAML: ", "another document"]),
    "version of YAML": ("...\n%YAML 1.1\n---\nname: other", ["recipe.yaml:3: ", "YAML 1.2; remove the %YAML line"]),
    "key that is a list": ("? [a, b]\n: c", ["recipe.yaml:2: recipe: a key must be text"]),
    "value that is very long": (f"seed: {'x' * 100_000}", ["recipe.yaml:2: seed: ", "found 'xxx"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Each test in a directory of its own with data and a good recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write_rows(tmp_path)
    write_recipe(tmp_path, text=RECIPE.replace("name: tiny\n", "name: tiny\nseed: 0\n"))
    return tmp_path


def replace_seed(text: str) -> None:
    recipe = Path("recipe.yaml").read_text(encoding="utf-8")
    Path("recipe.yaml").write_text(recipe.replace("seed: 0", text), encoding="utf-8")


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_is_refused(capfd, case):
    text, words = TEXTS[case]
    replace_seed(text)
    for program in ("run.py", "sft.py"):
        assert outcome(MAINS[program], "recipe.yaml") == 2
        printed = capfd.readouterr()
        assert printed.out == "" and printed.err.startswith("error: ")
        assert [word for word in words if word not in printed.err] == [], printed.err
        assert printed.err.count("\n") == 1 and len(printed.err) < 1200 and "\x1b" not in printed.err
    with pytest.raises(RecipeError, match=re.escape(words[0])):
        load_recipe("recipe.yaml")
    assert not Path("runs").exists() and not Path("owned").exists()


def test_numbers_and_words_are_those_of_yaml_1_2(capfd):
    replace_seed("seed: 0x1F")
    recipe = load_recipe("recipe.yaml", ["sft.learning_rate=1e-5", "sft.eval_strategy=no", "ppo.run_name=on"])
    assert (recipe.seed, recipe.sft.arguments["learning_rate"]) == (31, 1e-5)
    assert (recipe.sft.arguments["eval_strategy"], recipe.ppo.run_name) == ("no", "on")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: caf\xe9\n", "recipe.yaml:1: not UTF-8 (byte 9); convert it, for example with iconv"),
        (b"\xff\xfen\0a\0m\0e\0", "recipe.yaml:1: not UTF-8 (byte 0); convert it"),
        (b"x" * (2**20 + 1), "recipe.yaml: larger than 1,048,576 bytes, which no recipe is"),
        (b"", "recipe.yaml: name: missing: this key is needed"),
        (b"PK\x03\x04", "recipe.yaml:1: not valid YAML: the control character U+0003"),
    ],
)
def test_files_that_are_no_recipe(capfd, content, message):
    Path("recipe.yaml").write_bytes(content)
    for program in ("run.py", "ppo.py"):
        assert outcome(MAINS[program], "recipe.yaml") == 2
        assert capfd.readouterr().err.startswith(f"error: {message}")


def test_a_byte_order_mark_and_carriage_returns_are_accepted():
    text = Path("recipe.yaml").read_bytes()
    Path("recipe.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert load_recipe("recipe.yaml").name == "tiny"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=../../x", "name: '../../x' names a directory"),
        ("name=/tmp/x", "name: '/tmp/x' names a directory"),
        ("name=..", "name: '..' names a directory"),
        ('name="x\\0"', "name: 'x\\x00' names a directory"),
        (f"name={'x' * 101}", "name: at most 100 characters, found 101"),
        ("eval.systems=[sft, {name: ../x, path: sft}]", "a further system needs a name of letters"),
        (f"output_dir={'x' * 300}", "File name too long"),
        ('output_dir="a\\0b"', "output_dir: a path cannot hold a NUL character, found 'a\\x00b'"),
        (f"task.path={'x' * 300}.jsonl", "File name too long"),
        ("output_dir=~nobody-here/runs", "output_dir: there is no home directory for the ~ of '~nobody-here/runs'"),
        ("task.data_dir=~nobody-here", "task.data_dir: there is no home directory for the ~ of '~nobody-here'"),
        ("ppo.sft_model_path=~nobody-here/x", "ppo.sft_model_path: there is no home directory for the ~ of"),
        ("ppo.rewards.99999999999999999999.weight=1", "ppo.rewards is a list of 1, so its items are ppo.rewards.0"),
        (f"{'9' * 5000}.x=1", "unknown key"),
        ("task.name=.", "task.name: cannot import '.'"),
        ("task.name=..x", "task.name: cannot import '..x'"),
        ("task.name=faulty.task", "task.name: cannot import 'faulty.task' (RuntimeError: no task today)"),
    ],
)
def test_values_that_lead_elsewhere(capfd, override, message):
    Path("faulty").mkdir()
    Path("faulty/task.py").write_text("raise RuntimeError('no task today')\n")
    sys.path.append(os.getcwd())
    before = sorted(Path().rglob("*"))
    for program in ("run.py", "sft.py"):
        assert outcome(MAINS[program], "recipe.yaml", override) == 2
        printed = capfd.readouterr().err
        assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1, printed
    assert [p for p in sorted(Path().rglob("*")) if "__pycache__" not in str(p)] == before
