"""Recipes: what is read, what is refused, and with which words."""

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
from pipeline.recipe.reader import resolve_scalar
from pipeline.recipe.refused import REFUSED_SFT_KEYS
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
    """The message a recipe is refused with, by its text or by what it points to."""
    path = write(text, **lines)
    with pytest.raises(RecipeError) as raised:
        check_recipe(load_recipe(path, overrides))
    assert "\n" not in str(raised.value)
    return str(raised.value)


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
    assert {text: resolve_scalar(text) for text in values} == values
    assert type(resolve_scalar("1e5")) is float


def test_numbers_and_text_reach_the_configs_as_written():
    recipe = load_recipe(write(), ["sft.learning_rate=1e-5", "sft.eval_strategy=no", "ppo.kl_coef=1", "ppo.top_p=.5"])
    assert recipe.sft.arguments["learning_rate"] == 1e-5
    assert recipe.sft.arguments["eval_strategy"] == "no"
    assert type(recipe.ppo.kl_coef) is float


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"line2": "sede: 3"}, "recipe.yaml:2: sede: unknown key; did you mean 'seed'?"),
        (
            {"line10": "  per_device_batch_size: 8"},
            "recipe.yaml:10: ppo.per_device_batch_size: unknown key; did you mean 'per_device_train_batch_size'?",
        ),
        ({"line10": "  kl_coeff: 1"}, "recipe.yaml:10: ppo.kl_coeff: unknown key; did you mean 'kl_coef'?"),
        ({"line10": "  seed: 1"}, "recipe.yaml:10: ppo.seed: unknown key; it is a key of the top level"),
        ({"line6": "sft: {kl_coef: 1}"}, "recipe.yaml:6: sft.kl_coef: unknown key; it is a key of ppo"),
        (
            {"line5": "task: {name: parallel, max_train_exampels: 1}"},
            "recipe.yaml:5: task.max_train_exampels: unknown key; did you mean 'max_train_examples'?",
        ),
        (
            {"line4": "  from_scratch: {hiden_size: 32}"},
            "recipe.yaml:4: model.from_scratch.hiden_size: unknown key; did you mean 'hidden_size'?",
        ),
        (
            {"line8": "  rewards: [{name: bleu, wieght: 2}]"},
            "recipe.yaml:8: ppo.rewards.0.wieght: unknown key; did you mean 'weight'? "
            "(an option of that name goes into options: {wieght: ...})",
        ),
        (
            {"line6": "sft: {learning_rat: 1}"},
            "recipe.yaml:6: sft.learning_rat: unknown key; did you mean 'learning_rate'?",
        ),
        (
            {"line2": "xyz: 3"},
            "recipe.yaml:2: xyz: unknown key; the keys here are name, seed, output_dir, model, task, sft, reward, "
            "ppo, eval",
        ),
        ({"line10": "  rewards: [ter]"}, "recipe.yaml:10: ppo.rewards: duplicate key, first written at recipe.yaml:8"),
        (
            {"line2": "seed: !!python/object:os.system 3"},
            "recipe.yaml:2: seed: tags are not allowed in a recipe, found !!python/object:os.system",
        ),
        ({"line2": "seed: !!int 3"}, "recipe.yaml:2: seed: tags are not allowed in a recipe, found !!int"),
        ({"line2": "seed: !mine 3"}, "recipe.yaml:2: seed: tags are not allowed in a recipe, found !mine"),
        ({"line2": "1: 3"}, "recipe.yaml:2: recipe: a key must be text, found 1"),
        ({"line2": "seed: [1"}, "recipe.yaml:3: not valid YAML: expected ',' or ']', but got ':'"),
        ({"line2": "seed: *x"}, "recipe.yaml:2: seed: the alias *x stands before or inside its anchor"),
        ({"line2": "..."}, "recipe.yaml:3: a recipe is one YAML document, found a second one"),
        ({"line2": ""}, None),
        ({"line1": ""}, "recipe.yaml: name: missing: this key is needed"),
        ({"line8": ""}, "recipe.yaml:7: ppo.rewards: missing: this key is needed"),
        (
            {"line8": "  rewards: []"},
            "recipe.yaml:8: ppo.rewards: at least one reward is needed, such as [{name: bleu}], found 'none'",
        ),
        (
            {"line10": "  reward_model_path: x"},
            "recipe.yaml:10: ppo.reward_model_path: does nothing without the reward learned in ppo.rewards, found 'x'",
        ),
        (
            {"line2": "reward: {max_length: 5}"},
            "recipe.yaml:2: reward.max_length: this key of RewardConfig is not for a recipe: pairs longer than the "
            "model's context are dropped and counted",
        ),
        (
            {"line2": "reward: {lerning_rate: 5}"},
            "recipe.yaml:2: reward.lerning_rate: unknown key; did you mean 'learning_rate'?",
        ),
        (
            {"line2": "reward: {eval_steps: 5}"},
            "recipe.yaml:2: reward.eval_steps: it would do nothing, because eval_strategy is 'epoch'; "
            "set reward.eval_strategy: steps or remove it",
        ),
        (
            {"line2": "reward: {min_accuracy: 55}"},
            "recipe.yaml:2: reward.min_accuracy: must be from 0 to 1, found 55.0",
        ),
        (
            {"line2": "reward: {pairs: {from: ppo}}"},
            "recipe.yaml:2: reward.pairs.from: must be one or both of sft, references, found ['ppo']; for a "
            "preference data set name its path",
        ),
        (
            {"line2": "reward: {pairs: {from: sft, path: x.jsonl}}"},
            "recipe.yaml:2: reward.pairs.from: it would do nothing, because path names a data set; keep one",
        ),
        (
            {"line2": "reward: {pairs: {origins: [sft]}}"},
            "recipe.yaml:2: reward.pairs.origins: unknown key; did you mean 'from'?",
        ),
        (
            {"line2": "reward: {pairs: {sampels: 3}}"},
            "recipe.yaml:2: reward.pairs.sampels: unknown key; did you mean 'samples'?",
        ),
        (
            {"line2": "reward: {model: x, learning_rate: 1e-3}"},
            "recipe.yaml:2: reward.learning_rate: it would do nothing: reward.model is judged as it is, not trained",
        ),
        (
            {"line5": "task: {name: paralel}"},
            "recipe.yaml:5: task.name: 'paralel' is not one of parallel, columns, "
            "nor the dotted path of a module; did you mean 'parallel'?",
        ),
        ({"line5": "task: {name: json.decoder}"}, "recipe.yaml:5: task.name: "
         "the module 'json.decoder' has no dataclass Config; it needs files and load too"),
        ({"line5": "task: {max_train_examples: 3}"}, "recipe.yaml:5: task.name: missing: this key is needed"),
        (
            {"line5": "task: {name: parallel, source: '{split}.en', target: '{split}.de', max_train_examples: 0}"},
            "recipe.yaml:5: task.max_train_examples: must be at least 1, found 0",
        ),
        (
            {"line9": "  num_mini_batches: 3"},
            "recipe.yaml:9: ppo.num_mini_batches: must divide gradient_accumulation_steps (4), found 3",
        ),
        (
            {"line8": "  rewards: [ter, {name: bleu, weight: 0}]"},
            "recipe.yaml:8: ppo.rewards: 'bleu' has weight 0, so it would change nothing: remove it",
        ),
        (
            {"line4": "  model_revision: x"},
            "recipe.yaml:3: model: set exactly one of model_name_or_path and from_scratch, found neither",
        ),
        ({"line7": "other:"}, "recipe.yaml:7: other: unknown key; the keys here are "
         "name, seed, output_dir, model, task, sft, reward, ppo, eval"),
    ],
)  # fmt: skip
def test_refusals_name_file_line_key_and_fix(lines, message):
    if message is None:
        check_recipe(load_recipe(write(**lines)))
    else:
        assert refusal(**lines) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1.5", "seed: expected a whole number, found 1.5"),
        ("seed=true", "seed: expected a whole number, found true"),
        ("seed=-1", "seed: must be from 0 to 4294967295, found -1"),
        ("seed=null", "seed: expected a whole number, found null"),
        ("name=7", "name: expected text, found 7; put quotes around it"),
        ("ppo.total_episodes=1e5", "ppo.total_episodes: expected a whole number, found 100000.0; write 100000"),
        ("ppo.kl_coef=high", "ppo.kl_coef: expected a number, found 'high'"),
        ("ppo.kl_coef=.nan", "ppo.kl_coef: expected a number, found nan"),
        ("ppo.kl_coef=null", "ppo.kl_coef: expected a number, found null"),
        ("ppo.whiten_rewards=1", "ppo.whiten_rewards: expected true or false, found 1"),
        (
            "ppo.whiten_rewards=yes",
            "ppo.whiten_rewards: expected true or false, found 'yes'; YAML 1.2 has only true and false",
        ),
        ("ppo.rewards=bleu", "ppo.rewards: expected a list, found 'bleu'"),
        ("ppo.rewards=[3]", "ppo.rewards.0: expected a name or a mapping with a name, found 3"),
        ("ppo.rewards=[{weight: 3}]", "ppo.rewards.0.name: missing: this key is needed"),
        ("sft=[1]", "sft: expected a section of keys, found a list"),
        ("model.from_scratch=true", "model.from_scratch: expected a mapping or null, found true"),
        (
            "model.lora_target_modules=[q, 1]",
            "model.lora_target_modules.1: expected text, found 1; put quotes around it",
        ),
        (
            "task.prompt={source}",
            'task.prompt: expected text, found a mapping; put quotes around a text that has braces or ": " in it',
        ),
        ("sft.learning_rate=fast", "sft.learning_rate: expected a number, found 'fast'"),
        ("sft.eval_strategy=false", "sft.eval_strategy: expected one of no, steps, epoch, found false"),
        (
            "sft.eval_strategy=step",
            "sft.eval_strategy: expected one of no, steps, epoch, found 'step'; did you mean 'steps'?",
        ),
        ("sft.loss_type=chunked_nll", "sft.loss_type: expected one of nll, dft, found 'chunked_nll'"),
        ("sft.use_peft=maybe", "sft.use_peft: expected true or false, found 'maybe'"),
        (
            "sft.eval_steps=10",
            "sft.eval_steps: it would do nothing, because eval_strategy is 'epoch'; "
            "set sft.eval_strategy: steps or remove it",
        ),
        (
            "sft.packing_strategy=bfd",
            "sft.packing_strategy: it would do nothing, because packing is false; set sft.packing: true or remove it",
        ),
        ("sft.project=x", "sft.project: it would do nothing: only report_to: trackio reads it"),
        ("sft.run_name=x", "sft.run_name: it would do nothing, because report_to is none; set sft.report_to"),
        (
            "eval.systems=[base, foo]",
            "eval.systems: 'foo' is not one of base, sft, ppo; another model is a mapping: "
            "{name: ..., path: a directory or Hub id}",
        ),
        (
            "eval.systems=[sft, {name: sft, path: x}]",
            "eval.systems: a further system needs a name of letters, "
            "digits, '.', '_' and '-' that is not one of base, sft, ppo, control, found 'sft'",
        ),
        (
            "eval.systems=[{name: a, path: x}, {name: a, path: y}]",
            "eval.systems: each system once, at least one, found ['a', 'a']",
        ),
        ("eval.systems=[{name: a}]", "eval.systems.0.path: missing: this key is needed"),
        (
            "eval.beam_sizes=[1]",
            "eval.beam_sizes: numbers of beams other than eval.num_beams (1), at least 1, found 1",
        ),
        ("eval.samples_per_prompt=-1", "eval.samples_per_prompt: must be at least 0, found -1"),
        ("eval.sample_temperature=0", "eval.sample_temperature: must be above 0, found 0.0"),
        ("ppo.lam=2", "ppo.lam: must be in [0, 1], found 2.0"),
        (
            "nonsense=1",
            "nonsense: unknown key; the keys here are name, seed, output_dir, model, task, sft, reward, ppo, eval",
        ),
        ("ppo.kl_coeff=1", "ppo.kl_coeff: unknown key; did you mean 'kl_coef'?"),
        ("seed=!!python/none 1", "seed: tags are not allowed in a recipe, found !!python/none"),
        ("ppo.rewards=[bleu", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("ppo.rewards.1.weight=2", "ppo.rewards is a list of 1, so its items are ppo.rewards.0"),
        ("ppo.rewards.first=ter", "ppo.rewards is a list of 1, so its items are ppo.rewards.0"),
        (
            "ppo.rewards.0.weight=2",
            "ppo.rewards.0 is 'bleu', which has no keys; set it as a whole, such as ppo.rewards.0={name: ...}",
        ),
        ("verbose", "write an override as section.key=value, such as ppo.kl_coef=0.1"),
        ("=1", "write an override as section.key=value, such as ppo.kl_coef=0.1"),
        ("ppo..kl_coef=1", "write an override as section.key=value, such as ppo.kl_coef=0.1"),
    ],
)
def test_refused_overrides_are_named_instead_of_a_line(override, message):
    assert refusal(override) == f"override {override!r}: {message}"


