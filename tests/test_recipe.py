"""Recipes: what is read, and what is refused by file, line and key."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import trl

from pipeline.recipe import (
    Recipe,
    RecipeError,
    SFTSection,
    check_recipe,
    load_checked_recipe,
    load_recipe,
    parse_stage_arguments,
)
from pipeline.recipe.reader import read_document
from pipeline.recipe.refused import IDLE_WITH, REFUSED_REWARD_KEYS, REFUSED_SFT_KEYS
from pipeline.rewards.config import RewardConfig
from pipeline.stages.directory import RunDirectory
from pipeline.tasks.counts import ExampleCounts, count_examples

DATA = Path(__file__).resolve().parent.parent / "recipes" / "phrasebook"
LINES = f"""\
name: demo
seed: 3
model:
  from_scratch: {{hidden_size: 32, num_attention_heads: 2, vocab_size: 400, max_position_embeddings: 64}}
task: {{name: parallel, data_dir: {DATA}, source: '{{split}}.en', target: '{{split}}.de', max_train_examples: 200}}
sft: {{learning_rate: 3e-4}}
ppo:
  rewards: [bleu]
  response_length: 20
  per_device_train_batch_size: 8
eval: {{metrics: [bleu]}}
""".splitlines()


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Each test in a directory of its own, so that messages name `recipe.yaml` and runs go to `runs/`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def write(text=None, **lines):
    """recipe.yaml with some lines of LINES replaced (`line5="..."`), or other text."""
    content = [lines.get(f"line{number}", line) for number, line in enumerate(LINES, start=1)]
    Path("recipe.yaml").write_text("\n".join(content) + "\n" if text is None else text, encoding="utf-8")
    return "recipe.yaml"


def refusal(*overrides, text=None, **lines):
    """Return the message that refuses a recipe, for its text or for what it points to."""
    path = write(text, **lines)
    with pytest.raises(RecipeError) as raised:
        check_recipe(load_recipe(path, overrides))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def assert_names(message, place, key, *words):
    """The message starts with the place and the key, and has the words."""
    assert message.startswith(f"{place}: {key}: " if key else f"{place}: "), message
    assert [word for word in words if word not in message] == [], message


def test_a_recipe_is_read_into_the_packages_own_configs():
    recipe = load_recipe(write())
    assert (recipe.name, recipe.seed, recipe.output_dir) == ("demo", 3, "runs")
    assert recipe.model.from_scratch.hidden_size == 32
    assert recipe.task.config.max_train_examples == 200
    assert recipe.ppo.rewards == (RewardConfig("bleu"),)
    assert [metric.name for metric in recipe.eval.metrics] == ["bleu"]
    check_recipe(recipe)


def test_scalars_are_those_of_yaml_1_2():
    values = {"1e-5": 1e-5, "no": "no", "on": "on", "1_000": "1_000", "010": 10, "0x1f": 31, "0o17": 15, "~": None}
    values |= {"2024-01-01": "2024-01-01", "1:30": "1:30", ".5": 0.5, "-.inf": float("-inf"), "True": True, "": None}
    values |= {"-7": -7, "1e5": 1e5, "=": "=", "'1'": "1", "1_0.5": "1_0.5", "false": False}
    write("".join(f"key{number}: {text}\n" for number, text in enumerate(values)))
    read = list(read_document("recipe.yaml").data.values())
    assert read == list(values.values())
    assert [type(value) for value in read] == [type(value) for value in values.values()]


def test_numbers_and_text_reach_the_configs_as_written():
    recipe = load_recipe(write(), ["sft.learning_rate=1e-5", "sft.eval_strategy=no", "ppo.kl_coef=1", "ppo.top_p=.5"])
    assert recipe.sft.arguments["learning_rate"] == 1e-5
    assert recipe.sft.arguments["eval_strategy"] == "no"
    assert type(recipe.ppo.kl_coef) is float


@pytest.mark.parametrize(
    ("line", "text", "key", "words"),
    [
        (2, "sede: 3", "sede", ["unknown key", "'seed'"]),
        (2, "xyz: 3", "xyz", ["unknown key", "name, seed, output_dir, control, model, task, sft, reward, ppo, eval"]),
        (10, "  per_device_batch_size: 8", "ppo.per_device_batch_size", ["'per_device_train_batch_size'"]),
        (10, "  seed: 1", "ppo.seed", ["a key of the top level"]),
        (6, "sft: {kl_coef: 1}", "sft.kl_coef", ["a key of ppo"]),
        (6, "sft: {learning_rat: 1}", "sft.learning_rat", ["'learning_rate'"]),
        (5, "task: {name: parallel, max_train_exampels: 1}", "task.max_train_exampels", ["'max_train_examples'"]),
        (4, "  from_scratch: {hiden_size: 32}", "model.from_scratch.hiden_size", ["'hidden_size'"]),
        (8, "  rewards: [{name: bleu, wieght: 2}]", "ppo.rewards.0.wieght", ["'weight'", "options: {wieght: ...}"]),
        (10, "  rewards: [ter]", "ppo.rewards", ["duplicate key", "recipe.yaml:8"]),
        (2, "1: 3", "recipe", ["a key must be text", "1"]),
        (5, "task: {name: paralel}", "task.name", ["'paralel'", "did you mean 'parallel'?"]),
        (5, "task: {name: json.decoder}", "task.name", ["'json.decoder' has no dataclass Config"]),
        (5, "task: {max_train_examples: 3}", "task.name", ["missing"]),
        (5, "task: {name: parallel, source: a}", "task.target", ["missing"]),
        (5, "task: {name: parallel, source: '{split}{x}', target: '{split}'}", "task.source", ["no column 'x'"]),
        (9, "  num_mini_batches: 3", "ppo.num_mini_batches", ["divide gradient_accumulation_steps (4)", "found 3"]),
        (8, "  rewards: []", "ppo.rewards", ["at least one reward"]),
        (8, "  rewards: [ter, {name: bleu, weight: 0}]", "ppo.rewards", ["'bleu' has weight 0", "remove it"]),
        (10, "  reward_model_path: x", "ppo.reward_model_path", ["learned", "found 'x'"]),
        (2, "reward: {max_length: 5}", "reward.max_length", ["dropped and counted"]),
        (2, "reward: {lerning_rate: 5}", "reward.lerning_rate", ["'learning_rate'"]),
        (2, "reward: {eval_steps: 5}", "reward.eval_steps", ["eval_strategy is 'epoch'", "eval_strategy: steps"]),
        (
            2,
            "reward: {save_strategy: steps}",
            "reward.save_strategy",
            ["eval_strategy is epoch", "save_strategy is st"],
        ),
        (6, "sft: {eval_strategy: steps}", "sft.eval_strategy", ["the best model is kept", "load_best_model_at_end:"]),
        (
            6,
            "sft: {eval_strategy: steps, eval_steps: 20, save_strategy: steps, save_steps: 30}",
            "sft.save_steps",
            ["30 is no multiple of eval_steps, which is 20"],
        ),
        (2, "reward: {min_accuracy: 55}", "reward.min_accuracy", ["from 0 to 1", "found 55.0"]),
        (2, "reward: {pairs: {from: ppo}}", "reward.pairs.from", ["sft, references", "found ['ppo']"]),
        (2, "reward: {pairs: {from: sft, path: x.jsonl}}", "reward.pairs.from", ["path names a data set"]),
        (2, "reward: {pairs: {origins: [sft]}}", "reward.pairs.origins", ["'from'"]),
        (2, "reward: {pairs: {sampels: 3}}", "reward.pairs.sampels", ["'samples'"]),
        (2, "reward: {model: x, learning_rate: 1e-3}", "reward.learning_rate", ["would do nothing", "not trained"]),
        (2, "reward: {enable_jit_checkpoint: true}", "reward.enable_jit_checkpoint", ["SIGTERM"]),
    ],
)
def test_refusals_name_file_line_key_and_fix(line, text, key, words):
    assert_names(refusal(**{f"line{line}": text}), f"recipe.yaml:{line}", key, *words)


@pytest.mark.parametrize(
    "section",
    [
        "{save_strategy: best}",
        "{eval_strategy: 'no', save_strategy: steps}",
        "{save_strategy: steps, load_best_model_at_end: false}",
        "{eval_strategy: steps, eval_steps: 10, save_strategy: steps, save_steps: 30}",
        "{eval_strategy: steps, eval_steps: 0.1, save_strategy: steps, save_steps: 0.3}",
        "{eval_strategy: steps, save_strategy: steps}",
    ],
)
def test_a_best_model_that_is_saved(section):
    check_recipe(load_recipe(write(line6=f"sft: {section}")))


def test_text_that_is_no_yaml_is_named_by_its_line():
    assert_names(refusal(line2="seed: [1"), "recipe.yaml:3", None, "not valid YAML", "',' or ']'")
    assert_names(refusal(line2="seed: *x"), "recipe.yaml:2", None, "not valid YAML", "alias 'x'")


def test_missing_keys_are_named():
    check_recipe(load_recipe(write(line2="")))
    assert_names(refusal(line1=""), "recipe.yaml", "name", "missing")
    assert_names(refusal(line8=""), "recipe.yaml:7", "ppo.rewards", "at least one reward")
    assert_names(refusal(line4="  model_revision: x"), "recipe.yaml:3", "model", "exactly one", "found neither")


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("seed=1.5", "seed", ["a whole number, found 1.5"]),
        ("seed=true", "seed", ["a whole number, found true"]),
        ("seed=-1", "seed", ["from 0 to 4294967295, found -1"]),
        ("seed=null", "seed", ["a whole number, found null"]),
        ("ppo.total_episodes=1e5", "ppo.total_episodes", ["a whole number, found 100000.0; write 100000"]),
        ("ppo.total_episodes=1_000", "ppo.total_episodes", ["a whole number, found '1_000'"]),
        ("ppo.kl_coef=high", "ppo.kl_coef", ["a number, found 'high'"]),
        ("ppo.kl_coef=.nan", "ppo.kl_coef", ["a number, found nan"]),
        ("ppo.kl_coef=null", "ppo.kl_coef", ["a number, found null"]),
        ("ppo.whiten_rewards=1", "ppo.whiten_rewards", ["true or false, found 1"]),
        ("ppo.whiten_rewards=yes", "ppo.whiten_rewards", ["found 'yes'; YAML 1.2 has only true and false"]),
        ("ppo.rewards=bleu", "ppo.rewards", ["a list, found 'bleu'"]),
        ("ppo.rewards=[3]", "ppo.rewards.0", ["a name or a mapping with a name, found 3"]),
        ("ppo.rewards=[{weight: 3}]", "ppo.rewards.0.name", ["missing"]),
        ("ppo.rewards=[{name: bleu, options: 3}]", "ppo.rewards.0.options", ["a section of keys, found 3"]),
        ("sft=[1]", "sft", ["a section of keys, found a list"]),
        ("model.from_scratch=true", "model.from_scratch", ["a mapping, found true"]),
        ("model.lora_target_modules=[q, 1]", "model.lora_target_modules.1", ["text, found 1; put quotes around it"]),
        (
            "ppo.report_to=[{x}]",
            "ppo.report_to.0",
            ["text, found a mapping; put quotes around a text"],
        ),
        ("sft.learning_rate=fast", "sft.learning_rate", ["a number, found 'fast'"]),
        ("sft.report_to=[tensorboard, 3]", "sft.report_to.1", ["text, found 3"]),
        ("sft.eval_strategy=false", "sft.eval_strategy", ["one of no, steps, epoch, found false"]),
        ("sft.eval_strategy=step", "sft.eval_strategy", ["found 'step'; did you mean 'steps'?"]),
        ("sft.loss_type=chunked_nll", "sft.loss_type", ["one of nll, dft, found 'chunked_nll'"]),
        ("sft.use_peft=maybe", "sft.use_peft", ["true or false, found 'maybe'"]),
        ("sft.eval_steps=10", "sft.eval_steps", ["eval_strategy is 'epoch'", "set sft.eval_strategy: steps"]),
        ("sft.packing_strategy=bfd", "sft.packing_strategy", ["packing is false", "set sft.packing: true"]),
        ("sft.project=x", "sft.project", ["would do nothing", "trackio"]),
        ("sft.run_name=x", "sft.run_name", ["would do nothing", "set sft.report_to"]),
        ("eval.systems=[base, foo]", "eval.systems", ["'foo' is not one of base, sft, ppo"]),
        ("eval.systems=[sft, {name: sft, path: x}]", "eval.systems", ["a further system needs a name", "found 'sft'"]),
        ("eval.systems=[{name: a, path: x}, {name: a, path: y}]", "eval.systems", ["each system once", "['a', 'a']"]),
        ("eval.systems=[{name: a}]", "eval.systems.0.path", ["missing"]),
        ("eval.systems=[{name: a, path: x, pth: y}]", "eval.systems.0.pth", ["unknown key; did you mean 'path'?"]),
        ("eval.systems=[3]", "eval.systems.0", ["text or a mapping, found 3"]),
        ("eval.beam_sizes=[1]", "eval.beam_sizes", ["other than eval.num_beams (1)", "found 1"]),
        ("ppo.lam=2", "ppo.lam", ["[0, 1], found 2.0"]),
        ("nonsense=1", "nonsense", ["unknown key"]),
        ("ppo.kl_coeff=1", "ppo.kl_coeff", ["unknown key; did you mean 'kl_coef'?"]),
        ("seed=!!python/none 1", "seed", ["tags are not allowed", "!!python/none"]),
    ],
)
def test_refused_overrides_are_named_instead_of_a_line(override, key, words):
    assert_names(refusal(override), f"override {override!r}", key, *words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.rewards=[bleu", "not valid YAML"),
        ("ppo.rewards.1.weight=2", "ppo.rewards is a list of 1, so its items are ppo.rewards.0"),
        ("ppo.rewards.first=ter", "ppo.rewards is a list of 1, so its items are ppo.rewards.0"),
        ("ppo.rewards.0.weight=2", "ppo.rewards.0 is 'bleu', which has no keys"),
        ("verbose", "section.key=value"),
        ("=1", "section.key=value"),
        ("ppo..kl_coef=1", "section.key=value"),
    ],
)
def test_overrides_that_fit_nowhere(override, words):
    assert_names(refusal(override), f"override {override!r}", None, words)


BART = "{architecture: bart, hidden_size: 32, num_attention_heads: 2, vocab_size: 400, max_position_embeddings: 64}"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("sft.packing=true", "joins texts"),
        ("sft.eval_packing=true", "joins texts"),
        ("sft.padding_free=true", "joins texts"),
        ("sft.pad_to_multiple_of=8", "padded to the longest"),
        ("sft.router_aux_loss_coef=0.1", "router"),
        ("sft.neftune_noise_alpha=5", "noise"),
        ("sft.completion_only_loss=false", "no token of the prompt"),
    ],
)
def test_what_an_encoder_decoder_cannot_do_is_refused_by_name(override, reason):
    model = f"  from_scratch: {BART}"
    message, key = refusal(override, line4=model), override.split("=")[0]
    assert_names(message, f"override {override!r}", key, "not for an encoder-decoder", reason, "remove it")
    check_recipe(load_recipe(write(line4=model), ["sft.loss_type=dft"]))
    if "packing" not in override and "free" not in override:
        check_recipe(load_recipe(write(), [override]))  # and a causal model may have it


def test_each_side_of_an_encoder_decoder_has_positions_of_its_own():
    model = f"  from_scratch: {BART}"
    check_recipe(load_recipe(write(line4=model), ["ppo.response_length=64"]))
    check_recipe(load_recipe(write(line4=model.replace("bart", "t5")), ["ppo.response_length=100"]))
    override = "ppo.response_length=65"
    place, limit = f"override {override!r}", "model.from_scratch.max_position_embeddings (64), found 65"
    assert_names(refusal(override, line4=model), place, "ppo.response_length", limit)


def test_decoder_linear_is_for_encoder_decoders():
    override = "model.lora_target_modules=decoder-linear"
    assert_names(refusal(override), f"override {override!r}", "model.lora_target_modules", "no encoder", "all-linear")
    check_recipe(load_recipe(write(line4=f"  from_scratch: {BART}"), [override]))


@pytest.mark.parametrize("name", ["../../x", "a/b", ".hidden", "-x", "", "a b", "naïve"])
def test_a_name_is_one_plain_directory(name):
    override = f"name='{name}'"
    assert_names(refusal(override), f"override {override!r}", "name", f"{name!r} names a directory", "use letters")


def test_a_conflict_between_file_and_override_names_both():
    assert refusal("model.model_name_or_path=gpt2") == (
        "recipe.yaml:3 with override 'model.model_name_or_path=gpt2': "
        "model: set exactly one of model_name_or_path and from_scratch, found both"
    )


def test_a_recipe_that_cannot_be_read():
    write()
    cases = {"recipes.yaml": "did you mean 'recipe.yaml'?", "other/x.yaml": "no such recipe file", ".": "directory"}
    for path, words in cases.items():
        with pytest.raises(RecipeError) as raised:
            load_recipe(path)
        assert_names(str(raised.value), path, None, words)
    Path("recipe.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(RecipeError, match=r"^recipe\.yaml:1: not UTF-8 \(byte 6\); convert it"):
        load_recipe("recipe.yaml")


@pytest.mark.parametrize(
    ("text", "place", "key", "words"),
    [
        ("- a\n", "recipe.yaml", None, "a mapping of sections"),
        ("", "recipe.yaml", "name", "missing"),
        ("%YAML 1.1\n---\nname: no\n", "recipe.yaml:1", None, "YAML 1.2"),
        ("? [a]\n: b\n", "recipe.yaml:1", "recipe", "a key must be text"),
        ("a: " + "[" * 30 + "]" * 30, "recipe.yaml:1", "a.0.0", "more than 20 levels deep"),
    ],
)
def test_text_that_is_no_recipe(text, place, key, words):
    assert_names(refusal(text=text), place, key, words)


def test_overrides_win_over_the_file_and_later_over_earlier_ones():
    overrides = ["ppo.rewards=[{name: constant}]", "seed=1", "seed=2", "ppo.rewards.0.weight=2", "eval=null"]
    recipe = load_recipe(write(), overrides)
    assert recipe.ppo.rewards == (RewardConfig("constant", 2.0),)
    assert recipe.seed == 2
    assert [metric.name for metric in recipe.eval.metrics] == ["bleu", "chrf"]
    assert load_recipe(write(line6=""), ["sft.max_steps=5"]).sft.arguments["max_steps"] == 5


def test_an_override_of_one_alias_leaves_the_other():
    recipe = load_recipe(
        write(line8="  rewards: &r [{name: bleu}]", line11="eval: {metrics: *r}"), ["ppo.rewards.0.name=ter"]
    )
    assert (recipe.ppo.rewards[0].name, recipe.eval.metrics[0].name) == ("ter", "bleu")


def test_rewards_and_metrics_are_names_or_mappings_with_options():
    recipe = load_recipe(
        write(
            line8="  rewards: [ter, {name: bleu, weight: 2, lowercase: true}]",
            line11="eval: {metrics: [chrf, {name: bleu, options: {lowercase: true}}]}",
        )
    )
    assert recipe.ppo.rewards == (RewardConfig("ter"), RewardConfig("bleu", 2.0, {"lowercase": True}))
    assert [metric.options for metric in recipe.eval.metrics] == [{}, {"lowercase": True}]
    check_recipe(recipe)


@pytest.mark.parametrize(("section", "refused"), [("sft", REFUSED_SFT_KEYS), ("reward", REFUSED_REWARD_KEYS)])
def test_keys_of_trl_that_could_not_be_honoured_are_refused_by_name(section, refused):
    for key in [*refused, "hub_token", "hub_model_id", "push_to_hub_token"]:
        message = refusal(line6=f"{section}: {{{key}: 1}}")
        reason = refused.get(key, "uploads")
        assert_names(message, "recipe.yaml:6", f"{section}.{key}", "not for a recipe", reason)
    names = {
        "sft": "enable_jit_checkpoint seed fsdp eos_token output_dir",
        "reward": "enable_jit_checkpoint max_length",
    }
    assert set(names[section].split()) <= set(refused)


def test_every_refused_key_has_a_reason():
    assert [key for key, reason in REFUSED_REWARD_KEYS.items() if len(reason) < 15] == []


def test_every_accepted_key_of_sft_config_takes_its_own_default():
    """A type that could not be checked would refuse the value TRL itself uses."""
    fields = [f for f in dataclasses.fields(trl.SFTConfig) if f.name not in REFUSED_SFT_KEYS]
    idle = {"eval_steps", "save_steps", "packing_strategy", "run_name", "project"} | IDLE_WITH.keys()
    for f in fields:
        if f.name.startswith("hub_") or f.name in idle or f.default in (dataclasses.MISSING, None):
            continue
        value = "''" if f.default == "" else str(f.default.value if hasattr(f.default, "value") else f.default)
        value = value.lower() if isinstance(f.default, bool) else value
        others = [] if f.name == "load_best_model_at_end" else ["sft.load_best_model_at_end=false"]
        load_recipe(write(), [f"sft.{f.name}={value}", *others])


def test_keys_of_sft_config_that_another_makes_idle():
    assert "eval_strategy is 'no'" in refusal("sft.eval_strategy=no", "sft.eval_delay=2")
    assert "dataloader_num_workers is 0" in refusal("sft.dataloader_prefetch_factor=2")
    load_recipe(write(), ["sft.dataloader_num_workers=1", "sft.dataloader_prefetch_factor=2"])
    message = refusal("sft.max_steps=5", "sft.num_train_epochs=2")
    assert_names(message, "override 'sft.num_train_epochs=2'", "sft.num_train_epochs", "max_steps is set")
    message = refusal("sft.gradient_checkpointing=true", "sft.activation_checkpointing=false")
    place = "override 'sft.gradient_checkpointing=true'"
    assert_names(message, place, "sft.gradient_checkpointing", "activation_checkpointing is set too")
    load_recipe(write(), ["sft.eval_strategy=steps", "sft.eval_steps=10", "sft.save_strategy=steps"])
    load_recipe(write(), ["sft.report_to=wandb", "sft.run_name=x"])
    assert "tensorboard" in refusal("sft.report_to=tensorboard", "sft.run_name=x")
    assert "adamw_torch_fused" in refusal("sft.optim_args=x=1")
    assert "optim is sgd" in refusal("sft.optim=sgd", "sft.optim_target_modules=all-linear")
    load_recipe(write(), ["sft.optim=sgd", "sft.optim_args=momentum=0.9"])


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "rmsprop_bnb", "galore_adamw", "adalomo", "lion_32bit"])
def test_adams_keys_are_refused_where_another_optimizer_reads_none(optimizer):
    message = refusal(f"sft.optim={optimizer}", "sft.adam_epsilon=1e-6")
    assert f"sft.adam_epsilon: it would do nothing: {optimizer}" in message and "sft.optim" in message
    pairs = ["reward.pairs={path: x.jsonl}", f"reward.optim={optimizer}", "reward.adam_epsilon=1e-6"]
    assert "reward.adam_epsilon" in refusal(*pairs)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "lion_8bit", "ademamix", "schedule_free_radam"])
def test_adams_keys_are_accepted_where_the_optimizer_reads_them(optimizer):
    load_recipe(write(), [f"sft.optim={optimizer}", "sft.adam_beta1=0.8"])


def test_use_peft_is_resolved_for_each_stage():
    pretrained = "  model_name_or_path: some/model"
    assert load_recipe(write()).sft == SFTSection(False, {"learning_rate": 3e-4, "max_length": 64})
    assert load_recipe(write(line4=pretrained)).sft == SFTSection(True, {"learning_rate": 3e-4})
    assert load_recipe(write(), ["sft.use_peft=true"]).sft.use_peft
    assert load_recipe(write()).ppo.use_peft
    off = load_recipe(write(line4=pretrained), ["model.use_peft=false"])
    assert (off.sft.use_peft, off.ppo.use_peft) == (False, False)
    assert load_recipe(write(line4=pretrained), ["model.use_peft=false", "ppo.use_peft=true"]).ppo.use_peft


def test_evaluation_follows_ppo():
    assert load_recipe(write()).eval.max_new_tokens == 20
    assert load_recipe(write(), ["eval.max_new_tokens=9"]).eval.max_new_tokens == 9
    without = load_recipe(write(), ["ppo=null"])
    assert without.ppo is None
    assert without.eval.systems == ("base", "sft")
    assert without.eval.max_new_tokens is None  # from the references of the data
    assert load_recipe(write(), ["ppo.response_length=null"]).eval.max_new_tokens is None
    message = refusal("ppo=null", line11="eval: {systems: [sft, ppo]}")
    assert_names(message, "recipe.yaml:11", "eval.systems", "no ppo section")


SCRATCH = "model.from_scratch.max_position_embeddings (64)"


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("model={model_name_or_path: ./none}", "model.model_name_or_path", ["no directory './none'"]),
        ("ppo.sft_model_path=empty", "ppo.sft_model_path", ["'empty' holds no model"]),
        ("task={name: parallel, source: 'd/{split}.en', target: 'd/{split}.de'}", "task.source",
         ["no file 'd/train.en'", "set task.data_dir"]),
        ("ppo.response_length=64", "ppo.response_length", [f"below {SCRATCH}", "found 64"]),
        ("eval.max_new_tokens=65", "eval.max_new_tokens", [f"below {SCRATCH}", "found 65"]),
        ("sft.max_length=65", "sft.max_length", [f"at most {SCRATCH}", "found 65"]),
        ("ppo.per_device_train_batch_size=51", "ppo.per_device_train_batch_size",
         ["51 x gradient_accumulation_steps 4 x processes 1 = 204 prompts", "200 training examples"]),
        ("ppo.per_device_train_batch_size=0", "ppo.per_device_train_batch_size", ["at least 1, found 0"]),
        ("sft.per_device_train_batch_size=0", "sft.per_device_train_batch_size", ["at least 1, found 0"]),
        ("reward={per_device_eval_batch_size: 0}", "reward.per_device_eval_batch_size", ["at least 1, found 0"]),
        ("ppo.metric_for_best_model=reward", "ppo.metric_for_best_model", ["did you mean 'eval_reward'?"]),
        ("ppo.metric_for_best_model=eval_reward/blue", "ppo.metric_for_best_model",
         ["must be one of ppo.rewards, so of eval_reward/bleu, found", "did you mean 'eval_reward/bleu'?"]),
        ("sft.metric_for_best_model=loss", "sft.metric_for_best_model", ["did you mean 'eval_loss'?"]),
        ("ppo.run_name=x", "ppo.run_name", ["report_to is empty", "set ppo.report_to"]),
        ("model={from_scratch: {}, use_peft: false, lora_r: 4}", "model.lora_r", ["no stage has use_peft: true"]),
        ("output_dir=recipe.yaml", "output_dir", ["cannot write to '", "recipe.yaml' (Not a directory)"]),
        ("eval.metrics=[blue]", "eval.metrics.0", ["unknown metric 'blue'; did you mean 'bleu'?"]),
        ("eval.metrics=[chrf, {name: bleu, lower: 1}]", "eval.metrics.1", ["unknown option 'lower'"]),
        ("ppo.rewards=[bleu, nothing]", "ppo.rewards", ["'nothing' is not one of constant, learned, bleu"]),
        ("ppo.rewards=[bleu, bleu]", "ppo.rewards", ["each reward once"]),
        ("ppo.rewards=[no_such_package.reward]", "ppo.rewards", ["cannot import 'no_such_package.reward'"]),
    ],
)  # fmt: skip
def test_what_a_recipe_points_to_is_checked_before_anything_is_loaded(override, key, words):
    Path("empty").mkdir()
    assert_names(refusal(override), f"override {override!r}", key, *words)


@pytest.mark.parametrize("trained", ["ppo.use_peft=false", "model.lora_modules_to_save=[lm_head]"])
def test_small_steps_are_not_rounded_away(trained):
    message = refusal("model.dtype=bfloat16", trained)
    assert "model.dtype: PPO would train weights in bfloat16" in message and "rounded away" in message
    check_recipe(load_recipe(write(), ["model.dtype=bfloat16"]))


def test_the_best_checkpoint_is_not_the_worst_one_of_a_metric():
    lower = ["ppo.metric_for_best_model=eval_wer", "eval.metrics=[bleu, wer]"]
    message = refusal(*lower)
    assert "ppo.greater_is_better: must be false: wer is better where it is lower" in message
    check_recipe(load_recipe(write(), [*lower, "ppo.greater_is_better=false"]))
    assert "must be true" in refusal("ppo.metric_for_best_model=eval_bleu", "ppo.greater_is_better=false")
    message = refusal("eval.metrics=[chrf, {name: chrf, word_order: 2}]")
    assert "eval.metrics.1: a second metric is called 'chrf', which would take the place of the first" in message


def test_the_number_of_processes_counts_in_the_batch():
    recipe = load_recipe(write())
    check_recipe(recipe, num_processes=6)
    with pytest.raises(RecipeError, match=r"8 x gradient_accumulation_steps 4 x processes 7 = 224 prompts, but there"):
        check_recipe(recipe, num_processes=7)


def test_a_warm_up_as_long_as_the_run_is_refused_by_the_number_of_processes():
    recipe = load_recipe(write(), ["ppo.max_steps=4", "ppo.value_warmup_steps=3"])
    check_recipe(recipe, num_processes=6)
    recipe = load_recipe(write(), ["ppo.total_episodes=640", "ppo.value_warmup_steps=5"])
    check_recipe(recipe, num_processes=1)
    with pytest.raises(RecipeError, match=r"^override .*: ppo\.value_warmup_steps: must be below the 5 PPO steps"):
        check_recipe(recipe, num_processes=4)


def test_checking_leaves_nothing_behind():
    check_recipe(load_recipe(write()))
    assert sorted(os.listdir()) == ["recipe.yaml"]


def parallel_task(lines):
    for split in ("train", "validation", "test"):
        for side in ("en", "de"):
            Path(f"{split}.{side}").write_text("".join(f"{line}\n" for line in lines))
    return write(line5="task: {name: parallel, source: '{split}.en', target: '{split}.de'}")


def test_training_examples_are_counted_where_that_needs_no_loading():
    assert count_examples(load_recipe(write()).task.config).sft == 200
    recipe = load_recipe(parallel_task(["a", "", "b", "c"]))
    assert count_examples(recipe.task.config) == ExampleCounts(3, 3)  # pairs with an empty side are not trained on
    assert count_examples(load_recipe("recipe.yaml", ["task.max_train_examples=2"]).task.config).sft == 2
    with pytest.raises(RecipeError, match=r"^recipe\.yaml:10: .*= 32 prompts, but there are 3 training examples"):
        check_recipe(recipe)
    kept = load_recipe("recipe.yaml", ["task.ppo_examples=1"])
    assert count_examples(kept.task.config) == ExampleCounts(sft=2, ppo=1)
    with pytest.raises(RecipeError, match=r"= 32 prompts, but task\.ppo_examples keeps 1;"):
        check_recipe(kept)
    with pytest.raises(RecipeError, match=r"task\.ppo_examples: must be below the 3 training examples, found 3"):
        check_recipe(load_recipe("recipe.yaml", ["task.ppo_examples=3"]))


def test_a_reward_beside_the_recipe_is_found(directory):
    Path("relay_test_reward.py").write_text(
        "def score(prompts, completions, **columns): return [1.0] * len(prompts)\n"
    )
    load_checked_recipe(write(line8="  rewards: [relay_test_reward.score]"), [], 1)
    assert sys.path[-1] == str(directory)  # last, so that nothing there replaces a library


def test_the_saved_recipe_is_loaded_as_the_same_recipe(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    odd = r'task.prompt="no: {source} #x \t\n - \u2028 ü 1e-5\0"'
    overrides = [odd, "sft.eval_strategy=no", "ppo.max_grad_norm=.inf", "name='1e5'", "ppo.run_name=2024-01-01"]
    overrides += ["ppo.report_to=[tensorboard]", "sft.lr_scheduler_kwargs={num_cycles: 2}", "sft.use_peft=true"]
    overrides += [
        "ppo.rewards=[{name: bleu, weight: -1, lowercase: true}, {name: x.y, options: {name: z, weight: 2}}]"
    ]
    recipe = load_recipe(write(), overrides)
    file = RunDirectory.of(recipe).save_recipe(recipe)
    assert file == Path("runs/1e5/recipe.yaml")
    assert load_recipe(file) == recipe
    assert load_recipe(file, ["seed=4"]) == dataclasses.replace(recipe, seed=4)
    text = file.read_text(encoding="utf-8")
    assert f"# trl: {trl.__version__}\n" in text
    assert "hf_secret" not in text
    assert sorted(os.listdir(file.parent)) == ["recipe.yaml"]


def test_a_recipe_without_ppo_is_saved_too():
    recipe = load_recipe(write(), ["ppo=null"])
    assert load_recipe(RunDirectory.of(recipe).save_recipe(recipe)) == recipe


def test_stage_arguments_default_to_the_quickstart():
    Path("recipes").mkdir()
    Path(write()).rename("recipes/quickstart.yaml")
    Path("other.yaml").write_text("\n".join(LINES).replace("demo", "other"))
    assert parse_stage_arguments([], "A stage.").name == "demo"
    assert parse_stage_arguments(["seed=9"], "A stage.").seed == 9
    recipe = parse_stage_arguments(["other.yaml", "seed=8", "ppo.kl_coef=0.2"], "A stage.")
    assert (recipe.name, recipe.seed, recipe.ppo.kl_coef) == ("other", 8, 0.2)
    assert isinstance(recipe, Recipe)


def test_stage_arguments_end_with_one_sentence_from_one_process(capsys, monkeypatch):
    arguments = [write(), "ppo.kl_coeff=1"]
    message = "error: override 'ppo.kl_coeff=1': ppo.kl_coeff: unknown key; did you mean 'kl_coef'?\n"
    for rank, output in (("0", message), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as raised:
            parse_stage_arguments(arguments, "A stage.")
        assert raised.value.code == 2
        assert capsys.readouterr() == ("", output)


def test_stage_arguments_know_the_size_of_their_group(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(SystemExit):
        parse_stage_arguments([write()], "A stage.")
    assert "processes 7 = 224 prompts" in capsys.readouterr().err


def test_stage_help(capsys):
    with pytest.raises(SystemExit) as raised:
        parse_stage_arguments(["--help"], "Train by PPO.")
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert [
        w for w in ("Train by PPO.", "RECIPE", "section.key=value", "recipes/quickstart.yaml") if w not in text
    ] == []


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("translate English to French: {source}", "translate English to French: {source}"),
        ("{source} # not a comment", "{source} # not a comment"),
        ("- {source}", "- {source}"),
        ("[INST] {source} [/INST]", "[INST] {source} [/INST]"),
        ("'Q' & \"A\": {source}", "'Q' & \"A\": {source}"),
        (" !{source}* ", "!{source}*"),
        ("'it''s: {source}'", "it's: {source}"),
        ('"{source}\\n"', "{source}\n"),
        ("7", "7"),
        ("true", "true"),
    ],
)
def test_an_override_of_a_key_that_holds_text_is_that_text(written, text):
    assert load_recipe(write(), [f"task.prompt={written}"]).task.config.prompt == text


def test_overrides_of_text_in_other_sections_and_of_keys_that_are_no_text():
    overrides = ["ppo.run_name=a: b", "name=2026", "sft.run_name={x}", "ppo.sft_model_path=null"]
    overrides += ["ppo.stop_strings=[a]", "ppo.report_to=[wandb]"]
    overrides += ["eval.systems=[sft, {name: other, path: x}]", "eval.systems.1.path=y: z", "ppo.warmup_steps=3"]
    overrides += ["reward.pairs.metric=evaluate: x", "eval.metrics=[{name: bleu}]", "eval.metrics.0.name=chrf # x"]
    overrides += ["sft.report_to=[wandb]"]
    recipe = load_recipe(write(), overrides)
    assert (recipe.name, recipe.ppo.run_name, recipe.sft.arguments["run_name"]) == ("2026", "a: b", "{x}")
    assert (recipe.ppo.sft_model_path, recipe.ppo.stop_strings, recipe.ppo.warmup_steps) == (None, ("a",), 3)
    assert (recipe.eval.systems[1].path, recipe.reward.pairs.metric) == ("y: z", "evaluate: x")
    assert recipe.eval.metrics[0].name == "chrf # x" and recipe.sft.arguments["report_to"] == ["wandb"]
