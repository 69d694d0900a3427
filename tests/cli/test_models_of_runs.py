"""Which model `relay generate` and `relay export` take, what it reads, and what is said where there is none."""

import builtins
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from demo_run import complete, recipe_with
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from pipeline.cli.finished_models import NEW_TOKENS, find_model, prompt_from
from pipeline.cli.main import main
from pipeline.models.config import ModelConfig
from pipeline.models.generation import generate
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.sampling import Decoding
from pipeline.models.text import decode, encode_prompts
from pipeline.recipe import RecipeError, load_recipe, load_stored_recipe
from pipeline.stages.directory import RunDirectory

RUN = Path("runs/demo")
TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"


pytestmark = pytest.mark.usefixtures("demo")


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


def test_models_beside_a_run_are_found_from_any_folder(monkeypatch):
    for folder in ("base", "models/sft"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
    complete(recipe_with("model={model_name_or_path: base}", "ppo.sft_model_path=models/sft"), "ppo")
    top, run = Path.cwd(), RUN.resolve()
    for folder in ("runs", "runs/demo", "/"):
        monkeypatch.chdir(top / folder)
        source = find_model(run, None).source
        assert (source.path, source.base) == (run / "ppo", str(top / "models/sft"))
        assert [find_model(run, name).source.path for name in ("base", "sft")] == [
            str(top / "base"),
            str(top / "models/sft"),
        ]
    monkeypatch.chdir(top)
    assert find_model(RUN, None).source.base == "models/sft"
    Path("models").rename("elsewhere")
    with pytest.raises(ValueError, match="'models/sft', and that folder is neither here nor where the run was made"):
        find_model(RUN, None)
    assert find_model(RUN, "base").source.path == "base"


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
        (["generate", "model", "Hello", "--compare"], "generate: 'model' is no run directory"),
        (["generate", "runs/demo", "Hello", "--compare"], "generate: 'runs/demo' has no finished sft stage"),
    ],
)
def test_a_model_that_is_not_there_is_named_in_one_sentence(words, sentence, capsys):
    recipe = recipe_with()
    RunDirectory.of(recipe).save_recipe(recipe)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}") and not Path("new").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--temperature", "0"],
        ["--max-new-tokens", "0"],
        ["--system", "best"],
        ["--interactive"],
        ["--compare", "--system", "sft"],
    ],
)
def test_options_out_of_range_or_that_do_not_go_together_are_named(words, capsys):
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


def answer_of(folder: Path, text: str) -> str:
    """What a whole model in a folder writes."""
    config = ModelConfig(model_name_or_path=str(folder))
    model, tokenizer = load_model(folder, config).eval(), load_tokenizer(folder, config)
    ids = encode_prompts(tokenizer, [text])
    return decode(tokenizer, generate(model, tokenizer, ids, Decoding(8), 1))[0]


def test_a_terminal_gets_the_answer_token_by_token(trained, capsys, monkeypatch):
    assert main(["generate", "runs/demo", "say north", "--system", "sft"]) == 0
    whole = capsys.readouterr().out
    assert whole == answer_of(RUN / "sft", "say north\n") + "\n" and len(whole.split()) > 1
    pieces, write = [], sys.stdout.write
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "write", lambda text: pieces.append(text) or write(text))
    assert main(["generate", "runs/demo", "say north", "--system", "sft"]) == 0
    assert capsys.readouterr().out == whole and len([text for text in pieces if text.strip()]) > 1


def test_an_answer_is_as_long_as_the_model_has_room_for(trained, capsys):
    folder = str(RUN / "sft")  # of 64 positions, while 128 tokens are the default
    assert main(["generate", folder, "say north\n"]) == 0
    assert capsys.readouterr().out.startswith(answer_of(RUN / "sft", "say north\n"))
    assert main(["generate", folder, "say north\n", "--max-new-tokens", "128"]) == 2
    assert "--max-new-tokens: the prompt of" in capsys.readouterr().err
    assert main(["generate", folder, "say north " * 40]) == 2
    assert "PROMPT: the prompt of" in capsys.readouterr().err