BART = "{architecture: bart, hidden_size: 32, num_attention_heads: 2, vocab_size: 400, max_position_embeddings: 64}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.packing=true", "it joins texts into one row, and an encoder reads one prompt; remove it"),
        ("sft.eval_packing=true", "it joins texts into one row, and an encoder reads one prompt; remove it"),
        ("sft.padding_free=true", "it joins texts into one row, and an encoder reads one prompt; remove it"),
        ("sft.pad_to_multiple_of=8", "its two sides are padded to the longest of a batch; remove it"),
        ("sft.router_aux_loss_coef=0.1", "the loss of a router is not computed for it; remove it"),
        (
            "sft.neftune_noise_alpha=5",
            "its two sides have embeddings of their own, which would get no noise; remove it",
        ),
        ("sft.completion_only_loss=false", "it predicts no token of the prompt; remove it"),
    ],
)
def test_what_an_encoder_decoder_cannot_do_is_refused_by_name(override, message):
    model = f"  from_scratch: {BART}"
    key = override.split("=")[0]
    assert refusal(override, line4=model) == f"override {override!r}: {key}: not for an encoder-decoder: {message}"
    check_recipe(load_recipe(write(line4=model), ["sft.loss_type=dft"]))
    if "packing" not in override and "free" not in override:
        check_recipe(load_recipe(write(), [override]))  # and a causal model may have it


