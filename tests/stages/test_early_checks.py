"""What PPO or the evaluation would refuse is refused by the plan, or by SFT before its first step."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from pipeline import run, sft
from pipeline.models.config import FromScratchConfig
from pipeline.models.from_scratch import build_from_scratch
from pipeline.models.states import check_repeatable

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
RECIPE = """\
name: early
model: {model_name_or_path: MODEL}
task: {name: parallel, source: '{split}.en', target: '{split}.de'}
sft: {max_steps: 1, per_device_train_batch_size: 2, gradient_checkpointing: false}
ppo:
  rewards: [bleu]
  total_episodes: 4
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  response_length: 8
eval: {metrics: [bleu], n_bootstrap: 1000}
"""
REWARDS = """\
def short(completions, **columns):
    return [float(len(text) < 1000) for text in completions]

def topic(completions, topic, **columns):
    return [1.0 for _ in completions]

def each(completion_ids, **columns):
    return [[1.0 for _ in ids] for ids in completion_ids]

def numbers(completions, **columns):
    return [float(text) for text in completions]

async def asked(completions, topic, **columns):
    return [1.0 for _ in completions]

async def answered(completions, **columns):
    return [1.0 for _ in completions]
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    """A recipe over two pairs of texts and a tiny model in `model`, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation", "test"):
        Path(f"{split}.en").write_text("a dog\nthe cat\n" * 4)
        Path(f"{split}.de").write_text("ein Hund\ndie Katze\n" * 4)
    Path("early_rewards.py").write_text(REWARDS)
    config = FromScratchConfig(
        vocab_size=280, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    build_from_scratch(config, ["a dog", "ein Hund"], 0, tmp_path / "model")
    Path("recipe.yaml").write_text(RECIPE.replace("MODEL", str(tmp_path / "model")))
    return "recipe.yaml"


def tokenizer(recipe: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained("model")


def refusal(main, capfd, *arguments: str) -> tuple[int, str]:
    """The exit code, and the one error."""
    try:
        code = main(list(arguments))
    except SystemExit as end:
        code = end.code
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not list(Path("runs").rglob("checkpoint-*"))
    return code, error


def test_the_plan_shows_no_warnings_of_the_libraries(recipe, capfd):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert run.main([recipe, "--dry-run"]) == 0
    assert not [warning for warning in shown if issubclass(warning.category, FutureWarning)]


def test_a_pad_token_without_an_embedding_is_refused_by_the_plan(recipe, capfd):
    grown = tokenizer(recipe)
    grown.add_special_tokens({"pad_token": "[PAD]"})
    grown.save_pretrained("model")
    code, error = refusal(run.main, capfd, recipe, "--dry-run")
    assert code == 2 and "model.model_name_or_path: the pad token" in error and "embeddings" in error


@pytest.mark.parametrize(("word", "rows"), [("dog", "prompts of test"), ("Hund", "examples of train")])
def test_a_token_of_the_data_without_an_embedding_is_refused_before_sft(recipe, capfd, word, rows):
    grown = tokenizer(recipe)
    grown.add_tokens([word])
    grown.save_pretrained("model")
    code, error = refusal(sft.main, capfd, recipe)
    assert code == 1 and error.startswith("error: sft: model: ") and rows in error and "beyond the model's" in error


@pytest.mark.parametrize(("name", "words"), [("topic", "topic"), ("numbers", "could not convert"), ("asked", "topic")])
def test_a_reward_that_fails_on_the_first_rows_is_refused_before_sft(recipe, capfd, name, words):
    code, error = refusal(sft.main, capfd, recipe, f"ppo.rewards=[early_rewards.short, early_rewards.{name}]")
    assert code == 1 and error.startswith("error: sft: ") and f"early_rewards.{name}" in error and words in error


METRICS = """\
from types import SimpleNamespace

def make(scores):
    methods = dict.fromkeys(["resampled_scores", "corpus_score"], scores)
    return SimpleNamespace(name="mine", signature="", higher_is_better=True, sample_scores=scores, **methods)

def fails():
    return make(lambda predictions, references: [1 / 0 for _ in predictions])

def means():
    return make(lambda predictions, references: [1.0])
