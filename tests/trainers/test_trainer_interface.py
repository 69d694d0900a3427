"""PPOTrainer as TRL's GRPOTrainer and its config are used: sampling, models, data sets, what rewards log."""

import pytest
import torch
from ppo_toys import colours, training_steps, weights

from pipeline.trainers.ppo.checkpoint import TrainerState
from pipeline.trainers.ppo.config import PPOConfig


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
    with pytest.raises(ValueError, match="at its end, step 2"):
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