def test_each_side_of_an_encoder_decoder_has_positions_of_its_own():
    model = f"  from_scratch: {BART}"
    check_recipe(load_recipe(write(line4=model), ["ppo.response_length=64"]))
    check_recipe(load_recipe(write(line4=model.replace("bart", "t5")), ["ppo.response_length=100"]))
    assert refusal("ppo.response_length=65", line4=model) == (
        "override 'ppo.response_length=65': ppo.response_length: must be at most "
        "model.from_scratch.max_position_embeddings (64), found 65"
    )


def test_decoder_linear_is_for_encoder_decoders():
    override = "model.lora_target_modules=decoder-linear"
    assert refusal(override) == (
        f"override {override!r}: model.lora_target_modules: decoder-linear is for encoder-decoders, and this model "
        "has no encoder; use all-linear"
    )
    check_recipe(load_recipe(write(line4=f"  from_scratch: {BART}"), [override]))


@pytest.mark.parametrize("name", ["../../x", "a/b", ".hidden", "-x", "", "a b", "naïve"])
def test_a_name_is_one_plain_directory(name):
    override = f"name='{name}'"
    assert refusal(override) == (
        f"override {override!r}: name: {name!r} names a directory: "
        "use letters, digits, '.', '_' and '-', starting with a letter, digit or '_'"
    )


