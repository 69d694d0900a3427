"""relay push: what would be sent, that nothing of this machine is in it, and that it is what is sent."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM

from pipeline.cli.main import main
from pipeline.cli.push_command import bytes_text, hide_local_paths, local_paths

RUN = Path("runs/demo")


@pytest.fixture
def hub(monkeypatch) -> list[dict]:
    """What the Hub is asked, in place of asking it."""
    calls = []

    def create(self, repo_id: str, **options: object) -> str:
        calls.append({"create": repo_id, **options})
        return f"https://huggingface.co/{repo_id}"

    def upload(self, **options: object) -> None:
        folder = Path(options["folder_path"])
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        AutoModelForCausalLM.from_pretrained(folder)
        calls.append({"upload": options["repo_id"], "files": files})

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return calls


def test_a_dry_run_shows_repository_files_and_card_and_sends_nothing(trained, hub, capsys):
    before = sorted(RUN.rglob("*"))
    assert main(["push", "runs/demo", "me/my-model", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "repository: me/my-model" in text and "model.safetensors" in text and " total" in text
    assert "# demo: PPO" in text and text.endswith("nothing was sent (--dry-run)\n")
    assert hub == [] and sorted(RUN.rglob("*")) == before


def test_what_is_sent_is_a_whole_model_whose_card_loads_it_by_its_id(trained, hub, capsys):
    assert main(["push", "runs/demo", "me/my-model", "--system", "sft"]) == 0
    created, uploaded = hub
    assert (created["create"], created["private"], created["exist_ok"]) == ("me/my-model", True, True)
    assert set(uploaded["files"]) >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    card = ModelCard(uploaded["files"]["README.md"].decode())
    assert 'from_pretrained("me/my-model")' in card.text and card.data.library_name == "transformers"
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/me/my-model"


def test_no_path_of_this_machine_and_no_secret_leaves_it(trained, hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MY_API_KEY", "a-secret-of-mine")
    text = (RUN / "recipe.yaml").read_text()
    text = text.replace("data_dir: .", f"data_dir: {tmp_path}/private").replace(
        "seed: 0", "seed: 0 # a-secret-of-mine"
    )
    (RUN / "recipe.yaml").write_text(text)
    assert main(["push", "runs/demo", "me/my-model"]) == 0
    sent = b"".join(content for name, content in hub[1]["files"].items() if name.endswith((".md", "config.json")))
    assert str(tmp_path).encode() not in sent and b".../private" in sent and b"secret-of-mine" not in sent
    assert f"{tmp_path}/private" in capsys.readouterr().out.splitlines()[-2]


def test_an_adapter_is_sent_only_over_a_base_that_others_have(trained, hub, capsys):
    assert main(["push", "runs/demo", "me/my-model", "--adapter"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: push: adapter_config.json names") and "without --adapter" in error and hub == []


def test_paths_are_told_from_other_slashes(tmp_path):
    home = Path.home()
    text = f"a/b https://x.org/tmp/y </tmp> {tmp_path}/a.json: '{home}/x' ~/z /no_think 1 / 2 runs/tmp/x `/tmp/q`"
    assert local_paths(text) == [f"{tmp_path}/a.json", f"{home}/x", "~/z", "/tmp/q"]
    card = tmp_path / "card.md"
    card.write_text(f"{home} and {home}/models/mine")
    assert hide_local_paths(card) == [str(home), f"{home}/models/mine"]
    assert card.read_text() == "~ and .../mine"


def test_sizes_have_a_unit_that_fits():
    assert [bytes_text(n) for n in (7, 1500, 3_220_496, 2.5e9)] == ["7 B", "1.5 kB", "3.2 MB", "2.5 GB"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["runs/demo", "a/b/c"], "error: push: Repo id must be in the form"),
        (["nowhere", "me/x"], "error: push: 'nowhere' is neither a run directory"),
        (["runs/demo", "me/x", "--system", "ppo"], "error: push: 'runs/demo' has no finished ppo stage"),
    ],
)
def test_what_cannot_be_sent_is_named(words, sentence, trained, hub, capsys):
    (RUN / "ppo" / "stage.json").unlink()
    assert main(["push", *words]) == 2 and hub == []
    assert capsys.readouterr().err.startswith(sentence)


def test_a_hub_that_refuses_is_one_sentence_with_advice(trained, monkeypatch, capsys):
    def refuse(self, repo_id: str, **options: object) -> None:
        raise RuntimeError("401\nUnauthorized")  # errors of the library are of many kinds

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert main(["push", "runs/demo", "me/x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: push: 'me/x' was not uploaded (401 Unauthorized") and "hf auth login" in error
