"""The reward stage between SFT and PPO on a tiny recipe: what it leaves, how PPO is rewarded, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from pipeline import eval as eval_stage
from pipeline import ppo as ppo_stage
from pipeline import reward as reward_stage
from pipeline import run as chain
from pipeline import sft as sft_stage
from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.reward_model import HEAD_FILE, RewardNetwork, load_record
from pipeline.models.sequences import make_sequences
from pipeline.models.text import encode_completions, encode_prompts

ENGLISH = ["a dog runs", "the cat sleeps", "we eat bread", "a bird sings"]
GERMAN = ["ein Hund läuft", "die Katze schläft", "wir essen Brot", "ein Vogel singt"]
RECIPE = """
name: tiny
output_dir: {root}/runs
model:
  from_scratch: {{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 300}}
task: {{name: parallel, data_dir: {root}, source: "{{split}}.en", target: "{{split}}.de", language: de}}
sft: {{num_train_epochs: 2, gradient_checkpointing: false, max_length: 64, learning_rate: 1e-2}}
reward:
  pairs: {{from: [sft, references], metric: chrf, samples: 3, min_margin: 0.0}}
  min_accuracy: 0
  num_train_epochs: 2
  per_device_train_batch_size: 4
  learning_rate: 1e-2
ppo:
  rewards: [{{name: learned}}, {{name: chrf, weight: 0.5}}]
  total_episodes: 16
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  num_generations: 2
  response_length: 8
