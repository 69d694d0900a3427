"""The task of a recipe as its model reads it: chats or plain texts, and rows that the model cannot take."""

import dataclasses
import json

import pytest
from transformers import AutoTokenizer

from pipeline.models.text import TEMPLATE_DATE
from pipeline.recipe import load_recipe
from pipeline.recipe.load import recipe_values
from pipeline.stages.directory import RunDirectory
from pipeline.stages.reward_inputs import _from_data
from pipeline.stages.task import choose_prompts, load_recipe_task, template_record
from pipeline.tasks import TaskError

TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] | default('', true) }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ROWS = [{"q": f"say {n}", "a": n} for n in ("north", "east", "west", "red", "two")]


@pytest.fixture
def chat_model(base_directory, tmp_path):
    """A folder with the configuration and tokenizer of a tiny model that has a chat template."""
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(base_directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text((base_directory / "config.json").read_text())
    return folder


@pytest.fixture
def recipe(tmp_path, chat_model):
    """Each call writes the rows of all splits and gives the recipe with these keys of the task."""

    def make(*overrides, rows=ROWS, model=f"model_name_or_path: {chat_model}", **task):
        for split in ("train", "validation", "test"):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"name": "columns", "path": str(tmp_path / "{split}.jsonl"), "prompt": "q", "completion": "a", **task}
        text = f"name: demo\noutput_dir: {tmp_path}\nmodel: {{{model}}}\ntask: {json.dumps(keys)}\n"
        (tmp_path / "recipe.yaml").write_text(text + "eval: {max_new_tokens: 4}\n")
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return make


def load(recipe):
    return load_recipe_task(recipe, RunDirectory.of(recipe))[1]


SCRATCH = "from_scratch: {hidden_size: 32, num_attention_heads: 2, vocab_size: 400}"


def test_plain_columns_become_turns_where_the_model_has_a_chat_template(recipe):
    auto = recipe(system="Be brief.")
    assert choose_prompts(auto).chat and "turn of a user" in choose_prompts(auto).reason
    assert choose_prompts(auto).reason.startswith("chats stay as they are, and plain texts become the turn")
    assert choose_prompts(recipe(prompt="say {q}")).reason.startswith("plain texts become the turn")
    chats = load(recipe(rows=[{"q": [{"role": "user", "content": row["q"]}], "a": row["a"]} for row in ROWS]))
    assert chats.train[0]["prompt"] == [{"role": "user", "content": "say north"}]
    auto = recipe(system="Be brief.")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say north"}]
    assert load(auto).train[0]["prompt"] == turns
    plain = recipe(chat=False)
    assert not choose_prompts(plain).chat and load(plain).train[0]["prompt"] == "say north"
    assert choose_prompts(recipe(prompt=None, completion=None, messages="m")) is None


def test_plain_columns_stay_plain_without_a_template_or_from_scratch(recipe, base_directory):
    bare = f"model_name_or_path: {base_directory}"
    for model, words in ((bare, "no chat template"), (SCRATCH, "from scratch")):
        choice = choose_prompts(recipe(model=model))
        assert not choice.chat and words in choice.reason
        with pytest.raises(TaskError, match=r"^task\.system: it would do nothing"):
            choose_prompts(recipe(model=model, system="Be brief."))
        with pytest.raises(TaskError, match=r"^task\.chat: true needs a chat template"):
            choose_prompts(recipe(model=model, chat=True))


