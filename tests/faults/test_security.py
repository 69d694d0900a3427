"""Files that want to run code, paths that lead outside, secrets, and texts that want to be HTML: none gets through."""

import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_run import COLUMNS, MAINS, PARALLEL, only_error, outcome, write_parallel, write_recipe, write_rows
from transformers import LlamaForSequenceClassification

from pipeline.models.config import ModelConfig
from pipeline.models.hub import read_config
from pipeline.models.loading import load_model, load_policy, load_tokenizer
from pipeline.models.text import encode_prompts
from pipeline.runtime.messages import SECRET_NAMES, one_line, redact
from pipeline.tasks import columns, load_task
from pipeline.trainers.checkpoints import list_checkpoints

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]


class Malice:
    """Unpickled, it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    """What is there once malicious code has run."""
    return tmp_path / "owned"


@pytest.fixture
def recipe(tmp_path) -> str:
    """A recipe over four sentence pairs."""
    write_parallel(tmp_path)
    return write_recipe(tmp_path, PARALLEL)


# 33: pickles


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def pickled_weights(directory: Path, name: str, mark: Path, how: str) -> Path:
    """Replace the weights of a model or adapter by a pickle that is malicious."""
    for file in directory.glob("*.safetensors"):
        file.unlink()
    if how == "torch":
        torch.save({"weight": Malice(mark)}, directory / name)
    else:
        (directory / name).write_bytes(pickle.dumps({"weight": Malice(mark)}))
    return directory


def new_adapter(taught, directory: Path) -> Path:
    model = get_peft_model(taught(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickled_weights_of_a_model_are_never_run(recipe, capfd, tmp_path, base_directory, mark, how):
    model = pickled_weights(copy(base_directory, tmp_path / "model"), "pytorch_model.bin", mark, how)
    with pytest.raises(
        ValueError, match=r"model' are a pickle of more than tensors, which could run code: it is not lo"
    ):
        load_model(model, ModelConfig(str(model)))
    overrides = [f"model={{model_name_or_path: {model}}}", f"ppo.sft_model_path={model}", "eval.systems=[sft, ppo]"]
    for program in ("sft.py", "ppo.py", "eval.py"):
        code = outcome(MAINS[program], recipe, *overrides)
        said = capfd.readouterr().err
        assert code == 2 and "Traceback" not in said and "are a pickle of more than tensors" in said
    assert not mark.exists()


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickled_weights_of_an_adapter_are_never_run(taught, taught_directory, tmp_path, mark, how):
    adapter = pickled_weights(new_adapter(taught, tmp_path / "adapter"), "adapter_model.bin", mark, how)
    config = ModelConfig(str(taught_directory))
    for load in (lambda: load_model(adapter, config), lambda: load_policy(adapter, taught_directory, config)):
        with pytest.raises(ValueError, match=r"are a pickle of more than tensors, which could run code"):
            load()
    assert not mark.exists()


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickled_weights_of_a_classifier_are_never_run(recipe, capfd, tmp_path, base_directory, mark, how):
    config = read_config(str(base_directory))
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    load_tokenizer(base_directory, ModelConfig(str(base_directory))).save_pretrained(tmp_path / "judge")
    judge = pickled_weights(tmp_path / "judge", "pytorch_model.bin", mark, how)
    assert outcome(MAINS["sft.py"], recipe) == 0
    capfd.readouterr()
    overrides = ["ppo.rewards=[{name: learned}]", f"ppo.reward_model_path={judge}"]
    assert outcome(MAINS["ppo.py"], recipe, *overrides) == 2
    assert "are a pickle of more than tensors" in only_error(capfd.readouterr().err)
    assert not mark.exists()


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_pickles_in_a_checkpoint_are_never_run(recipe, capfd, tmp_path, mark, stage):
    """Each file that is read, and files that transformers knows, in a manifest as an attacker would write it."""
    write = {"sft": ["sft.save_strategy=epoch"], "ppo": ["ppo.save_steps=1"]}
    overrides = [*write["sft"], *write["ppo"]]
    for program in ("sft.py", f"{stage}.py"):
        assert outcome(MAINS[program], recipe, *overrides) == 0
    place = tmp_path / "runs" / "tiny" / stage
    (newest,) = list_checkpoints(place / "checkpoints")[-1:]
    assert not list(newest.rglob("training_args.bin"))
    whole = copy(place, tmp_path / "whole")
    ours = {"sft": ["*.pt"], "ppo": ["optimizer.json", "random_state.json", "*.safetensors"]}[stage]
    names = {file.name for pattern in ours for file in newest.rglob(pattern)} | {"training_args.bin", "rng_state.pth"}
    assert len(names) >= 4
    for name in sorted(names):
        shutil.rmtree(place)
        copy(whole, place)
        (place / "stage.json").unlink()
        for file in place.glob("*.safetensors"):
            file.unlink()
        torch.save({"optimizer": Malice(mark)}, newest / name)
        manifest = json.loads((newest / "manifest.json").read_text())
        content = (newest / name).read_bytes()
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (newest / "manifest.json").write_text(json.dumps(manifest))
        capfd.readouterr()
        code, said = outcome(MAINS[f"{stage}.py"], recipe, *overrides), capfd.readouterr().err
        if name in ("training_args.bin", "rng_state.pth"):
            assert code == 0  # nobody reads them
        else:
            wanted = {
                "sft": "holds more than tensors and plain values, which could run code",
                "ppo": "cannot be read: ",
            }
            assert code == 1 and wanted[stage] in only_error(said)
        assert not mark.exists(), name


def test_a_pickle_in_the_schema_of_a_parquet_file_is_never_run(tmp_path, mark):
    """pyarrow once unpickled extension types that a file declares."""
    declared = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Malice(mark)),
    }
    field = pyarrow.field("english", pyarrow.string(), metadata=declared)
    table = pyarrow.table([["a", "b", "c"]], schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    parts = {"train": "train[:1]", "validation": "train[1:2]", "test": "train[2:]"}
    config = columns.Config(path=str(tmp_path / "a.parquet"), prompt="english", completion="english", **parts)
    assert load_task("columns", config).train["completion"][:] == ["a"]
    assert not mark.exists()


# 33: code that comes with a model or data


CODE = "import os\nos.mkdir({mark!r})\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"


def with_code(directory: Path, mark: Path, file: str) -> Path:
    """A model whose config or tokenizer names a module of its own."""
    (directory / "own.py").write_text(CODE.format(mark=str(mark)))
    settings = json.loads((directory / file).read_text())
    if file == "config.json":
        settings |= {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
        }
    else:
        settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Config", None]}}
    (directory / file).write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_not_run_unless_the_recipe_trusts_it(
    recipe, capfd, tmp_path, base_directory, mark, file, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    model = with_code(copy(base_directory, tmp_path / "model"), mark, file)
    override = f"model={{model_name_or_path: {model}}}"
    for program in ("run.py", "sft.py"):
        if program == "sft.py" or file == "config.json":
            assert outcome(MAINS[program], recipe, override) in (1, 2)
            said = only_error(capfd.readouterr().err)
            assert f"{str(model)!r} comes with Python code of its own (auto_map), which is not run" in said
            assert "set model.trust_remote_code: true, which is recorded with the run" in said
    assert not mark.exists()


def test_trust_is_shown_in_the_record_of_the_run(recipe, capfd, tmp_path, base_directory):
    override = f"model={{model_name_or_path: {base_directory}, trust_remote_code: true}}"
    assert outcome(MAINS["sft.py"], recipe, override) == 0
    assert "sft: model.trust_remote_code is true: Python code that comes with" in capfd.readouterr().err
    run = tmp_path / "runs" / "tiny"
    assert "trust_remote_code: true" in (run / "recipe.yaml").read_text()
    assert json.loads((run / "sft" / "stage.json").read_text())["settings"]["model.trust_remote_code"] is True


def test_trust_in_the_recipes_model_is_not_trust_in_the_base_of_an_adapter(taught, taught_directory, tmp_path, mark):
    adapter = new_adapter(taught, tmp_path / "run" / "adapter")
    base = with_code(copy(taught_directory, tmp_path / "run" / "base"), mark, "config.json")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    with pytest.raises(ValueError, match="comes with Python code of its own"):
        load_model(adapter, ModelConfig(str(taught_directory), trust_remote_code=True))
    assert not mark.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for c in [].__class__.__base__.__subclasses__() %}{{ c.__init__.__globals__.os.mkdir(MARK) }}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.mkdir(MARK) }}",
        "{{ messages.append(1) }}",
        "{% for a in range(10000000000) %}{% endfor %}",
        "{{ nothing.at.all }}",
    ],
)
def test_chat_templates_run_in_a_sandbox(base_directory, tmp_path, mark, template):
    model = copy(base_directory, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template.replace("MARK", repr(str(mark))))
    tokenizer = load_tokenizer(model, ModelConfig(str(model)))
    with pytest.raises(
        ValueError, match=r"^the chat template of '.*model' cannot be filled with the data's messages \("
    ):
        encode_prompts(tokenizer, [[{"role": "user", "content": "hi"}]])
    assert not mark.exists()


def test_scripts_beside_data_are_not_run(tmp_path, capfd, mark):
    """A data set as a Python script, and a directory with one in it."""
    write_rows(tmp_path)
    script = f"import os\nos.mkdir({str(mark)!r})\n"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(script)
    (tmp_path / "train.py").write_text(script)
    for path, message in (("data", "was not written by save_to_disk"), ("{split}.py", "is in no known format")):
        assert outcome(MAINS["run.py"], write_recipe(tmp_path, COLUMNS), f"task.path='{path}'") == 2
        assert message in only_error(capfd.readouterr().err)
    assert not mark.exists()


def test_metrics_of_the_hub_are_scripts_and_need_trust_by_name(recipe, capfd):
    for override in ("eval.metrics=[evaluate:meteor]", "ppo.rewards=[evaluate:meteor]"):
        assert outcome(MAINS["run.py"], recipe, override) == 2
        said = only_error(capfd.readouterr().err)
        assert "metric 'evaluate:meteor' is a script of the Hugging Face Hub, which runs with your rights" in said
        assert "{name: evaluate:meteor, trust_remote_code: true}" in said


# 34: paths that lead outside


@pytest.mark.parametrize("base", ["/usr/lib/model", "../../../elsewhere", "~root/model"])
def test_an_adapter_opens_no_directory_outside(recipe, capfd, taught, tmp_path, base, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    adapter = new_adapter(taught, tmp_path / "here" / "runs" / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    for program in ("run.py", "sft.py"):
        assert outcome(MAINS[program], recipe, f"model={{model_name_or_path: {adapter}}}") == 2
        said = only_error(capfd.readouterr().err)
        assert f"names the base model {base!r}, which is outside of {tmp_path / 'here'}" in said
        assert f"set model.model_name_or_path: {base}, or merge the adapter first" in said


@pytest.mark.parametrize(
    "content", ["{}", "{", "[]", '{"base_model_name_or_path": null}', '{"base_model_name_or_path": 3}']
)
def test_an_adapter_without_a_base_is_named(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_model(tmp_path, ModelConfig("some/model"))


# 34: secrets

SECRETS = {
    "HF_TOKEN": "hf_EnvironmentSecret0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_PASSWORD": "correct horse battery",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
}
LEAKING = """
import os
def reward(prompts, completions, **columns):
    if os.environ.get("LEAK"):
        raise ValueError("401 for " + os.environ["HF_TOKEN"] + " at https://me:" + os.environ["MY_PASSWORD"] + "@host")
    return [0.0] * len(completions)
