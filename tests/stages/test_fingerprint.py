"""What a stage depends on: settings, data files, models; what is read to know that, without a network."""

import os
import shutil
import socket
import sys
from pathlib import Path

import datasets
import pytest
from demo_run import DATA_FILES, OWN, complete, recipe_with
from huggingface_hub import constants
from speech_toys import tone, write_data, write_wav

from pipeline.models import hub
from pipeline.stages import digests, fingerprint
from pipeline.stages.directory import RunDirectory
from pipeline.stages.fingerprint import (
    SOUND,
    setting_differences,
    stage_fingerprint,
    stage_settings,
    stage_state,
    stage_status,
)
from pipeline.stages.plan import plan_stages
from pipeline.stages.stage import begin_stage, finish_stage, run_stage


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("name=other", []),
        ("output_dir=elsewhere", []),
        ("seed=1", ["sft", "ppo", "eval"]),
        ("model.lora_r=4", ["sft", "ppo", "eval"]),
        ("model.from_scratch.hidden_size=64", ["sft", "ppo", "eval"]),
        ("task.max_test_examples=3", ["eval"]),
        ("sft.learning_rate=1", ["sft", "ppo", "eval"]),
        ("sft.use_peft=true", ["sft", "ppo", "eval"]),
        ("ppo.kl_coef=1", ["ppo", "eval"]),
        ("ppo.rewards=[ter]", ["ppo", "eval"]),
        ("ppo.rewards=[{name: bleu, lowercase: true}]", ["ppo", "eval"]),
        ("eval.num_beams=2", ["eval"]),
        ("eval.metrics=[ter]", ["eval"]),
    ],
)
def test_a_fingerprint_covers_what_a_stage_depends_on(override, changed):
    before, after = recipe_with(), recipe_with(override)
    different = [stage for stage in OWN if stage_fingerprint(before, stage) != stage_fingerprint(after, stage)]
    assert different == changed


def test_clusters_change_the_evaluation_alone():
    columns = "task={name: columns, path: 'x/{split}.jsonl', prompt: question, references: answers, cluster: COLUMN}"
    one, other = (recipe_with(columns.replace("COLUMN", column)) for column in ("page", "book"))
    changed = [stage for stage in OWN if stage_settings(one, stage) != stage_settings(other, stage)]
    assert changed == ["eval"] and stage_settings(one, "eval")["task.cluster"] == "page"


def test_a_fingerprint_covers_an_external_sft_model():
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    recipe = recipe_with("ppo.sft_model_path=model")
    other_sft = recipe_with("ppo.sft_model_path=model", "sft.learning_rate=1")
    assert stage_fingerprint(recipe, "ppo") == stage_fingerprint(other_sft, "ppo")
    before = stage_fingerprint(recipe, "ppo")
    Path("model/model.safetensors").write_text("weights")
    assert stage_fingerprint(recipe, "ppo") != before
    Path("model/stage.json").write_text('{"fingerprint": "1"}')
    with_record = stage_fingerprint(recipe, "ppo")
    os.utime("model/model.safetensors", (0, 0))  # a copy with other times is the same model where a record says so
    assert stage_fingerprint(recipe, "ppo") == with_record
    Path("model/stage.json").write_text('{"fingerprint": "2"}')
    assert stage_fingerprint(recipe, "ppo") != with_record


def test_data_edited_while_a_stage_runs_does_not_pass_for_what_it_read():
    recipe = recipe_with()
    begin_stage(RunDirectory.of(recipe), recipe, "sft")
    Path("train.en").write_text("edited\n" * 10)
    finish_stage(RunDirectory.of(recipe), recipe, "sft")
    assert stage_status(RunDirectory.of(recipe), recipe, "sft") == "changed"
    assert setting_differences(RunDirectory.of(recipe), recipe, "sft") == ["train.en: its contents changed"]


def test_a_changed_sound_file_makes_every_stage_out_of_date(tmp_path):
    folder = write_data(tmp_path / "clips")
    recipe = recipe_with(f"task={{name: speech, path: '{{split}}.jsonl', data_dir: {folder}}}")
    run, path = RunDirectory.of(recipe), folder / "test/1.wav"
    complete(recipe, *OWN)
    assert [stage_status(run, recipe, stage) for stage in OWN] == ["complete"] * 3
    write_wav(path, tone(["one"] * 4))
    assert [stage_status(run, recipe, stage) for stage in OWN] == ["changed"] * 3
    assert setting_differences(run, recipe, "sft") == [f"{SOUND}: its contents changed"]
    complete(recipe, *OWN)
    os.utime(path, (0, 0))
    assert stage_status(run, recipe, "sft") == "changed"
    complete(recipe, *OWN)
    path.unlink()
    assert stage_status(run, recipe, "sft") == "changed"