eval: {{metrics: [bleu, chrf], num_samples: 2, systems: [sft, ppo], samples_per_prompt: 0}}
"""


@pytest.fixture
def recipe(tmp_path) -> str:
    """A recipe over twelve sentence pairs, whose validation prompts are others."""
    for split in ("train", "validation", "test"):
        english = [f"{text} {n}" for n in range(3) for text in ENGLISH] if split == "train" else ENGLISH
        (tmp_path / f"{split}.en").write_text("\n".join(english) + "\n")
        (tmp_path / f"{split}.de").write_text("\n".join(GERMAN * (3 if split == "train" else 1)) + "\n")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(root=tmp_path))
    return str(path)


@pytest.fixture
def made(recipe, tmp_path) -> Path:
    """The run directory after SFT and the reward stage."""
    assert sft_stage.main([recipe]) == 0
    assert reward_stage.main([recipe]) == 0
    return tmp_path / "runs" / "tiny"


def classifier(directory: Path, tokenizer, **options) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(**{"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                            "num_attention_heads": 2, "num_labels": 1, "pad_token_id": 0, **options})  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_the_chain_rewards_ppo_by_what_the_stage_made(recipe, made, tmp_path, capsys):
    assert ppo_stage.main([recipe]) == 0 and eval_stage.main([recipe]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors", "reward_head.safetensors", "pairs.jsonl"):
        assert (made / "reward" / name).is_file()
    assert {p.name for p in (made / "reward" / "report").iterdir()} == {
        "report.html",
        "report.json",
        "report.md",
        "plots",
    }
    report = json.loads((made / "reward" / "report" / "report.json").read_text())
    assert (
        report["accuracy"]["count"]
        == load_record(made / "reward").held_out_pairs
        == report["pairs"]["kept"]["held_out"]
    )
    assert {c["name"] for c in report["correlations"]} == {"bleu", "chrf", "length, tokens"}
    # The pairs it was trained on answer PPO's prompts, and no held-out pair does.
    assert report["ppo_accuracy"]["count"] == report["training_accuracy"]["count"] == report["pairs"]["kept"]["train"]
    assert report["fresh_accuracy"]["value"] == report["accuracy"]["value"]
    page = (made / "reward" / "report" / "report.html").read_text()
    assert report["verdict"].split("%")[0] in page and page.count("<svg") == 3
    for line in (made / "ppo" / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "eval_reward" in values:  # every part apart
            parts = values["eval_reward/learned"] + 0.5 * values["eval_reward/chrf"]
            assert values["eval_reward"] == pytest.approx(parts, abs=1e-5)
    scores = json.loads((made / "eval" / "report.json").read_text())["systems"]
    first = json.loads((made / "eval" / scores["sft"]["predictions"]).read_text().splitlines()[0])
    expected = raw_scores(made, [first["prompt"]], [first["completion_ids"]])[0]
    record = load_record(made / "reward")
    assert first["rewards"]["learned"] == pytest.approx((expected - record.shift) / record.scale, abs=1e-4)
    assert "reward" in {cost["stage"] for cost in json.loads((made / "eval" / "report.json").read_text())["cost"]}


def test_an_encoder_decoder_goes_through_the_chain(recipe, tmp_path):
    text = Path(recipe).read_text()
    Path(recipe).write_text(text.replace("{hidden_size", "{architecture: t5, hidden_size"))
    for stage in (sft_stage, reward_stage, ppo_stage, eval_stage):
        assert stage.main([recipe]) == 0
    scores = json.loads((tmp_path / "runs" / "tiny" / "eval" / "report.json").read_text())["systems"]
    assert set(scores["ppo"]["rewards"]) == {"learned", "chrf"}


def raw_scores(run: Path, prompts: list[str], ids: list[list[int]]) -> list[float]:
    config = ModelConfig(model_name_or_path="unused")
    tokenizer, model = load_tokenizer(run / "sft", config), load_model(run / "sft", config)
    prompt_ids = encode_prompts(tokenizer, prompts, model.config.is_encoder_decoder)
    network = RewardNetwork.load(model, run / "reward").eval()
    return network.scores(make_sequences(prompt_ids, ids, tokenizer.pad_token_id)).tolist()


@pytest.mark.parametrize("targets", ["all-linear", "decoder-linear"])
def test_a_reward_over_an_encoder_decoder_pays_its_policy(recipe, tmp_path, targets):
    family = ["model.from_scratch.architecture=t5", f"model.lora_target_modules={targets}", "eval.systems=[sft]"]
    for stage in (sft_stage, reward_stage, ppo_stage, eval_stage):
        assert stage.main([recipe, *family]) == 0
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "reward" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    record, system = (
        load_record(run / "reward"),
        json.loads((run / "eval" / "report.json").read_text())["systems"]["sft"],
    )
    line = json.loads((run / "eval" / system["predictions"]).read_text().splitlines()[0])
    tokenizer = load_tokenizer(run / "sft", ModelConfig(model_name_or_path="unused"))
    assert encode_prompts(tokenizer, [line["prompt"]], True)[0][-1] == tokenizer.eos_token_id
    expected = raw_scores(run, [line["prompt"]], [line["completion_ids"]])[0]
    assert line["rewards"]["learned"] == pytest.approx((expected - record.shift) / record.scale, abs=1e-4)
    first = json.loads((run / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["eval_reward"] == pytest.approx(
        first["eval_reward/learned"] + 0.5 * first["eval_reward/chrf"], abs=1e-5
    )


def test_pairs_of_a_data_set_are_compared_by_consensus_and_their_texts_scored_once(recipe, tmp_path):
    rows = [
        {"prompt": text, "chosen": german, "rejected": other}
        for text, german in zip(ENGLISH, GERMAN, strict=True)
        for other in ("nein", "nein nein")
    ]
    for split, suffix in (("train", " 0"), ("validation", "")):
        lines = [json.dumps({**row, "prompt": row["prompt"] + suffix}) for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    pairs = f"reward.pairs={{path: '{{split}}.jsonl', data_dir: {tmp_path}}}"
    assert sft_stage.main([recipe]) == 0 and reward_stage.main([recipe, pairs]) == 0
    run = tmp_path / "runs" / "tiny"
    report = json.loads((run / "reward" / "report" / "report.json").read_text())
    assert report["accuracy"]["count"] == load_record(run / "reward").held_out_pairs == 4  # of two prompts
    assert report["pairs"]["kept"] == {"train": 8, "choice": 4, "held_out": 4}
    assert load_record(run / "reward").accuracy_low == report["accuracy"]["low"]
    assert len(report["rules"]) == 3 and "bleu" in report["rules"][2]["name"]
    assert [(c["name"], c["count"]) for c in report["correlations"]] == [
        ("length, tokens", 6)
    ]  # 2 chosen, 4 rejected: those of the prompts that chose the checkpoint are not looked at
    kept = [json.loads(line) for line in (run / "reward" / "pairs.jsonl").read_text().splitlines()]
    held_out = [pair for pair in kept if pair["split"] == "held_out"]
    prompts = [pair["prompt"] for pair in held_out for _ in (0, 1)]
    scores = raw_scores(run, prompts, [pair[f"{side}_ids"] for pair in held_out for side in ("chosen", "rejected")])
    better = [chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]
    assert report["accuracy"]["value"] == sum(better) / 4


def test_references_average_zero_and_texts_have_unit_spread(made):
    record, tokenizer = load_record(made / "reward"), load_tokenizer(made / "sft", ModelConfig("unused"))
    prompts = [f"{text}\n" for text in ENGLISH]
    references = raw_scores(made, prompts, encode_completions(tokenizer, prompts, GERMAN))
    assert sum(references) / 4 == pytest.approx(record.shift, abs=1e-4)
    samples = [json.loads(line) for line in (made / "reward" / "samples.jsonl").read_text().splitlines()]
    texts = torch.tensor(raw_scores(made, [prompts[s["row"]] for s in samples], [s["ids"] for s in samples]))
    assert float(texts.std(correction=0)) == pytest.approx(record.scale, abs=1e-4)


def test_the_same_seed_gives_the_same_pairs_and_no_prompt_is_on_both_sides(recipe, made, tmp_path):
    (tmp_path / "runs" / "tiny" / "sft").rename(tmp_path / "sft")
    assert reward_stage.main([recipe, "name=again", f"ppo.sft_model_path={tmp_path / 'sft'}"]) == 0
    again = tmp_path / "runs" / "again" / "reward" / "pairs.jsonl"
    assert again.read_text() == (made / "reward" / "pairs.jsonl").read_text()
    pairs = [json.loads(line) for line in again.read_text().splitlines()]
    sides = [{p["prompt"] for p in pairs if p["split"] == split} for split in ("train", "choice", "held_out")]
    assert all(sides) and len(set.union(*sides)) == sum(map(len, sides))
    assert {p["origin"] for p in pairs} == {"sft", "references"}


def test_an_accuracy_that_is_too_low_stops_ppo_before_a_model_is_loaded(recipe, made, capsys):
    capsys.readouterr()
    assert ppo_stage.main([recipe, "reward.min_accuracy=1.0"]) == 1
    said = capsys.readouterr().err
    assert "error: ppo: reward.min_accuracy: the reward model in" in said and "set reward.min_accuracy lower" in said
    assert ppo_stage.main([recipe, "reward.min_accuracy=0.00001"]) == 0  # and it changes no stage that is made
    assert reward_stage.main([recipe, "reward.min_accuracy=0.00001"]) == 0
    assert "reward: already complete" in capsys.readouterr().err


def test_another_runs_reward_is_used_and_one_over_another_base_refused(recipe, made, tmp_path, capsys):
    outside = [f"ppo.reward_model_path={made / 'reward'}", "name=other"]
    assert ppo_stage.main([recipe, *outside, f"ppo.sft_model_path={made / 'sft'}"]) == 0
    assert sft_stage.main([recipe, "name=stranger", "seed=5"]) == 0
    capsys.readouterr()
    assert ppo_stage.main([recipe, outside[0], "name=stranger", "seed=5"]) == 1
    said = capsys.readouterr().err
    assert f"the reward adapter was trained over the model of '{made / 'sft'}', and PPO starts from" in said
    assert "stranger/sft', whose model is another" in said


def test_a_reward_folder_that_is_not_whole_is_refused_by_the_plan(recipe, made, capsys):
    outside = [recipe, f"ppo.reward_model_path={made / 'reward'}", f"ppo.sft_model_path={made / 'sft'}", "--dry-run"]
    head = load_file(made / "reward" / HEAD_FILE)["weight"]
    for message, width in (
        ("states of 16 numbers", 16),
        ("no head with one output", 0),
        ("mend its weight files", None),
    ):
        if width is None:
            (made / "reward" / HEAD_FILE).write_bytes(b"no weights")
        else:
            weight = head[:, :width].contiguous() if width else head.repeat(2, 1)
            save_file({"weight": weight}, made / "reward" / HEAD_FILE)
        assert chain.main(outside) == 2
        assert message in capsys.readouterr().err
    for name in (HEAD_FILE, "adapter_model.safetensors"):
        (made / "reward" / name).unlink()
        assert chain.main(outside) == 2
        assert f"{name} is missing" in capsys.readouterr().err.replace(f"{HEAD_FILE}, ", "")


def test_a_classifier_is_evaluated_by_the_stage_or_used_as_it_is(recipe, tmp_path, tokenizer, capsys):
    path = classifier(tmp_path / "classifier", tokenizer)
    assert sft_stage.main([recipe]) == 0
    training = (
        'reward={pairs: {from: references, samples: 2, min_margin: 0.0}, min_accuracy: 0, model: "' + path + '"}'
    )
    assert reward_stage.main([recipe, training]) == 0
    assert load_record(tmp_path / "runs" / "tiny" / "reward").kind == "classifier"
    assert ppo_stage.main([recipe, training]) == 0
    capsys.readouterr()
    assert ppo_stage.main([recipe, f"ppo.reward_model_path={path}", "name=direct", "ppo.sft_model_path="
                           f"{tmp_path / 'runs' / 'tiny' / 'sft'}"]) == 0  # fmt: skip
    assert "its accuracy is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.reward_model_path={two}"], "ppo.reward_model_path: the classifier '{two}' has 2 labels"),
        (["ppo.reward_model_path={empty}"], "holds neither a finished reward model"),
        (["ppo.reward_model_path=/nowhere/at/all"], "ppo.reward_model_path: no directory '/nowhere/at/all'"),
        (["ppo.rewards=[{{name: learned, template: x}}]"], "its option template would do nothing"),
        (["reward.pairs={{path: no.jsonl}}"], "reward.pairs.path: no file 'no.jsonl' for the train split"),
        (["reward.pairs.metric=bleurt"], "reward.pairs.metric: unknown metric 'bleurt'"),
        (
            ["ppo.reward_model_path={one}", "ppo.value_model=reward_model"],
            "ppo.value_model: reward_model needs a reward",
        ),
        (["reward={{model: {two}}}"], "reward.model: the classifier '{two}' has 2 labels"),
        (["ppo.rewards=[learned, learned]"], "each reward once"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(recipe, tmp_path, tokenizer, capsys, overrides, message):
    places = {"one": classifier(tmp_path / "one", tokenizer)}
    places |= {"two": classifier(tmp_path / "two", tokenizer, num_labels=2), "empty": str(tmp_path / "empty")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        ppo_stage.main([recipe, *(override.format(**places) for override in overrides)])
    assert ended.value.code == 2
    assert message.format(**places) in capsys.readouterr().err


def test_a_learned_reward_without_a_model_says_where_it_comes_from(recipe, tmp_path, capsys):
    text = Path(recipe).read_text()
    start, stop = text.index("reward:\n"), text.index("ppo:\n")
    Path(recipe).write_text(text[:start] + text[stop:])
    assert chain.main([recipe, "--dry-run"]) == 2
    assert "'learned' needs a reward model: add a reward section, or name a finished one" in capsys.readouterr().err


def test_the_plan_knows_the_stage(recipe, made, capsys):
    shutil.rmtree(made / "sft" / "checkpoints")
    assert chain.main([recipe, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "reward  skip  complete and unchanged" in said and "ppo     run   not started yet" in said
    assert chain.main([recipe, "--dry-run", "reward.learning_rate=0.5", "--from", "reward"]) == 0
    said = "".join(capsys.readouterr().out.split())  # a narrow terminal folds the reason
    assert "rewardrunchangedsince" in said and "reward.learning_rate:0.01->0.5" in said
    assert chain.main([recipe, "--dry-run", f"ppo.reward_model_path={made / 'reward'}"]) == 0
    assert "reward  not needed" in capsys.readouterr().out
