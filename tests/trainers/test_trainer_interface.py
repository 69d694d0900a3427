"""PPOTrainer as TRL's GRPOTrainer and its config are used: sampling, models, data sets, what rewards log."""

import copy
import dataclasses
import json

import pytest
import torch
from datasets import Dataset, DatasetDict, Image
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from ppo_toys import SMALL, colours, read_metrics, training_steps, weights
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from pipeline.models.loading import lora_config
from pipeline.rewards import Reward, RewardError
from pipeline.trainers.ppo.checkpoint import TrainerState
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.trainer import PPOTrainer


@pytest.mark.parametrize("use_peft", [True, False])
def test_suppressed_tokens_keep_ratio_and_kl(make_trainer, tokenizer, use_peft):
    """They are in no completion, and policy and reference agree that they cannot be."""
    red = tokenizer.encode(" red", add_special_tokens=False)[0]
    usual = make_trainer("usual", use_peft=use_peft).collect_rollout(range(32)).sequences.completion_ids
    assert (usual == red).any()
    trainer = make_trainer(use_peft=use_peft, suppress_tokens=(red,), temperature=1.3, kl_coef=0.1)
    rollout = trainer.collect_rollout(range(32))
    assert not (rollout.sequences.completion_ids == red).any()
    mask = rollout.mask
    torch.testing.assert_close(rollout.logprobs[mask], rollout.ref_logprobs[mask], rtol=0, atol=1e-5)
    trainer.train()
    first, *_, last = training_steps(trainer.output_dir)
    assert first["val/ratio_first"] == pytest.approx(1, abs=1e-6) and first["objective/kl"] == pytest.approx(
        0, abs=1e-4
    )
    assert last["objective/kl"] != 0.0
    with torch.no_grad():
        states = trainer.shared(rollout.sequences)
    assert states.logprobs[mask].isfinite().all() and states.entropies[mask].isfinite().all()


def test_truncated_samples_have_the_log_probs_of_the_whole_policy(make_trainer):
    trainer = make_trainer(min_p=0.3, repetition_penalty=1.5)
    rollout = trainer.collect_rollout(range(16))
    whole = make_trainer("whole").learner.forward(
        [trainer._prompt_ids[row] for row in range(16)],
        [ids[mask].tolist() for ids, mask in zip(rollout.sequences.completion_ids, rollout.mask, strict=True)],
        trainer.tokenizer.pad_token_id,
    )[1]
    torch.testing.assert_close(rollout.logprobs, whole.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [((2, 999), r"the model has \d+ tokens, found \[999\]"), (None, "all that ends a completion")],
)
def test_tokens_that_cannot_be_suppressed(make_trainer, tokenizer, tokens, message):
    with pytest.raises(ValueError, match=rf"^ppo\.suppress_tokens: .*{message}"):
        make_trainer(suppress_tokens=tokens or (tokenizer.eos_token_id,))


def test_max_steps_ends_the_run(make_trainer, examples):
    steps = {"max_steps": 2, "total_episodes": PPOConfig.total_episodes}
    trainer = make_trainer(**steps)
    trainer.train()
    assert [line["step"] for line in training_steps(trainer.output_dir)] == [1, 2] and trainer.num_steps == 2
    with pytest.raises(ValueError, match=r"at its end, step 2.*: train\(resume_from_checkpoint=True\) restores"):
        make_trainer(**steps).train()
    longer = make_trainer(**{**steps, "max_steps": 3})
    longer.train(resume_from_checkpoint=True)
    assert [line["step"] for line in training_steps(trainer.output_dir)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("made", "episodes", "processes", "steps"),
    [((0, 0), 9, 1, 2), ((3, 24), 24, 1, 3), ((3, 20), 24, 1, 4), ((3, 20), 24, 2, 4)],
)
def test_steps_of_a_run_that_was_interrupted(made, episodes, processes, steps):
    state = TrainerState(step=made[0], episodes=made[1])
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert state.total_steps(PPOConfig(total_episodes=episodes, **batch), processes) == steps
    assert state.total_steps(PPOConfig(max_steps=7, **batch), processes) == 7


