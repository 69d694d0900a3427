"""Anything at all as a recipe, an override or a data file: read, or refused in one sentence of ours; nothing hangs.

RELAY_FUZZ_EXAMPLES=10000 makes a long run of it, from other random numbers than the suite's.
"""

import dataclasses
import faulthandler
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import PARALLEL, RECIPE, write_parallel

from pipeline.recipe import Recipe, RecipeError, check_recipe, load_recipe, recipe_values
from pipeline.recipe.reader import read_document
from pipeline.stages.directory import RunDirectory
from pipeline.tasks import TaskError, columns, load_task, parallel, preferences

EXAMPLES = int(os.environ.get("RELAY_FUZZ_EXAMPLES", "0"))
LIMIT_SECONDS = 20  # for one example, of which the slowest take a fraction of a second
FUZZ = settings(
    max_examples=EXAMPLES or 50,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

GOOD = (
    RECIPE.replace("TASK", PARALLEL.replace("DATA", "good"))
    .replace("MODEL", "{hidden_size: 16, num_attention_heads: 2, vocab_size: 300}")
    .replace("OUTPUT", "runs")
    + "reward: {pairs: {from: [sft, references], metric: chrf}, num_train_epochs: 1}\n"
)
# What means something in YAML, in JSON, in CSV or to the checks, and what parsers have stumbled over.
SIGNS = [
    *":-?[]{},#&*!|>'\"%@`~.= \n\t",
    "\r\n",
    "\ufeff",
    "\0",
    "\x1b",
    "\u2028",
    "\ud7ff",
    "é",
    "٣",
    ": ",
    "- ",
    "\n  ",
]
WORDS = [
    *["&a", "*a", "<<", "!!python/object:os.system", "!!set", "---", "...", "1e-5", "1e999", ".nan", "-.inf", "0x1F"],
    *["no", "yes", "null", "true", "name", "model", "task", "sft", "reward", "ppo", "eval", "from_scratch", "rewards"],
    *["pairs", "systems", "metrics", "weight", "bleu", "../../x", "runs", "{source}", "{a!r:>9}", "{a[0]}", "$HOME"],
    *["english", "german", "NaN", "Infinity", "-0", "evaluate:x", "a.b", "learned", "sft/x", "~root"],
]
LONG = [
    "9" * 25,
    "9" * 5000,
    "x" * 300,
    "[" * 30,
    '{"a":' * 2000,
    "hf_" + "A1b2" * 8,
    '"\\ud800"',
    '"\\UFFFFFFFF"',
    "%YAML 1.1",
]
PIECES = st.sampled_from([*SIGNS, *WORDS, *LONG])
TEXT = st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=30)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2, 2**31, 2**63, -(2**70), 0.5, 10**400])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
BYTES = TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory) -> Iterator[Path]:
    """A directory for all examples, which is the current one."""
    before, directory = os.getcwd(), tmp_path_factory.mktemp("fuzz")
    os.chdir(directory)
    Path("good").mkdir()
    write_parallel(Path("good"))
    yield directory
    os.chdir(before)


@contextmanager
def refused_or_read(error: type[Exception]) -> Iterator[None]:
    """What cannot be read ends in `error`, in words and in time; any other error passes on, and is a failure."""

    def too_long(number: int, frame: object) -> None:
        faulthandler.dump_traceback()
        raise AssertionError(f"more than {LIMIT_SECONDS} seconds")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    except error as refusal:
        assert len(str(refusal).split()) > 2, refusal
        if error is RecipeError:
            assert str(refusal).isprintable() and len(str(refusal)) < 1200, refusal
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def read_recipe(text: bytes, *overrides: str) -> None:
    """Load and check a recipe; one that passes is saved and loaded as the same."""
    Path("recipe.yaml").write_bytes(text)
    with refused_or_read(RecipeError):
        recipe = load_recipe("recipe.yaml", overrides)
        check_recipe(recipe)
        recipe = dataclasses.replace(recipe, output_dir="runs")  # nothing is written elsewhere
        saved = load_recipe(RunDirectory.of(recipe).save_recipe(recipe))
        assert comparable(saved) == comparable(recipe)


def comparable(recipe: Recipe) -> str:
    """All values of a recipe, in which NaN equals itself."""
    return json.dumps(recipe_values(recipe), sort_keys=True, default=str)


