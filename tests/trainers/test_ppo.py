"""PPOTrainer on a tiny model: its first step, its steps, restarts, what reaches the rewards, what it saves."""

import itertools
import json
import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from datasets import Dataset
from ppo_toys import colours, read_metrics, saved_tensors, training_steps, weights

from pipeline.models.loading import load_policy
from pipeline.models.states import completion_states, lm_head
from pipeline.models.text import decode
from pipeline.rewards import Reward, RewardError
from pipeline.trainers.checkpoints import list_checkpoints
from pipeline.trainers.ppo.checkpoint import load_checkpoint


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Equal bit for bit."""
    return all(torch.equal(first[name], second[name]) for name in first | second)


def one_experience(trainer):
    """A rollout of the first step, and what is learnt from it."""
    rollout = trainer.collect_rollout(trainer.prompt_rows(trainer.state.step))
    return rollout, trainer.compute_advantages(rollout)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_p": 0.7},
        {"top_k": 5, "temperature": 0.6},
        {"temperature": 1.7, "top_p": 0.9, "top_k": 20},
        {"use_peft": False},
        {"gradient_checkpointing": True},
        {"value_model": "adapter"},
        {"value_model": "adapter", "gradient_checkpointing": True},
        {"min_new_tokens": 3},
        {"stop_strings": ("e",)},
        {"kl_placement": "loss", "kl_estimator": "k3"},
        {"bf16": True, "learning_rate": 5e-2},
    ],
    ids=lambda settings: ",".join(settings) or "defaults",
)
def test_before_the_first_update_the_ratio_is_1_and_the_kl_0(make_trainer, settings):
    trainer = make_trainer(total_episodes=16, **settings)
    trainer.train()
    first, second = training_steps(trainer.output_dir)
    assert first["val/ratio_first"] == 1.0
    assert second["val/ratio_first"] == 1.0
    assert first["objective/kl"] == 0.0 and first["objective/non_score_reward"] == 0.0
    assert second["objective/kl"] != 0.0  # the policy moved
    assert first["val/ratio"] != 1.0  # in the second epoch


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_new_tokens": 3}], ids=str)
def test_the_kl_that_is_logged_is_the_mean_log_ratio_of_the_whole_policies(make_trainer, taught, settings):
    trainer = make_trainer(temperature=0.7, total_episodes=16, **settings)
    trainer.update(one_experience(trainer)[1])
    rollout = trainer.collect_rollout(trainer.prompt_rows(1))
    logged, sequences, ratios = trainer.compute_advantages(rollout)[1]["objective/kl"], rollout.sequences, []
    with torch.no_grad():
        for model in (trainer.shared.language_model, taught().eval()):
            logits = lm_head(model)(completion_states(model, sequences)) / 0.7  # nothing cut off
            chosen = logits.log_softmax(-1).gather(-1, sequences.completion_ids.unsqueeze(-1)).squeeze(-1)
            ratios.append((chosen * sequences.completion_mask).sum(1))
    assert logged == pytest.approx(float((ratios[0] - ratios[1]).mean()), abs=1e-5) and abs(logged) > 1e-3


def test_the_saved_generation_settings_change_neither_ratio_nor_kl(make_trainer, taught):
    trainer = make_trainer(total_episodes=8)
    trainer.shared.language_model.generation_config.update(repetition_penalty=1.3, temperature=0.5, top_k=3)
    trainer.train()
    step = training_steps(trainer.output_dir)[0]
    assert step["val/ratio_first"] == 1.0 and step["objective/kl"] == 0.0
    assert trainer.shared.language_model.generation_config.repetition_penalty == 1.3


def test_mini_batches_start_at_a_ratio_of_1(make_trainer):
    trainer = make_trainer(total_episodes=8, num_mini_batches=2)  # other rows together: 1 but for rounding
    trainer.train()
    assert training_steps(trainer.output_dir)[0]["val/ratio_first"] == pytest.approx(1.0, abs=1e-5)


def test_pad_may_equal_eos(make_trainer, tokenizer):
    distinct = make_trainer("distinct")
    distinct.train()
    tokenizer.pad_token = tokenizer.eos_token
    equal = make_trainer("equal", processing_class=tokenizer)
    equal.train()
    assert equal.tokenizer.pad_token_id == equal.tokenizer.eos_token_id
    assert same(weights(equal), weights(distinct))
    assert read_metrics(equal.output_dir) == read_metrics(distinct.output_dir)


def test_statistics_of_a_step_are_those_of_its_rollout(make_trainer):
    trainer = make_trainer(kl_coef=0.5)
    trainer.update(one_experience(trainer)[1])
    trainer.state = replace(trainer.state, step=1)
    rollout = trainer.collect_rollout(trainer.prompt_rows(1))
    stats = trainer.compute_advantages(rollout)[1]
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    assert kl.abs().min() > 0
    expected = {
        "objective/kl": kl.mean(),
        "objective/scores": rollout.scores.mean(),
        "objective/scores_std": rollout.scores.std(correction=0),
        "objective/non_score_reward": -0.5 * kl.mean(),
        "objective/rlhf_reward": (rollout.scores - 0.5 * kl).mean(),
        "objective/entropy": rollout.entropies.sum(1).mean(),
        "objective/length": rollout.sequences.completion_mask.sum(1).float().mean(),
        "objective/finished": rollout.finished.float().mean(),
    }
    assert {name: stats[name] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, abs=1e-6
    )


def test_the_same_seed_gives_the_same_weights_bit_for_bit(make_trainer):
    found = []
    for name, seed in (("first", 3), ("second", 3), ("third", 4)):
        torch.manual_seed(len(found))  # what happened before does not matter
        trainer = make_trainer(name, seed=seed, num_mini_batches=2)
        trainer.train()
        found.append((weights(trainer), (trainer.output_dir / "metrics.jsonl").read_text()))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not same(found[0][0], found[2][0]) and found[0][1] != found[2][1]


def test_sampling_follows_the_seed_and_the_step_alone(make_trainer):
    trainer, found = make_trainer(), []
    rows = trainer.prompt_rows(0)
    for step in (0, 0, 1):
        trainer.state = replace(trainer.state, step=step)
        torch.manual_seed(len(found))
        state = torch.random.get_rng_state()
        found.append(trainer.collect_rollout(rows).completions)
        assert torch.equal(torch.random.get_rng_state(), state)
    assert found[0] == found[1] != found[2]


def test_every_trained_weight_moves(make_trainer):
    trainer = make_trainer()
    before = weights(trainer)
    trainer.train()
    moved = [not torch.equal(before[name], tensor) for name, tensor in weights(trainer).items()]
    assert all(moved)


@pytest.mark.parametrize(
    ("episodes", "epochs", "mini_batches", "accumulation", "steps"),
    [(24, 2, 1, 2, 3), (20, 3, 2, 2, 3), (16, 1, 4, 4, 1), (1, 2, 2, 2, 1)],
)
def test_optimizer_steps_are_steps_x_epochs_x_mini_batches(
    make_trainer, episodes, epochs, mini_batches, accumulation, steps
):
    trainer = make_trainer(
        total_episodes=episodes,
        num_ppo_epochs=epochs,
        num_mini_batches=mini_batches,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    lines = training_steps(trainer.output_dir)
    assert [line["step"] for line in lines] == list(range(1, steps + 1)) and trainer.state.step == steps
    assert lines[-1]["episode"] == steps * 4 * accumulation
    counts = {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()}
    assert counts == {steps * epochs * mini_batches}
    assert lines[-1]["lr"] == pytest.approx(0.0, abs=1e-12)  # the schedule ends with the last of them
    if steps > 1:
        assert lines[0]["lr"] == pytest.approx(5e-3 * (1 - 1 / steps))


def gradients_of(trainer, experience) -> dict[str, torch.Tensor]:
    """What one update would step along, before the optimizer does."""
    found = {}

    def step() -> None:
        found.update({n: p.grad.clone() for n, p in trainer.shared.named_parameters() if p.requires_grad})

    trainer.optimizer.step = step
    trainer.update(experience)
    return found


def test_mini_batches_are_drawn_anew_in_each_epoch(make_trainer):
    _, experience = one_experience(make_trainer())
    numbers = torch.arange(8.0).unsqueeze(1).expand_as(experience.values)  # which row it is
    experience = replace(experience, values=numbers)
    generator = torch.Generator().manual_seed(0)
    epochs = [[part.values[:, 0].int().tolist() for part in experience.mini_batches(2, generator)] for _ in range(2)]
    for parts in epochs:
        assert [len(part) for part in parts] == [4, 4] and sorted(parts[0] + parts[1]) == list(range(8))
    assert epochs[0] != epochs[1] and epochs[0] != [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert experience.mini_batches(1, generator) == [experience]


def test_a_rollout_and_its_update_compute_the_same_rows_together(make_trainer):
    trainer = make_trainer(num_ppo_epochs=1)
    seen, forward = [], trainer.shared.forward
    trainer.shared.forward = lambda sequences: seen.append(sequences.completion_ids.tolist()) or forward(sequences)
    _, experience = one_experience(trainer)
    collected = seen.copy()
    seen.clear()
    trainer.update(experience)
    assert seen == collected  # equal rounding, so the first ratio is exactly 1 on any device
    assert [len(rows) for rows in seen] == [4, 4]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
def test_micro_batches_and_accumulation_change_nothing(make_trainer):
    settings = {"num_ppo_epochs": 1, "max_grad_norm": 1e9}
    whole = make_trainer("whole", per_device_train_batch_size=8, gradient_accumulation_steps=1, **settings)
    parts = make_trainer("parts", per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert whole.batch_size == parts.batch_size == 8
    assert same(weights(whole), weights(parts))
    _, experience = one_experience(whole)
    torch.manual_seed(1)  # ratios away from 1, some of them clipped
    noise = 0.3 * torch.randn_like(experience.logprobs) * experience.sequences.completion_mask
    experience = replace(experience, logprobs=experience.logprobs + noise)
    first, second = gradients_of(whole, experience), gradients_of(parts, experience)
    assert first["value_head.weight"].abs().max() > 1e-3
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)


class Interruption(RuntimeError):
    """What a kill leaves behind, without the kill."""


@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        ({"save_steps": 2}, 3),
        ({"save_steps": 2, "use_peft": False}, 2),
        ({"num_mini_batches": 2}, 1),
        (
            {
                "save_steps": 1,
                "value_model": "adapter",
                "kl_target": 1.0,
                "kl_horizon": 50,
                "score_scaling": "running",
            },
            2,
        ),
        ({"save_steps": 1, "value_warmup_steps": 3, "target_kl": 0.01, "score_scaling": "reference"}, 2),
    ],
    ids=["between checkpoints", "full", "first", "running statistics", "warm-up"],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(make_trainer, examples, settings, stop):
    settings = {"total_episodes": 32, "validation": examples.select(range(6)), "eval_steps": 1, **settings}
    whole = make_trainer("whole", **settings)
    whole.train()
    broken = make_trainer("broken", **settings)

    def failing(**columns):
        if broken.state.step >= stop:
            raise Interruption
        return colours(**columns)

    broken.rewards = [Reward("colours", failing)]
    with pytest.raises(RewardError, match="Interruption"):
        broken.train()
    resumed = make_trainer("broken", **settings)
    resumed.train()
    assert same(weights(resumed), weights(whole))
    assert (resumed.output_dir / "metrics.jsonl").read_text() == (whole.output_dir / "metrics.jsonl").read_text()
    assert resumed.state == whole.state
    paths = [list_checkpoints(trainer.checkpoints)[-1] for trainer in (resumed, whole)]
    first, second = (load_checkpoint(path) for path in paths)
    torch.testing.assert_close(*(saved_tensors(path) for path in paths), rtol=0, atol=0)
    assert (first.groups, first.scheduler) == (second.groups, second.scheduler)


def test_the_restart_begins_at_the_checkpoint(make_trainer):
    first = make_trainer(save_steps=1, total_episodes=16)
    first.train()
    with (first.output_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epis')  # cut short
    resumed = make_trainer(save_steps=1, total_episodes=24)
    steps = []
    original = resumed.collect_rollout
    resumed.collect_rollout = lambda rows: steps.append(resumed.state.step) or original(rows)
    resumed.train(resume_from_checkpoint=True)
    assert steps == [2]
    assert [line["step"] for line in read_metrics(resumed.output_dir)] == [1, 2, 3]


def test_a_finished_run_is_not_trained_again(make_trainer):
    first = make_trainer()
    first.train()
    again = make_trainer(reward=[Reward("colours", colours)])
    again.collect_rollout = None
    again.train(resume_from_checkpoint=True)
    assert same(weights(again), weights(first))


def test_a_restart_may_be_declined(make_trainer):
    first = make_trainer(save_steps=1)
    first.train()
    text = (first.output_dir / "metrics.jsonl").read_text()
    second = make_trainer(save_steps=1)
    second.train(resume_from_checkpoint=False)
    assert (second.output_dir / "metrics.jsonl").read_text() == text
    assert same(weights(second), weights(first))


@pytest.mark.parametrize("scaling", ["none", "reference"])
def test_the_first_evaluation_is_before_the_first_rollout_unless_that_scales_rewards(make_trainer, examples, scaling):
    order, options = [], {"validation": examples.select(range(5)), "num_generations_eval": 2, "eval_steps": 9}
    options |= {"reward": Reward("colours", colours, score_scaling=scaling), "load_best_model_at_end": False}
    trainer = make_trainer(**options)
    for name in ("collect_rollout", "evaluate"):
        method = getattr(trainer, name)
        setattr(trainer, name, lambda *given, name=name, method=method: order.append(name) or method(*given))
    trainer.train()
    expected = ["evaluate", "collect_rollout"] if scaling == "none" else ["collect_rollout", "evaluate"]
    assert order[:2] == expected and order.count("evaluate") == 2
    # It changes no weight, and an evaluation after the rollout has the same figures.
    alone = make_trainer("alone", **{**options, "validation": None})
    alone.train()
    assert same(weights(alone), weights(trainer))
    late = make_trainer("late", **options)
    late.collect_rollout(late.prompt_rows(0))
    figures, first = late.evaluate(), next(line for line in read_metrics(trainer.output_dir) if "eval_reward" in line)
    assert first == {**first, **figures}


def scripted(values: list[float]):
    """A held-out metric that takes the given values, one for each evaluation."""
    numbers = iter(values)
    return lambda completions, rows: {"scripted": next(numbers)}


@pytest.mark.parametrize(("greater", "best"), [(True, 2), (False, 3)])
def test_the_best_checkpoint_is_kept_and_loaded(make_trainer, examples, greater, best):
    trainer = make_trainer(
        total_episodes=32,
        validation=examples.select(range(4)),
        eval_steps=1,
        metric_for_best_model="eval_scripted",
        greater_is_better=greater,
        compute_metrics=scripted([3.0, 1.0, 5.0, 0.5, 2.0]),
    )
    state = trainer.train()
    assert (state.best_step, state.best_metric) == (best, 5.0 if greater else 0.5)
    names = [path.name for path in list_checkpoints(trainer.checkpoints)]
    assert names == [f"checkpoint-{step}" for step in sorted({best, 3, 4})]  # the newest two, and the best
    kept, last = (saved_tensors(trainer.checkpoints / f"checkpoint-{step}") for step in (best, 4))
    names = weights(trainer).keys()
    kept, last = ({name: tensors[name] for name in names} for tensors in (kept, last))
    assert same(weights(trainer), kept) and not same(weights(trainer), last)
    assert [line["eval_scripted"] for line in read_metrics(trainer.output_dir) if "eval_scripted" in line] == [
        3.0,
        1.0,
        5.0,
        0.5,
        2.0,
    ]


@pytest.mark.parametrize(
    "options", [{}, {"value_model": "adapter"}, {"use_peft": False}], ids=["lora", "value", "full"]
)
def test_where_no_step_is_better_the_policy_is_what_it_started_from(make_trainer, examples, capsys, options):
    trainer = make_trainer(
        total_episodes=16,
        learning_rate=1e-2,
        validation=examples.select(range(4)),
        eval_steps=1,
        metric_for_best_model="eval_scripted",
        compute_metrics=scripted([9.0, 1.0, 8.0]),
        **options,
    )
    state = trainer.train()
    assert (state.best_step, state.best_metric) == (0, 9.0)
    assert "step 0: no later one was better" in capsys.readouterr().err
    rollout = trainer.collect_rollout(range(4))
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    saved = saved_tensors(list_checkpoints(trainer.checkpoints)[-1])
    trainer.shared.load_trainable_state({name: saved[name] for name in weights(trainer)})
    moved = trainer.collect_rollout(range(4))
    assert not torch.equal(moved.logprobs, moved.ref_logprobs)


def test_an_unknown_metric_for_the_best_model_stops_before_training(make_trainer, examples):
    trainer = make_trainer(validation=examples.select(range(4)), metric_for_best_model="eval_blue")
    with pytest.raises(ValueError, match=r"ppo\.metric_for_best_model: 'eval_blue' is not one of eval_reward, "):
        trainer.train()
    assert trainer.state.step == 0 and not training_steps(trainer.output_dir)


@pytest.mark.parametrize("generations", [1, 2])
def test_every_column_reaches_the_reward_aligned(make_trainer, examples, tokenizer, generations):
    answers = {row["tag"]: row for row in examples}
    seen = []

    def reward(prompts, completions, references, tag, completion_ids, **columns):
        assert columns.keys() == {"trainer_state", "log_metric", "log_extra"}
        if completion_ids == [[0]] * len(prompts):  # the check before training
            return [0.0] * len(prompts)
        for i, prompt in enumerate(prompts):
            assert answers[tag[i]]["prompt"] == prompt and answers[tag[i]]["references"] == references[i]
            assert decode(tokenizer, [completion_ids[i]]) == [completions[i]]
        assert len(prompts) == len(completions) == len(references) == len(tag) == len(completion_ids)
        seen.extend(tag)
        return [float(sum(ids)) for ids in completion_ids]

    trainer = make_trainer(reward=reward, validation=examples.select(range(5)), num_generations=generations)
    for step in range(2):
        trainer.state = replace(trainer.state, step=step)
        rollout = trainer.collect_rollout(trainer.prompt_rows(step))
        sequences = rollout.sequences
        for i, prompt in enumerate(rollout.prompts):
            assert decode(tokenizer, [sequences.prompt_ids[i][sequences.prompt_mask[i]].tolist()]) == [prompt]
            completion = sequences.completion_ids[i][sequences.completion_mask[i]].tolist()
            assert decode(tokenizer, [completion]) == [rollout.completions[i]]
            assert rollout.scores[i] == sum(completion)
            assert rollout.finished[i] == (completion[-1] == tokenizer.eos_token_id)
    assert len(set(seen)) == 16 // generations
    trainer.evaluate()
    assert seen[16:] == examples["tag"][:5]


def test_the_score_stands_at_the_last_token(make_trainer):
    trainer = make_trainer(missing_eos_penalty=2.0)
    rollout, _ = one_experience(trainer)
    assert 0 < rollout.finished.sum() < len(rollout.finished)
    own = torch.tensor(colours(rollout.prompts, rollout.completions))
    expected = torch.where(rollout.finished, own, own - 2.0)
    torch.testing.assert_close(rollout.scores, expected)
    torch.testing.assert_close(rollout.rewards["colours"], own)  # each reward is logged without the penalty
    last = rollout.sequences.completion_mask.sum(1) - 1
    torch.testing.assert_close(rollout.token_scores[torch.arange(8), last], expected)
    assert rollout.token_scores.count_nonzero() == expected.count_nonzero()


def test_prefix_shaping_pays_each_token_what_it_changes(make_trainer, tokenizer):
    trainer = make_trainer(reward_shaping="prefix", missing_eos_penalty=2.0)
    rollout, _ = one_experience(trainer)
    torch.testing.assert_close(rollout.token_scores.sum(1), rollout.scores)
    for row, ids in enumerate(rollout.sequences.completion_ids):
        length = int(rollout.sequences.completion_mask[row].sum())
        prefixes = decode(tokenizer, [ids[: t + 1].tolist() for t in range(length)])
        potential = [0.0, *colours(prefixes, prefixes)]
        changes = [after - before for before, after in itertools.pairwise(potential)]
        changes[-1] -= 0.0 if rollout.finished[row] else 2.0
        torch.testing.assert_close(rollout.token_scores[row, :length], torch.tensor(changes))
        assert not rollout.token_scores[row, length:].any()


def test_several_rewards_are_weighted_and_logged_apart(make_trainer, examples):
    def sometimes(prompts, completions, **columns):
        return [0.25 if prompt.endswith("north") else None for prompt in prompts]

    def one(prompts, completions, **columns):
        return [1.0] * len(prompts)

    rewards = [Reward("colours", colours, 2.0), Reward("sometimes", sometimes, -1.0), one]
    trainer = make_trainer(reward=rewards)
    rollout, _ = one_experience(trainer)
    stats = trainer.compute_advantages(rollout)[1]
    own = torch.tensor(colours(rollout.prompts, rollout.completions))
    north = torch.tensor([prompt.endswith("north") for prompt in rollout.prompts])
    assert north.any() and not north.all()
    torch.testing.assert_close(rollout.scores, 2 * own - 0.25 * north + 1.0)
    assert stats["reward/colours"] == pytest.approx(float(own.mean()))
    assert stats["reward/one"] == 1.0
    assert stats["reward/sometimes"] == 0.25  # over those it applies to


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda n: 1 / 0, "raised ZeroDivisionError"),
        (lambda n: [1.0] * (n + 1), "returned 3 values"),
        (lambda n: [1.0] * (n - 1) + [math.nan], "nan"),
        (lambda n: [None] * n, "no reward applies"),
        (lambda n: 1.0, "returned float"),
    ],
    ids=["raises", "length", "nan", "none", "number"],
)
def test_a_broken_reward_stops_before_training(make_trainer, result, message):
    def broken(prompts, completions, **columns):
        return result(len(prompts))

    with pytest.raises(RewardError, match=message):
        make_trainer(reward=broken)


def test_two_rewards_of_one_name_are_logged_apart(make_trainer):
    rewards = [lambda prompts, **c: [1.0] * len(prompts), lambda prompts, **c: [0.5] * len(prompts)]
    trainer = make_trainer(reward=rewards, total_episodes=8)
    trainer.train()
    (step,) = training_steps(trainer.output_dir)
    assert step["reward/<lambda>"] == 1.0 and step["reward/<lambda>_2"] == 0.5 and step["objective/scores"] == 1.5


def test_a_data_set_needs_nothing_but_prompts(make_trainer, examples):
    trainer = make_trainer(train=examples.select_columns(["prompt"]), total_episodes=8)
    trainer.train()
    assert len(training_steps(trainer.output_dir)) == 1


def test_data_smaller_than_a_rollout_is_passed_several_times(make_trainer, examples):
    trainer = make_trainer(train=examples.select(range(3)))
    rows = [row for step in range(3) for row in trainer.prompt_rows(step)]
    assert [sorted(rows[i : i + 3]) for i in range(0, 24, 3)] == [[0, 1, 2]] * 8
    trainer.train()
    assert len(training_steps(trainer.output_dir)) == 3


def test_every_epoch_is_a_new_order_of_all_prompts(make_trainer, examples):
    trainer = make_trainer()
    first, second = ([row for step in range(s, s + 8) for row in trainer.prompt_rows(step)] for s in (0, 8))
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second and first != sorted(first)
    assert [row for step in range(8) for row in make_trainer(seed=1).prompt_rows(step)] != first


def test_several_completions_of_each_prompt(make_trainer):
    trainer = make_trainer(num_generations=4, group_baseline=True)
    rows = trainer.prompt_rows(0)
    assert len(rows) == 8 and rows == [rows[0]] * 4 + [rows[4]] * 4 and rows[0] != rows[4]
    assert len({row for step in range(8) for row in trainer.prompt_rows(step)}) == 16
    rollout, _ = one_experience(trainer)
    assert rollout.prompts[:4] == [rollout.prompts[0]] * 4
    assert len(set(rollout.completions[:4])) > 1


@pytest.mark.parametrize("has_answers", [False, True])
def test_chat_prompts(make_trainer, examples, tokenizer, has_answers):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    chat = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in examples["prompt"]])
    if has_answers:  # messages, as in TRL's data
        answers = [[{"role": "assistant", "content": text}] for text in examples["completion"]]
        chat = chat.add_column("completion", answers)

    def reward(prompts, completions, **columns):
        assert all(prompt[-1]["role"] == "user" for prompt in prompts)
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        return colours(prompts, [completion[0]["content"] for completion in completions])

    trainer = make_trainer("chat", reward, train=chat, total_episodes=8, num_sample_generations=1)
    trainer.train()
    plain = make_trainer("plain", Reward("reward", colours), total_episodes=8)
    plain.train()
    assert same(weights(trainer), weights(plain))  # the template adds nothing to the words


TOY = {
    "total_episodes": 768,
    "per_device_train_batch_size": 32,
    "num_ppo_epochs": 4,
    "response_length": 3,
    "learning_rate": 2e-2,
    "value_learning_rate": 2e-2,
    "kl_coef": 0.01,
}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_policy_learns_what_it_is_paid_for(make_trainer, seed):
    trainer = make_trainer(seed=seed, **TOY)
    trainer.train()
    steps = training_steps(trainer.output_dir)
    scores = [line["objective/scores"] for line in steps]
    assert len(scores) == 12
    assert (scores[-2] + scores[-1]) / 2 > scores[0] + 0.15
    assert steps[-1]["objective/kl"] > 0.1


def test_a_constant_reward_teaches_nothing(make_trainer):
    shares = []

    def constant(prompts, completions, **columns):
        shares.append(sum(colours(prompts, completions)) / len(prompts))
        return [1.0] * len(prompts)

    make_trainer(reward=constant, **TOY | {"total_episodes": 512}).train()
    rollouts = shares[1:]  # after the check of two examples
    # Of 256 completions each: chance alone moves the difference by at most 0.044 (one deviation).
    assert len(rollouts) == 8 and abs(fmean(rollouts[4:]) - fmean(rollouts[:4])) < 0.15


@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "full"])
def test_the_saved_policy_loads_with_the_same_logits(make_trainer, taught_directory, model_config, use_peft):
    trainer = make_trainer(use_peft=use_peft)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    loaded = load_policy(trainer.output_dir, taught_directory, model_config).eval()
    original = load_policy(taught_directory, taught_directory, model_config).eval()
    with torch.no_grad():
        expected = trainer.shared.eval().network(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (original(input_ids=ids).logits - expected).abs().max() > 0.01
    names = {path.name for path in trainer.output_dir.iterdir()}
    assert {"value_head.safetensors", "tokenizer.json", "metrics.jsonl", "checkpoints"} <= names
    assert ("adapter_config.json" in names) == use_peft and ("config.json" in names) != use_peft
    if not use_peft:
        saved = json.loads((trainer.output_dir / "generation_config.json").read_text())
        assert saved["eos_token_id"] == original.generation_config.eos_token_id


def test_metrics_are_valid_json_whatever_the_numbers(make_trainer, examples):
    def never(prompts, completions, **columns):
        return [None] * len(prompts)

    trainer = make_trainer(
        reward=[colours, never], validation=examples.select(range(2)), total_episodes=8, output="nested/ppo"
    )
    trainer.train()
    lines = (trainer.output_dir / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    assert parsed[1]["reward/never"] is None and parsed[2]["eval_reward/never"] is None