"""


@pytest.mark.parametrize(("name", "words"), [("fails", "ZeroDivisionError"), ("means", "gave 1 for 2 texts")])
def test_a_metric_that_fails_on_the_first_rows_is_refused_before_sft(recipe, capfd, name, words):
    Path("early_metrics.py").write_text(METRICS)
    code, error = refusal(sft.main, capfd, recipe, f"eval.metrics=[bleu, early_metrics.{name}]")
    assert code == 1 and error.startswith("error: sft: eval.metrics: mine: ") and words in error


def test_a_reward_of_single_tokens_is_refused_where_scores_are_shuffled(recipe, capfd):
    overrides = ["ppo.rewards=[early_rewards.each]", "control=true"]
    code, error = refusal(sft.main, capfd, recipe, *overrides)
    assert code == 1 and "early_rewards.each" in error and "control: true needs scores of whole completions" in error


def test_a_reward_that_works_is_no_hindrance(recipe, capfd):
    assert sft.main([recipe, "ppo.rewards=[early_rewards.short, early_rewards.answered]"]) == 0
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: bleu")]
    assert "100% of the references are shorter than 4 words" in warning


@pytest.mark.parametrize(("kind", "words"), [("bert", "both directions"), ("minicpm3", "changes its states")])
def test_an_architecture_that_ppo_cannot_take_is_refused_before_sft(recipe, capfd, kind, words):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "minicpm3":
        sizes |= {"num_key_value_heads": 2, "dim_model_base": 4, "q_lora_rank": 8, "kv_lora_rank": 8}
    size = len(tokenizer(recipe))
    config = AutoConfig.for_model(kind, vocab_size=size, max_position_embeddings=64, initializer_range=2.0, **sizes)
    torch.manual_seed(0)
    for file in Path("model").glob("*.safetensors"):
        file.unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    code, error = refusal(sft.main, capfd, recipe)
    assert code == 1 and error.startswith(f"error: sft: model: '{kind}'") and words in error


def test_a_router_that_adds_noise_is_refused_before_sft(recipe, capfd):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "router_jitter_noise": 0.9}
    sizes |= {"max_position_embeddings": 64, "initializer_range": 2.0}
    config = AutoConfig.for_model("mixtral", vocab_size=len(tokenizer(recipe)), **sizes)
    torch.manual_seed(0)
    for file in Path("model").glob("*.safetensors"):
        file.unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    code, error = refusal(sft.main, capfd, recipe)
    assert code == 1 and error.startswith("error: sft: model: ") and "'mixtral'" in error and "router" in error


def test_dropout_is_no_noise_and_is_put_back(recipe):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "embd_pdrop": 0.3, "resid_pdrop": 0.2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=50, **sizes)).eval()
    state = torch.get_rng_state()
    check_repeatable(model)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} >= {0.3, 0.2}


PAIRS = "reward={pairs: {path: 'pairs.jsonl', train: 'train[:2]', validation: 'train[2:]'}, min_accuracy: 0.0}"


def test_pairs_that_are_too_long_are_named_before_sft(recipe, capfd):
    rows = [{"prompt": f"a dog {n}", "chosen": "ein Hund", "rejected": "x " * n} for n in (1, 200, 2)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sft.main([recipe, PAIRS]) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("reward.pairs: ")]
    assert "1 row is left out: line 2 of 'pairs.jsonl'" in line and "longer than the context" in line


def classifier(tokenizer_of: str, **options) -> str:
    """Save a tiny classifier that reads 24 tokens; its directory."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = LlamaConfig(vocab_size=280, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=1, max_position_embeddings=24, pad_token_id=0)  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained("classifier")
    for name, value in options.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained("classifier")
    return "classifier"


def test_pairs_that_a_classifier_cannot_read_are_named_before_sft(recipe, capfd):
    rows = [{"prompt": f"a dog {n}", "chosen": "ein Hund", "rejected": "x " * n} for n in (1, 30, 2)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sft.main([recipe, PAIRS.replace("}, min", f"}}, model: {classifier('model')}, min")]) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("reward.pairs: ")]
    assert "1 row is left out: line 2 of 'pairs.jsonl'" in line and "longer than the context" in line


@pytest.mark.parametrize(("length", "warned"), [(8, False), (20, True)])
def test_a_classifier_that_may_not_read_what_ppo_writes_is_warned_of_before_sft(recipe, capfd, length, warned):
    learned = ["ppo.rewards=[learned]", f"ppo.reward_model_path={classifier('model')}"]
    assert sft.main([recipe, *learned, f"ppo.response_length={length}"]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "a completion may not fit" in line]
    assert len(lines) == warned
    assert not warned or "ppo.reward_model_path: the classifier 'classifier' reads 24 tokens" in lines[0]


def test_a_classifier_whose_template_takes_no_answer_is_refused_before_sft(recipe, capfd):
    refused = "{% if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}"
    template = f"{{% for m in messages %}}{refused}x{{% endfor %}}"
    learned = ["ppo.rewards=[learned]", f"ppo.reward_model_path={classifier('model', chat_template=template)}"]
    code, error = refusal(sft.main, capfd, recipe, *learned)
    assert code == 1 and "ppo.reward_model_path: " in error and "no answers" in error


@pytest.mark.parametrize(
    ("row", "rejected", "words"), [(1, None, "line 2 of"), (2, "ein Hund", "no pair is left held out")]
)
def test_pairs_that_no_reward_model_learns_from_are_refused_before_sft(recipe, capfd, row, rejected, words):
    rows = [{"prompt": prompt, "chosen": "ein Hund", "rejected": "x"} for prompt in ("a dog 0", "a dog 1", "the cat")]
    rows[row]["rejected"] = rejected
    Path("pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    code, error = refusal(sft.main, capfd, recipe, PAIRS)
    assert code == 1 and "reward.pairs" in error and words in error
