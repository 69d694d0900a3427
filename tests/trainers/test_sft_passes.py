"""SFT where memory runs out: the same loss and gradient in smaller passes, then with layers computed again."""

import weakref
from dataclasses import replace

import pytest
import torch
from pretended_gpu import pretended_gpu

from pipeline.models.loading import lora_config
from pipeline.trainers.huggingface import sft
from pipeline.trainers.huggingface.completion_head import ResumableSFTTrainer
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments

SETTINGS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "max_steps": 2,
    "eval_strategy": "no",
    "bf16": False,
    "max_length": 64,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


@pytest.fixture
def make(taught, tokenizer, examples, model_config, tmp_path, fresh_accelerate):
    """Each call builds a trainer over the taught model, of an adapter or of all weights."""

    def build(output: str, peft: bool = True, **settings) -> ResumableSFTTrainer:
        return build_sft_trainer(
            taught(),
            sft_arguments({**SETTINGS, **settings}, tmp_path / output, 0),
            tokenizer,
            examples,
            examples,
            replace(lora_config(model_config), lora_dropout=0.0) if peft else None,  # whose masks would differ
            tmp_path / output / "metrics.jsonl",
        )

    return build


@pytest.fixture
def one_accelerator(monkeypatch):
    """Let a CPU count as the only accelerator."""
    monkeypatch.setattr(ResumableSFTTrainer, "_is_alone", lambda trainer: True)


def limit_rows(trainer, fits) -> list[int]:
    """Let the backward pass fail, half way, where `fits(rows)` is False; return the rows of all passes."""
    seen, compute_loss, backward = [], trainer.compute_loss, trainer.accelerator.backward

    def counted(model, inputs, *args, **kwargs):
        seen.append(len(inputs["input_ids"]))
        return compute_loss(model, inputs, *args, **kwargs)

    def limited(loss, **kwargs):
        backward(loss, **kwargs)
        if not fits(seen[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.compute_loss, trainer.accelerator.backward = counted, limited
    return seen


def trained(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("peft", "own_loss"), [(True, True), (False, True), (True, False)], ids=["lora", "full", "the loss of TRL"]
)
def test_smaller_passes_have_the_same_loss_and_gradient(make, one_accelerator, monkeypatch, capfd, peft, own_loss):
    if not own_loss:  # as with Triton
        monkeypatch.setattr(sft, "trainer_class", lambda model, args: ResumableSFTTrainer)
    small = make("small", peft)
    rows = limit_rows(small, lambda count: count <= 3)
    gradients: list[dict] = []
    monkeypatch.setattr(
        ResumableSFTTrainer,
        "_clip_grad_norm",
        lambda trainer, model: gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        ),
    )
    results = trained(small)
    assert rows == [8, 4, 2, 2, 2, 2] + 3 * [2, 2, 2, 2]  # remembered in the second micro-batch and step
    assert "passes of 2 rows instead of 8" in capfd.readouterr().err
    whole = make("whole", peft)
    monkeypatch.setattr(ResumableSFTTrainer, "_is_alone", lambda trainer: False)
    expected = trained(whole)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-4, atol=1e-6)
    assert any(gradient.any() for gradient in gradients[2].values())
    torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-4)
    logs = [[line for line in trainer.state.log_history if "loss" in line] for trainer in (small, whole)]
    for ours, plain in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert ours["num_input_tokens_seen"] == plain["num_input_tokens_seen"]
        assert own_loss or ours["num_tokens"] == plain["num_tokens"]


def test_layers_are_computed_again_where_not_one_row_fits(make, one_accelerator, capfd, monkeypatch):
    expected = trained(make("whole"))
    short, graphs = make("short"), []
    rows = limit_rows(short, lambda count: count <= 2 and short.model.is_gradient_checkpointing)
    compute_loss, network = short.compute_loss, short.model
    checkpoint = network.gradient_checkpointing_enable

    def watched(*given, **options):
        loss = compute_loss(*given, **options)
        graphs.append(weakref.ref(loss))
        return loss

    def enabled(arguments):
        assert len(graphs) == 4 and not any(graph() is not None for graph in graphs)  # their memory is needed
        checkpoint(arguments)

    monkeypatch.setattr(short, "compute_loss", watched)
    monkeypatch.setattr(network, "gradient_checkpointing_enable", enabled)
    results = trained(short)
    assert rows[:8] == [8, 4, 2, 1, 8, 4, 2, 2] and set(rows[8:]) == {2}
    assert "computed again in the backward pass" in capfd.readouterr().err
    torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-4)


def test_a_process_that_sees_several_gpus_trains_on_one(make, monkeypatch):
    build = sft.trainer_class

    def several(model, args):
        assert args.n_gpu == 0
        args._n_gpu = 4
        return build(model, args)

    monkeypatch.setattr(sft, "trainer_class", several)
    assert make("several").args.n_gpu == 1


@pytest.mark.parametrize("settings", [{"padding_free": True}, {"packing": True}], ids=str)
def test_one_row_of_many_texts_is_one_pass(make, settings):
    with pretended_gpu() as mode:
        make("packed", **settings).train()
    assert mode.operations > 1000


def test_what_does_not_fit_even_so_is_an_error(make, one_accelerator):
    trainer = make("none")
    limit_rows(trainer, lambda count: False)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    other = make("other")
    limit_rows(other, lambda count: False)
    other._is_alone = lambda: False
    with pytest.raises(torch.OutOfMemoryError):
        other.train()
    assert not other.model.is_gradient_checkpointing and trainer.model.is_gradient_checkpointing


def test_one_accelerator_begins_with_all_examples_of_a_step(make, one_accelerator, monkeypatch, capfd):
    """The same examples to a step in any order of lengths, and the same loss; then less, where memory runs out."""
    settings = {"train_sampling_strategy": "group_by_length"}
    apart = make("apart", **settings)
    expected = trained(apart)
    monkeypatch.setattr(sft, "trains_on_one_accelerator", lambda: True)
    for name, fits, rows in (("joined", 16, [16, 16]), ("less", 8, [16, 8, 8, 8, 8])):
        trainer = make(name, **settings)
        seen = limit_rows(trainer, lambda count, fits=fits: count <= fits)
        torch.testing.assert_close(trained(trainer), expected, rtol=1e-3, atol=1e-4)
        assert seen == rows and "passes of 16 examples" in capfd.readouterr().err
        losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (trainer, apart)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("settings", [{"padding_free": True}, {"neftune_noise_alpha": 1}, {"packing": True}], ids=str)
def test_micro_batches_stay_where_passes_cannot_be_joined(make, monkeypatch, settings):
    monkeypatch.setattr(sft, "trains_on_one_accelerator", lambda: True)
    assert make("apart", **settings).args.gradient_accumulation_steps == 2
    monkeypatch.setattr(sft, "_has_router", lambda model: True)
    assert make("router").args.gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    ("alone", "arguments", "on"),
    [(False, {}, True), (True, {}, False), (True, {"gradient_checkpointing": True}, True)],
    ids=["elsewhere", "one accelerator", "as the recipe says"],
)
def test_one_accelerator_keeps_activations_unless_the_recipe_says_otherwise(
    monkeypatch, tmp_path, alone, arguments, on
):
    monkeypatch.setattr(sft, "trains_on_one_accelerator", lambda: alone)
    assert sft_arguments(arguments, tmp_path, 0).gradient_checkpointing is on