def test_a_conflict_between_file_and_override_names_both():
    assert refusal("model.model_name_or_path=gpt2") == (
        "recipe.yaml:3 with override 'model.model_name_or_path=gpt2': "
        "model: set exactly one of model_name_or_path and from_scratch, found both"
    )


def test_a_recipe_that_cannot_be_read():
    write()
    cases = {
        "recipes.yaml": "recipes.yaml: no such recipe file; did you mean 'recipe.yaml'?",
        "other/x.yaml": "other/x.yaml: no such recipe file",
        ".": ".: the recipe cannot be read ([Errno 21] Is a directory: '.')",
    }
    for path, message in cases.items():
        with pytest.raises(RecipeError) as raised:
            load_recipe(path)
        assert str(raised.value) == message
    Path("recipe.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(RecipeError, match=r"^recipe\.yaml:1: not UTF-8 \(byte 6\); convert it"):
        load_recipe("recipe.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "recipe.yaml: a recipe is a mapping of sections such as model: and task:, found a list or value"),
        ("", "recipe.yaml: name: missing: this key is needed"),
        ("%YAML 1.1\n---\nname: no\n", "recipe.yaml:2: recipes are YAML 1.2; remove the %YAML line"),
        ("? [a]\n: b\n", "recipe.yaml:1: recipe: a key must be plain text"),
        ("a: " + "[" * 30 + "]" * 30, "recipe.yaml:1: a.0.0: nested more than 20 levels deep"),
    ],
)
def test_text_that_is_no_recipe(text, message):
    assert refusal(text=text) == message


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