def key_paths(values: object, prefix: str = "") -> list[str]:
    """The dotted path of everything in nested values."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path for key, value in items for path in (f"{prefix}{key}", *key_paths(value, f"{prefix}{key}."))]


@FUZZ
@given(BYTES | st.lists(BYTES, max_size=4).map(b"\n".join))
def test_any_bytes_as_a_recipe(content):
    Path("any.yaml").write_bytes(content)
    with refused_or_read(RecipeError):
        read_document("any.yaml")


@FUZZ
@given(st.data())
def test_a_good_recipe_with_pieces_in_the_way(data):
    text = GOOD
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = start + data.draw(st.sampled_from([0, 0, 1, 3, 20]))
        text = text[:start] + data.draw(TEXT) + text[stop:]
    read_recipe(text.encode("utf-8", "surrogatepass"))


@FUZZ
@given(st.data())
def test_any_value_for_any_key(data):
    Path("recipe.yaml").write_text(GOOD, encoding="utf-8")
    paths = key_paths(recipe_values(load_recipe("recipe.yaml")))
    overrides = []
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(paths) | TEXT)
        value = data.draw(VALUES.map(lambda v: json.dumps(v, ensure_ascii=False)) | TEXT)
        overrides.append(f"{key}={value}")
    read_recipe(GOOD.encode(), *overrides)


CELLS = {"english": SCALARS, "german": SCALARS | st.lists(SCALARS, max_size=2), "odd": VALUES}
ROWS = st.lists(st.fixed_dictionaries({}, optional=CELLS), min_size=1, max_size=4)
EXPRESSIONS = (
    st.sampled_from(["english", "{english}", "{german[0]}", "odd", "<{english}> {odd}", "{english:>5}"]) | TEXT
)
KEYS = {
    "prompt": EXPRESSIONS,
    "completion": EXPRESSIONS,
    "references": EXPRESSIONS,
    "messages": st.sampled_from(["odd", "german"]),
    "skip_broken_rows": st.booleans(),
    "train": st.sampled_from(["train", "train[:50%]", "train[1:]", "train[-2:3]"]) | TEXT,
}


def read_columns(name: str, content: bytes, keys: dict) -> None:
    """Load the data as the task `columns` and as preferences."""
    Path(name).write_bytes(content)
    parts = {"validation": "train[:1]", "test": "train[:1]"}
    with refused_or_read(TaskError):
        load_task("columns", columns.Config(path=name, **{**parts, **keys}))
    with refused_or_read(TaskError):
        skip = keys.get("skip_broken_rows", False)
        names = {"prompt": "english", "chosen": "german", "rejected": "odd", "margin": "odd"}
        preferences.load(preferences.Config(path=name, validation="train[:1]", skip_broken_rows=skip, **names))


def mutated(data: st.DataObject, content: bytes) -> bytes:
    """`content` with a few pieces cut out and others put in."""
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(content)))
        stop = start + data.draw(st.sampled_from([0, 1, 5]))
        content = content[:start] + data.draw(BYTES) + content[stop:]
    return content


@FUZZ
@given(st.data(), ROWS, st.fixed_dictionaries({}, optional=KEYS))
def test_any_rows_as_json_lines_and_json(data, rows, keys):
    lines = [json.dumps(row, ensure_ascii=data.draw(st.booleans())) for row in rows]
    lined = mutated(data, "\n".join(lines).encode("utf-8", "surrogatepass"))
    read_columns("a.jsonl", lined, keys)
    read_columns("a.json", data.draw(st.sampled_from([lined, b"[" + lined.replace(b"\n", b",\n") + b"]"])), keys)


@FUZZ
@given(st.data(), st.lists(st.lists(TEXT, max_size=4), max_size=4), st.fixed_dictionaries({}, optional=KEYS))
def test_any_text_as_csv(data, rows, keys):
    name, separator = data.draw(st.sampled_from([("a.csv", ","), ("a.tsv", "\t")]))
    header = data.draw(st.sampled_from([["english", "german", "odd"], []]))
    lines = [separator.join(row) for row in [header, *rows]]
    read_columns(name, mutated(data, "\n".join(lines).encode("utf-8", "surrogatepass")), keys)


@FUZZ
@given(st.data(), st.fixed_dictionaries({}, optional=KEYS))
def test_a_damaged_parquet_file(data, keys):
    Dataset.from_list([{"english": "a", "german": ["b"], "odd": n} for n in range(3)]).to_parquet("good.parquet")
    read_columns("a.parquet", mutated(data, Path("good.parquet").read_bytes()), keys)


@FUZZ
@given(st.data(), BYTES, BYTES, TEXT)
def test_any_bytes_as_parallel_text(data, source, target, prompt):
    for split in ("train", "validation", "test"):
        for side, content in (("en", source), ("de", target)):
            Path(f"{split}.{side}").write_bytes(content)
    with refused_or_read(TaskError):
        prompt = data.draw(st.sampled_from(["{source}\n", prompt]))
        load_task("parallel", parallel.Config(source="{split}.en", target="{split}.de", prompt=prompt))


@FUZZ
@given(st.data())
def test_a_damaged_directory_of_save_to_disk(data):
    Dataset.from_list([{"english": "a", "german": "b"}] * 3).save_to_disk("saved")
    name = data.draw(st.sampled_from(sorted(path.name for path in Path("saved").iterdir())))
    file = Path("saved", name)
    file.write_bytes(mutated(data, file.read_bytes()))
    with refused_or_read(TaskError):
        parts = {"validation": "train[:1]", "test": "train[:1]"}
        load_task("columns", columns.Config(path="saved", prompt="english", completion="german", **parts))