"""


def test_secrets_of_the_environment_are_in_no_file_and_no_message(recipe, capfd, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "leaking.py").write_text(LEAKING)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "leaking", raising=False)
    override = "ppo.rewards=[leaking.reward]"
    for program in ("sft.py", "ppo.py", "eval.py"):
        assert outcome(MAINS[program], recipe, override) == 0
    said = "".join(capfd.readouterr())
    monkeypatch.setenv("LEAK", "1")
    other = ["seed=1", f"ppo.sft_model_path={tmp_path}/runs/tiny/sft"]
    assert outcome(MAINS["ppo.py"], recipe, override, *other) == 1
    error = only_error(capfd.readouterr().err)
    assert "raised ValueError: 401 for *** at https://" in error
    written = b"".join(file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file())
    for secret in SECRETS.values():
        assert secret not in said and secret not in error and secret.encode() not in written


SECRET = SECRETS["AWS_SECRET_ACCESS_KEY"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sft.lr_scheduler_type", SECRET, "a secret of the environment"),
        ("ppo.rewards", f"[{{name: constant, options: {{key: {SECRET}}}}}]", "a secret of the environment"),
        ("sft.num_train_epochs", f"[{SECRET}", "not valid YAML"),
        (f"ppo.{SECRET}", "1", "***"),
    ],
)
@pytest.mark.parametrize("place", ["override", "file"])
def test_secrets_of_the_environment_are_refused_in_a_recipe(
    recipe, capfd, tmp_path, monkeypatch, key, value, words, place
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    arguments = [recipe, f"{key}={value}"]
    if place == "file":
        section, _, last = key.partition(".")
        text = Path(recipe).read_text()
        Path(recipe).write_text(text.replace(f"{section}:", f"{section}: {{{last}: {value}}}\nremoved:"))
        arguments = [recipe]
    for program in ("run.py", "sft.py"):
        assert outcome(MAINS[program], *arguments) == 2
        printed = "".join(capfd.readouterr())
        assert SECRET not in printed and printed.startswith("error: ") and printed.count("\n") == 1
        assert words in printed
    assert not (tmp_path / "runs").exists()


def test_secrets_are_known_by_the_names_of_their_variables():
    secret = ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "PGPASSWORD", "AWS_ACCESS_KEY_ID", "db_passwd", "KEY"]
    plain = ["HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEY", "HOME", "PASSWORD_FILE"]
    assert [name for name in secret if not SECRET_NAMES.search(name)] == []
    assert [name for name in plain if SECRET_NAMES.search(name)] == []


def test_what_is_printed_is_one_line_without_secrets_and_control_characters(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel words")
    text = f"a\n\x1b[31m {SECRETS['HF_TOKEN']} \u202egpj.exe https://u:p@h parallel words"
    assert one_line(text) == "a \\x1b[31m *** \\u202egpj.exe https://***@h parallel words"
    assert redact("https://host/path?x=1 and a:b@c") == "https://host/path?x=1 and a:b@c"