REFUSED_BY_NAME = """
    output_dir seed data_seed use_cpu remove_unused_columns dataset_text_field dataset_kwargs eos_token pad_token
    chat_template_path model_init_kwargs trust_remote_code assistant_only_loss resume_from_checkpoint do_train do_eval
    do_predict push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision deepspeed
    fsdp fsdp_config accelerator_config parallelism_config local_rank ddp_backend use_liger_kernel truncation_mode
    overwrite_output_dir logging_dir trackio_space_id label_names prediction_loss_only eval_accumulation_steps
    include_for_metrics batch_eval_metrics restore_callback_states_from_checkpoint length_column_name use_cache
    auto_find_batch_size enable_jit_checkpoint bf16_full_eval fp16_full_eval save_on_each_node ddp_timeout
"""


@pytest.mark.parametrize("key", REFUSED_BY_NAME.split())
def test_keys_of_sft_config_that_could_not_be_honoured_are_refused_by_name(key):
    message = refusal(f"sft.{key}=1")
    assert message.startswith(f"override 'sft.{key}=1': sft.{key}: this key of SFTConfig is not for a recipe: ")
    assert len(message.split(": ")[-1]) > 20


def test_some_reasons():
    start = "this key of SFTConfig is not for a recipe: "
    reasons = {
        "hub_token": "Relay never uploads anything",
        "seed": "write seed at the top of the recipe, where it holds for every stage",
        "fsdp": "hardware is chosen by accelerate launch and accelerate_configs/, not by a recipe",
        "eos_token": "Relay turns text into tokens itself, the same way for every stage",
        "trust_remote_code": "use the keys of the model section",
    }
    for key, reason in reasons.items():
        assert refusal(line6=f"sft: {{{key}: x}}") == f"recipe.yaml:6: sft.{key}: {start}{reason}"


def test_every_accepted_key_of_sft_config_takes_its_own_default():
    """A type that could not be checked would refuse the value TRL itself uses."""
    fields = [f for f in dataclasses.fields(trl.SFTConfig) if f.name not in REFUSED_SFT_KEYS]
    idle = {"eval_steps", "save_steps", "packing_strategy", "run_name", "project"}
    for f in fields:
        if f.name.startswith("hub_") or f.name in idle or f.default in (dataclasses.MISSING, None):
            continue
        value = "''" if f.default == "" else str(f.default.value if hasattr(f.default, "value") else f.default)
        value = value.lower() if isinstance(f.default, bool) else value
        load_recipe(write(), [f"sft.{f.name}={value}"])