def test_a_run_from_before_sound_files_counted_is_still_complete(tmp_path, monkeypatch):
    folder = write_data(tmp_path / "clips")
    recipe = recipe_with(f"task={{name: speech, path: '{{split}}.jsonl', data_dir: {folder}}}")
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_sound_state", lambda *_: {})
        complete(recipe, "sft")
    assert stage_status(RunDirectory.of(recipe), recipe, "sft") == "complete"
    assert setting_differences(RunDirectory.of(recipe), recipe, "sft") == []


def test_differences_name_each_setting_with_both_values():
    recipe = recipe_with()
    complete(recipe, "sft", "ppo", "eval")
    other = recipe_with("ppo.kl_coef=0.1", "sft.warmup_steps=3", "ppo.rewards=[bleu, {name: ter, weight: -1}]")
    assert setting_differences(RunDirectory.of(recipe), other, "eval") == [
        "sft.warmup_steps: (not set) -> 3.0",
        'ppo.rewards.1.name: (not set) -> "ter"',
        "ppo.rewards.1.weight: (not set) -> -1.0",
        'ppo.rewards.1.score_scaling: (not set) -> "none"',
        "ppo.kl_coef: 0.05 -> 0.1",
    ]
    assert setting_differences(RunDirectory.of(other), recipe_with("ppo=null"), "eval")[-1] == (
        "ppo.load_best_model_at_end: true -> (not set)"
    )
    assert setting_differences(RunDirectory.of(recipe), recipe, "eval") == []


def test_a_record_that_is_not_whole_counts_as_changed():
    recipe = recipe_with()
    complete(recipe, "sft")
    Path("runs/demo/sft/stage.json").write_text('{"stage": "sf')
    assert stage_status(RunDirectory.of(recipe), recipe, "sft") == "changed"
    assert setting_differences(RunDirectory.of(recipe), recipe, "sft") == ["its record cannot be read"]


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The data files that are read for their digest, each as often as it is read."""
    names: list[str] = []
    sha256 = digests.sha256

    def counted(path: Path) -> str:
        names.extend([path.name] if path.name in DATA_FILES else [])
        return sha256(path)

    monkeypatch.setattr(digests, "sha256", counted)
    monkeypatch.setattr(digests, "_digests", {})
    return names


def as_new_process() -> None:
    """Forget what a process has read."""
    digests._digests.clear()


def test_a_chain_reads_its_data_once(reads, fresh_accelerate):
    """Each stage is a process of its own; later ones believe the record while sizes and times are the same."""
    recipe = recipe_with()
    for stage in OWN:
        as_new_process()
        assert run_stage(recipe, stage, lambda *_: {}) == 0
        assert run_stage(recipe, stage, lambda *_: {}) == 0  # already complete
    assert sorted(reads) == sorted(DATA_FILES)
    reads.clear()
    as_new_process()
    plan = plan_stages(recipe, only=None, start=None, force=False)
    assert [planned.action for planned in plan] == ["skip"] * 3 and reads == []


def test_a_file_with_another_time_is_read_again(reads):
    recipe, run = recipe_with(), RunDirectory.of(recipe_with())
    complete(recipe, "sft")
    reads.clear()
    as_new_process()
    os.utime("train.de", (0, 0))  # a copy, say
    assert stage_status(run, recipe, "sft") == "complete" and reads == ["train.de"]
    Path("train.de").write_text("da 0\n" + Path("train.de").read_text()[5:])  # of the same size
    assert stage_status(run, recipe, "sft") == "changed"
    assert setting_differences(run, recipe, "sft") == ["train.de: its contents changed"]
    assert reads == ["train.de"] * 2


@pytest.fixture
def no_network(monkeypatch) -> list[object]:
    """The addresses that are asked for although the network may be used."""
    asked: list[object] = []

    def refuse(*arguments, **options):
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return asked


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def snapshot(cache: Path, commit: str, name: str = "nobody/tiny") -> Path:
    """Put a snapshot of a model into the cache and point `main` to it; return its folder."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return folder


HUB = ("model={model_name_or_path: nobody/tiny}", "task={name: columns, path: nobody/rows, prompt: a, completion: b}")


def test_whether_a_stage_is_done_is_answered_without_a_network(cache, no_network):
    snapshot(cache, "a" * 40)
    recipe = recipe_with(*HUB)
    run = RunDirectory.of(recipe)
    assert stage_status(run, recipe, "sft") == "absent"
    complete(recipe, "sft")
    assert stage_status(run, recipe, "sft") == "complete"
    assert stage_status(run, recipe_with(*HUB, "task.revision=v2"), "sft") == "changed"
    assert no_network == []