def test_several_held_out_samples_of_a_prompt_are_averaged(make_trainer, examples):
    rows = examples.select(range(10))
    seen = []

    def keep(completions, answered):
        seen.append((completions, answered["tag"]))
        return {"texts": float(len(completions))}

    trainer = make_trainer(num_generations_eval=3, validation=rows, compute_metrics=keep, temperature=1.5)
    figures = trainer.evaluate()
    ((texts, tags),) = seen
    assert figures["eval_texts"] == 30.0 and list(tags) == [tag for tag in rows["tag"] for _ in range(3)]
    assert figures["eval_reward"] == pytest.approx(sum(colours(texts, texts)) / 30)
    assert len({tuple(texts[start : start + 3]) for start in range(0, 30, 3)}) > 1
    assert any(len(set(texts[start : start + 3])) > 1 for start in range(0, 30, 3))
    assert trainer.evaluate() == figures and weights(trainer)  # the same samples at every step


@pytest.fixture
def build(taught_directory, examples, tmp_path, fresh_accelerate):
    """Make a trainer of what TRL's trainers take, by keywords alone."""

    def make(**given) -> PPOTrainer:
        arguments = {
            "model": str(taught_directory),
            "args": PPOConfig(**SMALL),
            "reward_funcs": colours,
            "train_dataset": examples,
            "peft_config": LoraConfig(r=4, target_modules="all-linear"),
            "output_dir": tmp_path / "ppo",
        }
        return PPOTrainer(**{**arguments, **given})

    return make


def test_a_model_by_its_directory_is_the_model(build, make_trainer, model_config):
    trainer = build(peft_config=lora_config(model_config))
    trainer.train()
    other = make_trainer("other")
    other.train()
    for name, tensor in weights(other).items():
        torch.testing.assert_close(weights(trainer)[name], tensor, rtol=0, atol=0)


