"""The SFT loss of the task's references that `ptx_coef` mixes into PPO's."""

import pytest
import torch
from datasets import Dataset

from pipeline.models.sequences import make_sequences
from pipeline.models.text import encode_completions, encode_prompts
from pipeline.trainers.ppo.reference_texts import deal_out


def gradients_of_a_step(trainer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient of the first optimizer step of a trainer, which is not made, and the statistics."""
    gradients = {}

    def keep() -> None:
        named = trainer.shared.language_model.named_parameters()
        gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    trainer.optimizer.step = keep
    experience, _ = trainer.compute_advantages(trainer.collect_rollout(trainer.prompt_rows(0)))
    return gradients, trainer.update(experience)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
@pytest.mark.parametrize("micro_batch", [8, 2])
def test_its_gradient_is_that_of_the_mean_over_reference_tokens(make_trainer, taught, examples, micro_batch):
    """Nothing else moves the policy: all scores are equal, and nothing is whitened."""
    trainer = make_trainer(
        reward=lambda prompts, completions, **columns: [0.0] * len(prompts),
        model=taught().double(),
        use_peft=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=8 // micro_batch,
        num_generations=2,
        num_ppo_epochs=1,
        temperature=0.7,
        algorithm="rloo",
        kl_coef=0.0,
        ptx_coef=0.25,
        max_grad_norm=1e9,
    )
    rows = trainer.prompt_rows(0)[::2]
    model, chosen = taught().double(), examples.select(rows)
    loss, tokens = 0.0, 0
    for prompt, completion in zip(
        encode_prompts(trainer.tokenizer, chosen["prompt"]),
        encode_completions(trainer.tokenizer, chosen["prompt"], chosen["completion"]),
        strict=True,
    ):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum")
        tokens += len(completion)
    (loss / tokens * 0.25).backward()
    gradients, stats = gradients_of_a_step(trainer)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-7)
    assert stats["loss/ptx_avg"] == pytest.approx(float(loss.detach()) / tokens, rel=1e-5)
    assert trainer.shared.temperature == 0.7


def test_every_mini_batch_gets_its_share():
    references = make_sequences([[1], [2], [3]], [[4], [5], [6]], 0, torch.device("cpu"))
    dealt = deal_out(references, 4, torch.Generator().manual_seed(0))
    assert [None if part is None else len(part) for part in dealt] == [1, 1, 1, None]
    assert sorted(int(part.prompt_ids) for part in dealt[:3]) == [1, 2, 3]
    assert deal_out(None, 2, torch.Generator()) == [None, None]


def test_references_that_are_missing_or_too_long_are_refused(make_trainer, examples):
    with pytest.raises(ValueError, match=r"ppo\.ptx_coef: .*column completion"):
        make_trainer(train=examples.remove_columns("completion"), ptx_coef=0.1)
    long = Dataset.from_dict({"prompt": ["say north"] * 2, "completion": ["north", "red " * 100]})
    with pytest.raises(ValueError, match=r"ppo\.ptx_coef: 1 of 2 references.*row 1"):
        make_trainer(train=long, ptx_coef=0.1)