def test_a_from_scratch_model_can_have_a_template_of_the_recipe(recipe, tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    made = recipe(model=f"{SCRATCH}, chat_template: chat.jinja", chat=True)
    assert recipe_values(made)["model"]["chat_template"] == TEMPLATE  # so an edit of the file changes the recipe
    assert load(made).train[0]["prompt"] == [{"role": "user", "content": "say north"}]
    saved = RunDirectory.of(made).save_recipe(made)
    assert load_recipe(saved).model == made.model
    with pytest.raises(ValueError, match=r"model\.chat_template: 'chats\.jinja' is neither"):
        recipe(model=f"{SCRATCH}, chat_template: chats.jinja")


def test_a_date_in_the_template_is_recorded(recipe, chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    assert template_record(tokenizer) == {}
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + TEMPLATE
    assert template_record(tokenizer) == {"chat_template_date": f"{TEMPLATE_DATE:%Y-%m-%d}"}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"q": "no", "a": "x"}, "cannot be filled"),
        ({"q": "say", "a": "no"}, "cannot be filled"),
        ({"q": "north " * 80, "a": "x"}, "no room for 4 tokens"),
    ],
)
def test_rows_that_the_model_cannot_take(recipe, tmp_path, split, row, words):
    ppo = "ppo={rewards: [bleu], response_length: 4}"
    for skips in (False, True):
        made = recipe(ppo, skip_broken_rows=skips)
        lines = [*ROWS[:2], row, *ROWS[2:]]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if skips:
            task = load(made)
            assert getattr(task, split)["a"][:] == [line["a"] for line in ROWS]
            assert len(task.left_out) == 1 and words in task.left_out[0]
            assert f"line 3 of '{tmp_path}/{split}.jsonl'" in task.left_out[0]
            assert task.where(split, [2]).startswith("line 4 of")
            continue
        with pytest.raises(ValueError, match=words) as raised:
            load(made)
        assert f"line 3 of '{tmp_path}/{split}.jsonl'" in str(raised.value)


def test_the_reference_of_a_tool_call_is_what_the_template_writes(recipe):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "north", "arguments": "{}"}}]}
    made = recipe(
        rows=[{"m": [{"role": "user", "content": "say"}, call]}] * 3, prompt=None, completion=None, messages="m"
    )
    assert load(made).train["references"][:] == [["<call>north"]] * 3


def test_thoughts_in_references_are_stripped(recipe):
    made = recipe(rows=[{"q": "say", "a": "<think>hm</think> north"}] * 3, strip_thoughts=True)
    task = load(made)
    assert task.train["references"][:] == [["north"]] * 3 and "hm" in task.train["completion"][0]


def pairs_of(recipe, tmp_path, pair, **keys):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "chosen": "east"}) + "\n")
    section = {"path": str(tmp_path / "pairs.jsonl"), "train": "train[:1]", "validation": "train[1:]", **keys}
    made = dataclasses.replace(recipe, reward=load_recipe(recipe.source.file, [f"reward={{pairs: {section}}}"]).reward)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.model_name_or_path)
    return _from_data(made, load(recipe), tokenizer)


def test_pairs_are_read_as_the_tasks_prompts_are(recipe, tmp_path):
    pair = {"prompt": "say north", "chosen": "north", "rejected": "red"}
    made = recipe(system="Be brief.")
    [first, _], _, broken = pairs_of(made, tmp_path, pair)
    assert first.prompt == load(made).train[0]["prompt"] and broken == 0
    broken_pair = {**pair, "prompt": "no"}
    with pytest.raises(TaskError, match=r"^reward\.pairs: .* cannot be filled .* line 1 of"):
        pairs_of(made, tmp_path, broken_pair)
    assert pairs_of(made, tmp_path, broken_pair, skip_broken_rows=True)[2] == 2


def test_pairs_whose_chats_begin_otherwise_are_refused(recipe, tmp_path):
    user = {"role": "user", "content": "say north"}
    pair = {"prompt": [{"role": "system", "content": "Be brief."}, user], "chosen": "north", "rejected": "red"}
    with pytest.raises(ValueError, match=r"^reward\.pairs: the chats of the pairs begin with a system message"):
        pairs_of(recipe(), tmp_path, pair)


@pytest.mark.parametrize(
    ("keys", "key"), [({"strip_thoughts": True}, "task.strip_thoughts"), ({"references": "r"}, "task.references")]
)
def test_references_that_a_template_cannot_render_are_refused_before_training(recipe, chat_model, keys, key):
    """Prompts end with `<think>`, and references have no thought."""
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = TEMPLATE.replace("{{ '<assistant>' }}", "{{ '<assistant><think>' }}")
    tokenizer.save_pretrained(chat_model)
    rows = [{**row, "a": f"<think>hm</think>{row['a']}", "r": row["a"]} for row in ROWS]
    assert load(recipe(rows=rows)).test["references"][0] == ["<think>hm</think>north"]
    with pytest.raises(
        TaskError, match=rf"^{key}: a reference cannot be an answer .*model\.chat_template.* line 1 of"
    ):
        load(recipe(rows=rows, **keys))