def test_the_settings_have_defaults(build):
    assert build(
        args=None, train_dataset=Dataset.from_list([{"prompt": "say north", "completion": "red"}])
    ).args.kl_coef


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_peft_model_is_start_and_reference(build, taught, tokenizer, tmp_path, use_peft):
    adapted = get_peft_model(taught(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    merged = copy.deepcopy(adapted).merge_and_unload()
    settings = PPOConfig(**{**SMALL, "total_episodes": 8, "use_peft": use_peft})
    trainer = build(model=adapted, processing_class=tokenizer, peft_config=None, args=settings)
    rollout = trainer.collect_rollout(range(8))
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, rtol=0, atol=1e-5)
    ids = rollout.sequences.prompt_ids[:1, -3:]
    torch.testing.assert_close(trainer.shared.language_model(ids).logits, merged.eval()(ids).logits, rtol=0, atol=1e-4)
    trainer.train()
    trainer.save_model()
    if use_peft:
        assert trainer.shared.network.peft_config["default"].r == 2
        saved = json.loads((trainer.output_dir / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(trainer.output_dir / "base")
        loaded = PeftModel.from_pretrained(merged, trainer.output_dir).eval()
        torch.testing.assert_close(
            loaded(ids).logits, trainer.shared.language_model.eval()(ids).logits, rtol=0, atol=1e-4
        )


def test_a_stream_is_read_as_far_as_the_run_needs_it(build, examples):
    read = []
    stream = Dataset.from_list(list(examples)).to_iterable_dataset().map(lambda row: read.append(row["tag"]) or row)
    trainer = build(train_dataset=stream)
    trainer.train()
    assert len(trainer.train_dataset) == 24 and len(read) == 24
    with pytest.raises(ValueError, match=r"^eval_dataset: a stream may have no end; set ppo\.eval_examples"):
        build(eval_dataset=stream, output_dir=trainer.output_dir / "other")


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_held_out_sets_have_their_names_in_the_figures(build, examples, kind):
    sets = kind({"first": examples.select(range(6)), "second": examples.select(range(6, 16))})
    trainer = build(eval_dataset=sets, compute_metrics=lambda texts, rows: {"texts": float(len(texts))})
    trainer.train()
    line = next(line for line in read_metrics(trainer.output_dir) if "eval_reward" in line)
    assert line["eval_first_texts"] == 6.0 and line["eval_second_texts"] == 10.0
    mean = (line["eval_first_reward"] + line["eval_second_reward"]) / 2
    assert line["eval_reward"] == pytest.approx(mean) and trainer.state.best_metric is not None
    figures = trainer.evaluate(sets["second"])
    assert figures["eval_texts"] == 10.0 and "eval_second_reward" not in figures
    assert trainer.evaluate(sets["first"], metric_key_prefix="test")["test_texts"] == 6.0


def classifier(tokenizer, directory):
    """A tiny reward model and its directory."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return AutoModelForSequenceClassification.from_pretrained(directory)


@pytest.mark.parametrize("form", ["model", "tokenizer", "directory", "weighted"])
def test_a_classifier_is_a_reward_as_in_trl(build, tokenizer, tmp_path, form):
    model = classifier(tokenizer, tmp_path / "judge")
    functions = {"directory": str(tmp_path / "judge"), "weighted": Reward("judge", model, 0.5)}.get(form, model)
    given = {"reward_processing_classes": [None, tokenizer]} if form == "tokenizer" else {}
    if form == "tokenizer":
        functions, model.config.name_or_path = [colours, functions], "elsewhere/judge"
    trainer = build(reward_funcs=functions, **given)
    rollout = trainer.collect_rollout(range(8))
    texts = [
        prompt + tokenizer.decode(ids[mask], skip_special_tokens=True)
        for prompt, ids, mask in zip(rollout.prompts, rollout.sequences.completion_ids, rollout.mask, strict=True)
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.no_grad():
        expected = model.eval()(**batch).logits[:, 0]
    torch.testing.assert_close(rollout.rewards["judge"], expected)
    assert trainer.rewards[-1].weight == (0.5 if form == "weighted" else 1.0)


def test_what_rewards_log_is_in_the_files(build, examples):
    states = []

    async def judge(prompts, completions, tag, trainer_state, log_metric, log_extra):
        states.append((trainer_state.global_step, trainer_state.max_steps))
        log_metric("judge/size", float(len(completions)))
        log_metric("length_judged", 1.0)  # no figure of the trainer's, though one begins like it
        log_extra("verdict", [f"{name}!" for name in tag])
        return colours(prompts, completions)

    settings = PPOConfig(**{**SMALL, "num_sample_generations": 3})
    trainer = build(reward_funcs=judge, args=settings, eval_dataset=examples.select(range(4)))
    trainer.train()
    assert [line["judge/size"] for line in training_steps(trainer.output_dir)] == [8.0] * 3
    assert {line.get("eval_judge/size") for line in read_metrics(trainer.output_dir)} == {None, 4.0}
    assert all(line["length_judged"] == 1.0 for line in training_steps(trainer.output_dir))
    assert states[0] == (0, 1) and set(states[1:]) == {(step, 3) for step in range(4)}
    rows = [json.loads(line) for line in (trainer.output_dir / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8 + [3] * 8
    assert all(row["prompt"] in row["verdict"] and row["reward/judge"] == row["score"] for row in rows)


@pytest.mark.parametrize(("name", "whose"), [("objective/kl", "trainer's own"), ("words", "metric of the evaluation")])
def test_a_metric_may_not_have_a_name_of_the_trainers(build, examples, name, whose):
    def judge(prompts, completions, log_metric):
        log_metric(name, 1.0)
        return colours(prompts, completions)

    with pytest.raises(RewardError, match=rf"log_metric\('{name}', \.\.\.\), a .*{whose}"):
        trainer = build(  # which refuses the former before it trains
            reward_funcs=judge, eval_dataset=examples.select(range(4)), compute_metrics=lambda *_: {"words": 1.0}
        )
        assert name == "words"
        trainer.train()


@pytest.mark.parametrize("on_error", ["skip", "zero", "stop"])
def test_a_batch_that_no_reward_applies_to(build, on_error):
    def sometimes(prompts, completions, trainer_state):
        return [None] * len(prompts) if trainer_state.global_step == 1 else colours(prompts, completions)

    args = PPOConfig(**{**SMALL, "on_reward_error": on_error, "max_kl": 50.0, "kl_target": 1.0})
    trainer = build(reward_funcs=sometimes, args=args)
    if on_error == "stop":
        with pytest.raises(RewardError, match="no reward applies to completion 0"):
            trainer.train()
        return
    trainer.train()
    second = training_steps(trainer.output_dir)[1]
    assert second["objective/scores"] == (None if on_error == "skip" else 0.0)
    assert second["policy/optimizer_steps"] == (0.0 if on_error == "skip" else 2.0)
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    assert all(line["objective/kl_coef"] > 0 for line in training_steps(trainer.output_dir))


def test_variables_of_the_chat_template(build, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ mood }}"
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": "say north"}]}] * 4)
    args = PPOConfig(**{**SMALL, "chat_template_kwargs": {"mood": " east"}})
    trainer = build(
        args=args, processing_class=tokenizer, train_dataset=chats, reward_funcs=lambda prompts: [0.0] * len(prompts)
    )
    assert trainer._prompt_ids[0] == tokenizer("say north east", add_special_tokens=False)["input_ids"]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^ppo\.chat_template_kwargs: they would do nothing"):
        build(args=args, processing_class=tokenizer)


def refused_inputs():
    """What is given, and words of the sentence that refuses it."""
    rows = Dataset.from_list([{"prompt": "say north"}] * 4)
    plain = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    return {
        "no data": ({"train_dataset": None}, "train_dataset: missing"),
        "splits": ({"train_dataset": DatasetDict({"train": rows})}, r"it has the splits train; .*dataset\['train'\]"),
        "list": ({"train_dataset": [{"prompt": "x"}]}, "train_dataset: expected a datasets.Dataset, found a list"),
        "column": ({"train_dataset": rows.rename_column("prompt", "text")}, "no column `prompt`.* only text"),
        "images": ({"train_dataset": rows.add_column("images", [None] * 4).cast_column("images", Image())}, "images"),
        "no reward": ({"reward_funcs": None}, "reward_funcs: missing"),
        "number": ({"reward_funcs": [colours, 3]}, "reward_funcs: a int is no reward"),
        "metric": ({"reward_funcs": "bleu"}, r"build_rewards\(\[RewardConfig\('bleu'\)\]\)"),
        "two labels": ({"reward_funcs": plain}, "with 2 labels is no reward model"),
        "tokenizers": ({"reward_processing_classes": [None, None]}, "one for each of the 1 reward_funcs"),
        "model": ({"model": 3}, "model: expected a language model"),
        "tokenizer": ({"processing_class": "gpt2"}, "processing_class: expected a tokenizer"),
        "adapter": ({"peft_config": PromptTuningConfig(num_virtual_tokens=2)}, "PPO trains LoRA adapters"),
        "settings": ({"args": {"kl_coef": 1.0}}, "args: expected a PPOConfig, found a dict"),
    }


@pytest.mark.parametrize("name", refused_inputs())
def test_inputs_that_are_refused_say_what_to_give(build, name):
    given, words = refused_inputs()[name]
    with pytest.raises(ValueError, match=words) as refusal:
        build(**given)
    assert (not isinstance(refusal.value, KeyError) and ";" in str(refusal.value)) or "expected" in str(refusal.value)


OURS = {field.name for field in dataclasses.fields(PPOConfig)}
THEIRS = {field.name for config in (GRPOConfig, RLOOConfig) for field in dataclasses.fields(config)}


@pytest.mark.parametrize("name", sorted(THEIRS - OURS))
def test_settings_of_trl_are_taken_or_refused_in_a_sentence(name):
    with pytest.raises(ValueError, match=rf"^ppo\.{name}: no key of PPO.*(use|leave|give|train|write|never|rollout)"):
        PPOConfig(**{name: None})


def test_the_sentences_are_of_settings_that_there_are_not():
    from pipeline.trainers.ppo import trl_arguments

    assert not OURS & trl_arguments.CONFIG_ARGUMENTS.keys()
    with pytest.raises(ValueError, match=r"^ppo: unknown argument 'kl_coeff'; did you mean 'kl_coef'\?$"):
        PPOConfig(kl_coeff=1.0)


@pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])
def test_arguments_of_trls_trainers_are_taken_or_refused_in_a_sentence(build, trainer):
    import inspect

    ours = inspect.signature(PPOTrainer.__init__).parameters
    theirs = set(inspect.signature(trainer.__init__).parameters) - set(ours)
    assert theirs >= {"callbacks", "optimizers"}
    for name in [*theirs, "use_vllm_typo"]:
        with pytest.raises(ValueError, match=rf"^PPOTrainer: .*{name}"):
            build(**{name: None})