def test_a_hub_model_is_recorded_by_its_commit(cache, no_network):
    snapshot(cache, "a" * 40)
    recipe = recipe_with(HUB[0])
    run = RunDirectory.of(recipe)
    complete(recipe, "sft")
    assert stage_state(recipe, "sft")["inputs"]["nobody/tiny"] == "a" * 40
    snapshot(cache, "b" * 40)
    assert stage_status(run, recipe, "sft") == "changed"
    assert setting_differences(run, recipe, "sft") == ["nobody/tiny: its contents changed"]
    pinned = recipe_with("model={model_name_or_path: nobody/tiny, model_revision: " + "a" * 40 + "}")
    assert stage_state(pinned, "sft")["inputs"]["nobody/tiny"] == "a" * 40
    shutil.rmtree(cache)  # nothing is known that contradicts the record
    assert stage_status(run, recipe, "sft") == "complete"


def test_a_hub_model_that_is_not_here_is_asked_for_when_a_stage_begins(cache, monkeypatch):
    downloads = []

    def download(path: str, name: str, revision: str, **options) -> None:
        downloads.append((path, name, revision))
        snapshot(cache, "c" * 40, path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    recipe = recipe_with("ppo.sft_model_path=nobody/other")
    run = RunDirectory.of(recipe)
    for _ in range(2):
        begin_stage(run, recipe, "ppo")
        finish_stage(run, recipe, "ppo")
        assert stage_status(run, recipe, "ppo") == "complete"
    assert downloads == [("nobody/other", "config.json", "main")]
    assert stage_state(recipe, "ppo")["inputs"]["nobody/other"] == "c" * 40


def test_a_users_code_and_what_it_imports_are_inputs_of_the_stages_that_run_it(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_task.py").write_text("from pipeline.tasks.parallel import Config, files, load\n")
    Path("my_reward.py").write_text("from my_words import WORDS\ndef hits(completions, **_): return [0.0] * 2\n")
    Path("my_words.py").write_text("WORDS = ['a']\n")
    Path("my_metric.py").write_text("from pipeline.metrics.bleu import load\ndef own(): return load('bleu', None)\n")
    overrides = ["task.name=my_task.py", "ppo.rewards=[my_reward:hits]", "eval.metrics=[my_metric.py:own]"]
    recipe, chosen = recipe_with(*overrides), recipe_with(*overrides, "ppo.metric_for_best_model=eval_bleu")
    for name, changed in (
        ("my_task.py", ["sft", "ppo", "eval"]),
        ("my_reward.py", ["ppo", "eval"]),
        ("my_words.py", ["ppo", "eval"]),
        ("my_metric.py", ["eval"]),
    ):
        before, with_metric = {s: stage_fingerprint(recipe, s) for s in OWN}, stage_fingerprint(chosen, "ppo")
        with Path(name).open("a") as file:
            file.write("# edited\n")
        assert [s for s in OWN if stage_fingerprint(recipe, s) != before[s]] == changed, name
        assert stage_fingerprint(chosen, "ppo") != with_metric, name


def test_a_metric_for_the_report_alone_is_no_setting_of_ppo():
    chosen = "ppo.metric_for_best_model=eval_chrf"
    one, two = (recipe_with(chosen, f"eval.metrics={names}") for names in ("[chrf, bleu]", "[bleu, ter, chrf]"))
    other = recipe_with(chosen, "eval.metrics=[{name: chrf, options: {word_order: 2}}]")
    assert stage_settings(one, "ppo") == stage_settings(two, "ppo") != stage_settings(other, "ppo")
    assert stage_settings(one, "eval") != stage_settings(two, "eval")


def test_the_plan_names_the_file_of_code_that_was_edited(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("the_reward.py").write_text("from the_words import WORDS\ndef hits(completions, **_): return [0.0] * 2\n")
    Path("the_words.py").write_text("WORDS = ['a']\n")
    recipe = recipe_with("ppo.rewards=[the_reward.hits]")
    run = RunDirectory.of(recipe)
    complete(recipe, "sft", "ppo")
    assert [plan.action for plan in plan_stages(recipe, None, None, False)][:2] == ["skip", "skip"]
    Path("the_words.py").write_text("WORDS = ['b']\n")
    sft, ppo, _ = plan_stages(recipe, None, None, False)
    assert sft.action == "skip" and ppo.action == "run" and "the_words.py: its contents changed" in ppo.reason
    Path("the_reward.py").write_text("def hits(completions, **_): return [0.0] * 2\n")
    assert "the_words.py: no longer read" in setting_differences(run, recipe, "ppo")


def test_the_script_of_a_local_metric_of_the_evaluate_library_is_an_input():
    Path("measure").mkdir()
    Path("measure/measure.py").write_text("import evaluate\n")
    recipe = recipe_with("eval.metrics=['evaluate:./measure']")
    before = {stage: stage_fingerprint(recipe, stage) for stage in OWN}
    Path("measure/measure.py").write_text("import evaluate\n\n")
    assert [stage for stage in OWN if stage_fingerprint(recipe, stage) != before[stage]] == ["eval"]