def test_systems_stand_side_by_side(trained, capsys):
    assert main(["generate", "runs/demo", "say north", "--compare"]) == 0
    text = capsys.readouterr().out
    assert [word for word in text.split() if word in ("base", "sft", "ppo")] == ["base", "sft", "ppo"]
    sft = answer_of(RUN / "sft", "say north\n")
    (row,) = [line for line in text.splitlines() if sft in line]
    assert row.split("│")[2].strip() == sft != row.split("│")[3].strip()
    shutil.rmtree(RUN / "ppo")
    assert main(["generate", "runs/demo", "say north", "--compare"]) == 0
    assert " ppo " not in capsys.readouterr().out


def give_lines(monkeypatch, lines: list[str | BaseException]) -> None:
    """Let `input` return these lines, and then the end of the input."""
    lines = iter([*lines, EOFError()])

    def read(prompt: str = "") -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)


def test_lines_are_answered_one_by_one(trained, capsys, monkeypatch):
    give_lines(monkeypatch, ["say north", "", "word " * 100, "say south"])
    assert main(["generate", "runs/demo", "--interactive", "--system", "sft"]) == 0
    captured = capsys.readouterr()
    assert captured.out.split("\n")[:2] == [answer_of(RUN / "sft", f"say {p}\n") for p in ("north", "south")]
    assert "error: generate: PROMPT: the prompt of " in captured.err and "64 positions" in captured.err


def test_a_chat_remembers_its_turns_until_an_empty_line(trained, capsys, monkeypatch):
    folder = RUN / "sft"
    tokenizer = load_tokenizer(folder, ModelConfig(model_name_or_path=str(folder)))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    read = []
    monkeypatch.setattr(
        "pipeline.cli.generate_command.encode_prompts", lambda t, p, e: read.append(p[0]) or encode_prompts(t, p, e)
    )
    give_lines(monkeypatch, ["say north", "and south", "", "say east", KeyboardInterrupt()])
    assert main(["generate", str(folder), "--interactive", "--max-new-tokens", "4"]) == 0
    answers = capsys.readouterr().out.split("\n")
    assert [len(chat) for chat in read] == [1, 3, 1]
    assert read[1] == [
        *read[0],
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "and south"},
    ]


def test_models_that_transformers_decodes_are_watched_too(trained, monkeypatch):
    config = ModelConfig(model_name_or_path=str(RUN / "sft"))
    model, tokenizer = load_model(RUN / "sft", config).eval(), load_tokenizer(RUN / "sft", config)
    ids, seen = encode_prompts(tokenizer, ["say north\n"]), {True: [], False: []}
    for supported, rows in seen.items():
        monkeypatch.setattr("pipeline.models.generation.supports_decode_loop", lambda model, yes=supported: yes)
        (written,) = generate(model, tokenizer, ids, Decoding(8), 1, lambda now, rows=rows: rows.extend(now))
        assert rows == [written[:length] for length in range(1, len(written) + 1)] and len(rows) > 1
    assert seen[True] == seen[False]


def test_an_adapter_is_exported_alone_and_finds_its_base(trained, capsys):
    assert main(["export", "runs/demo", "adapter", "--adapter"]) == 0
    assert not (Path("adapter") / "model.safetensors").exists() and (Path("adapter") / "tokenizer.json").is_file()
    card = ModelCard.load("adapter/README.md")
    assert card.data.library_name == "peft" and 'from_pretrained("adapter")' in card.text
    assert main(["export", "runs/demo", "whole"]) == 0
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        logits = AutoPeftModelForCausalLM.from_pretrained("adapter").eval()(ids).logits
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained("whole").eval()(ids).logits, logits)
        assert (AutoModelForCausalLM.from_pretrained(RUN / "sft").eval()(ids).logits - logits).abs().max() > 0.1
    assert main(["export", "runs/demo", "sft", "--adapter", "--system", "sft"]) == 2
    assert "--adapter: " in (error := capsys.readouterr().err) and "without an adapter" in error