def test_keys_of_sft_config_that_another_makes_idle():
    assert refusal("sft.max_steps=5", "sft.num_train_epochs=2") == (
        "override 'sft.num_train_epochs=2': sft.num_train_epochs: it would do nothing, because max_steps is set; "
        "keep one"
    )
    assert refusal("sft.gradient_checkpointing=true", "sft.activation_checkpointing=false") == (
        "override 'sft.gradient_checkpointing=true': sft.gradient_checkpointing: it would do nothing, "
        "because activation_checkpointing is set too; keep one"
    )
    load_recipe(write(), ["sft.eval_strategy=steps", "sft.eval_steps=10", "sft.report_to=wandb", "sft.run_name=x"])
    assert "tensorboard" in refusal("sft.report_to=tensorboard", "sft.run_name=x")
    assert "adamw_torch_fused" in refusal("sft.optim_args=x=1")
    assert "optim is sgd" in refusal("sft.optim=sgd", "sft.optim_target_modules=all-linear")
    load_recipe(write(), ["sft.optim=sgd", "sft.optim_args=momentum=0.9"])


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
    assert without.eval.max_new_tokens == 53
    assert refusal("ppo=null", line11="eval: {systems: [sft, ppo]}") == (
        "recipe.yaml:11: eval.systems: 'ppo' cannot be evaluated: the recipe has no ppo section"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model={model_name_or_path: ./none}", "model.model_name_or_path: no directory './none'; "
         "give an existing model directory or a Hub id"),
        ("ppo.sft_model_path=empty", "ppo.sft_model_path: the directory 'empty' holds no model "
         "(no config.json in it)"),
        ("task={name: parallel, source: 'd/{split}.en', target: 'd/{split}.de'}",
         "task.source: no file 'd/train.en'; set task.data_dir to the folder that holds the data"),
        ("ppo.response_length=64", "ppo.response_length: must be below model.from_scratch.max_position_embeddings "
         "(64) to leave room for the prompt, found 64"),
        ("eval.max_new_tokens=65", "eval.max_new_tokens: must be below model.from_scratch.max_position_embeddings "
         "(64) to leave room for the prompt, found 65"),
        ("sft.max_length=65", "sft.max_length: must be at most model.from_scratch.max_position_embeddings (64), "
         "found 65"),
        ("ppo.per_device_train_batch_size=51", "ppo.per_device_train_batch_size: one PPO batch is 51 x "
         "gradient_accumulation_steps 4 x processes 1 = 204 prompts, but there are 200 training examples; "
         "lower one of them"),
        ("ppo.per_device_train_batch_size=0", "ppo.per_device_train_batch_size: must be at least 1, found 0"),
        ("sft.per_device_train_batch_size=0", "sft.per_device_train_batch_size: must be at least 1, found 0"),
        ("ppo.metric_for_best_model=reward", "ppo.metric_for_best_model: must be a logged evaluation metric, which "
         "starts with eval_, found 'reward'; did you mean 'eval_reward'?"),
        ("sft.metric_for_best_model=loss", "sft.metric_for_best_model: must be a logged evaluation metric, which "
         "starts with eval_, found 'loss'; did you mean 'eval_loss'?"),
        ("ppo.run_name=x", "ppo.run_name: it would do nothing, because report_to is empty; set ppo.report_to"),
        ("model={from_scratch: {}, use_peft: false, lora_r: 4}", "model.lora_r: it would do nothing, "
         "because no stage has use_peft: true"),
        ("output_dir=recipe.yaml", "output_dir: cannot write to '{cwd}/recipe.yaml' (Not a directory); "
         "choose another directory"),
        ("eval.metrics=[blue]", "eval.metrics.0: unknown metric 'blue'; did you mean 'bleu'? "),
        ("eval.metrics=[chrf, {name: bleu, lower: 1}]", "eval.metrics.1: metric bleu: unknown option 'lower'"),
        ("ppo.rewards=[bleu, nothing]", "ppo.rewards: 'nothing' is not one of constant, learned, bleu, "),
        ("ppo.rewards=[bleu, bleu]", "ppo.rewards: each reward once, found bleu, bleu"),
        ("ppo.rewards=[no_such_package.reward]", "ppo.rewards: cannot import 'no_such_package.reward' "
         "(No module named 'no_such_package')"),
    ],
)  # fmt: skip
def test_what_a_recipe_points_to_is_checked_before_anything_is_loaded(override, message):
    Path("empty").mkdir()
    assert refusal(override).startswith(f"override {override!r}: {message.replace('{cwd}', os.getcwd())}")


def test_the_number_of_processes_counts_in_the_batch():
    recipe = load_recipe(write())
    check_recipe(recipe, num_processes=6)
    with pytest.raises(RecipeError, match=r"8 x gradient_accumulation_steps 4 x processes 7 = 224 prompts, but there"):
        check_recipe(recipe, num_processes=7)


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
    assert sys.path[-1] == str(directory)


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
