"""Models on the Hub are loaded by the commit of the snapshot in the local cache."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.models import hub

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def snapshot(tmp_path, monkeypatch) -> Path:
    """A snapshot of `nobody/tiny` in a cache of the Hub, to which `main` points."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--nobody--tiny"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return folder


def test_the_commit_of_a_revision():
    assert hub.cached_commit("nobody/tiny") == hub.cached_commit("nobody/tiny", COMMIT) == COMMIT
    assert hub.cached_commit("nobody/tiny", "v2") is hub.cached_commit("nobody/else") is None
    assert hub.cached_commit("/no/form/of/an/id") is None


def test_an_adapter_has_a_commit_too(snapshot):
    (snapshot / "config.json").rename(snapshot / hub.ADAPTER_FILE)
    assert hub.cached_commit("nobody/tiny") == COMMIT


@pytest.mark.parametrize(("read", "library"), [("read_config", "AutoConfig"), ("read_tokenizer", "AutoTokenizer")])
def test_what_is_cached_is_loaded_by_its_commit(monkeypatch, tmp_path, read, library):
    revisions = []
    load = staticmethod(lambda path, revision, **options: revisions.append(revision))
    monkeypatch.setattr(getattr(hub, library), "from_pretrained", load)
    for path in ("nobody/tiny", "nobody/else", str(tmp_path)):
        getattr(hub, read)(path, "main")
    assert revisions == [COMMIT, "main", "main"]


def test_nothing_is_downloaded_that_is_here(monkeypatch, tmp_path):
    names = []

    def none(path, name, **options):
        names.append(name)
        raise OSError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", none)
    for path in ("nobody/tiny", str(tmp_path), "nobody/else"):
        hub.fetch_commit(path)
    assert names == list(hub.CONFIG_FILES)  # of the model that is not here alone