@pytest.mark.parametrize("target", ["new", "new/folder", "empty"])
def test_a_model_is_exported_whole_or_not_at_all(trained, target, capsys, monkeypatch):
    Path("empty").mkdir()
    full = "I/O error: No space left on device (os error 28)"

    def fail(*_: object) -> None:
        raise SafetensorError(full)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.cli.export_command.save_processor", fail)  # after the weights
        assert main(["export", "runs/demo", target]) == 2
        assert capsys.readouterr().err == f"error: export: {full}\n"
        assert not list(Path().rglob("*export-*")) and not list(Path("empty").iterdir())
        assert target == "empty" or not Path(target).exists()
        assert main(["push", "runs/demo", "me/model", "--dry-run"]) == 2
        assert capsys.readouterr().err == f"error: push: {full}\n"
    assert main(["export", "runs/demo", target]) == 0
    assert not list(Path().rglob("*export-*")) and Path(target, "model.safetensors").is_file()
    assert Path(target).stat().st_mode == RUN.stat().st_mode
    monkeypatch.setattr("pipeline.cli.generate_command.load_writer", fail)
    assert main(["generate", "runs/demo", "say north"]) == 2
    assert f"error: generate: {full}\n" in capsys.readouterr().err


def test_an_sft_model_does_not_pass_for_a_policy_that_is_not_finished(trained, capsys):
    (RUN / "ppo/stage.json").rename(RUN / "ppo/started.json")
    for words in (["export", "runs/demo", "policy"], ["push", "runs/demo", "me/policy", "--dry-run"]):
        assert main(words) == 2 and not Path("policy").exists()
        assert "ppo is not finished; run its recipe again, or name --system sft" in capsys.readouterr().err
    assert main(["export", "runs/demo", "model", "--system", "sft"]) == 0
    recipe = recipe_with("ppo=null", "eval.systems=[base, sft]", "model={from_scratch: {hidden_size: 32}}")
    RunDirectory.of(recipe).save_recipe(recipe)
    assert main(["export", "runs/demo", "other"]) == 0  # there is no other


def test_an_adapter_of_a_run_that_was_moved_names_the_base_where_it_is_now(trained):
    RUN.rename("elsewhere")
    assert main(["export", "elsewhere", "adapter", "--adapter"]) == 0
    settings = json.loads(Path("adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(Path("elsewhere/sft").resolve())


def test_an_adapter_of_a_run_that_was_copied_names_the_base_of_the_copy(trained, tmp_path, monkeypatch):
    settings = RUN / "ppo" / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"runs/demo/sft"', json.dumps(str((RUN / "sft").resolve()))))
    copied = shutil.copytree(RUN, tmp_path / "others" / "copied")
    monkeypatch.chdir(tmp_path / "others")
    assert main(["export", "copied", "adapter", "--adapter"]) == 0
    settings = json.loads(Path("adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((copied / "sft").resolve())
    (copied / "sft" / "tokenizer.json").write_text("{")
    assert main(["export", "copied", "half", "--adapter"]) == 2 and not Path("half").exists()


def test_the_recipe_of_an_older_version_names_models_and_does_not_train(trained, capsys):
    file = RUN / "recipe.yaml"
    text = file.read_text().replace("ppo:\n", "ppo:\n  whiten_advantages: false\n  former_key: {a: 1}\n")
    file.write_text(text.replace("sft:\n", "sft:\n  use_cpu: true\n"))
    assert load_stored_recipe(file) == trained
    assert main(["generate", "runs/demo", "say north"]) == 0
    assert main(["export", "runs/demo", "exported"]) == 0 and "former_key" in Path("exported/README.md").read_text()
    with pytest.raises(RecipeError, match="whiten_advantages"):
        load_recipe(file)
    assert main(["run", str(file)]) == 2 and "whiten_advantages" in capsys.readouterr().err
    file.write_text(text.replace("seed: 0", "seed: none"))
    with pytest.raises(RecipeError, match="seed"):
        load_stored_recipe(file)
