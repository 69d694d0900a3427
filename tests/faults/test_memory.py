"""Memory that runs out: smaller batches, the same result, and a sentence where nothing helps."""

import resource
from dataclasses import replace

import forks
import pytest
import torch
from ppo_toys import training_steps, weights
from two_processes import run_in_two

from pipeline.runtime.memory import in_smaller_batches, is_out_of_memory
from pipeline.trainers.checkpoints import newest_checkpoint
from pipeline.trainers.ppo.checkpoint import load_checkpoint


def limit_rows(trainer, rows, training=True, rollouts=True):
    """Let passes of the model over more rows fail as on an accelerator, in the middle of what they compute."""
    forward, score, scoring = trainer.shared.forward, trainer.learner.forward, []

    def limited(sequences):
        outputs = forward(sequences)
        if len(sequences) > rows and (rollouts if scoring else training):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return outputs

    def scored(*ids):
        scoring.append(True)
        result = score(*ids)
        scoring.clear()
        return result

    trainer.shared.forward, trainer.learner.forward = limited, scored


SETTINGS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_mini_batches": 1}


@pytest.mark.parametrize("where", ["rollouts", "training", "both"])
def test_the_result_is_that_of_smaller_micro_batches(make_trainer, capfd, where):
    """Two rows fit where eight are asked for: the run is the one that was asked for two rows from the start."""
    settings = {"save_steps": 1, "num_ppo_epochs": 3}
    short = make_trainer("short", **SETTINGS, **settings)
    limit_rows(short, 2, where != "rollouts", where != "training")
    short.train()
    small = make_trainer("small", per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    small.train()
    said = capfd.readouterr().err
    assert "step 1: out of memory" in said and "micro-batches of 2 instead of 8" in said
    assert said.count("out of memory") == 1
    lines, expected = training_steps(short.output_dir), training_steps(small.output_dir)
    assert [line["policy/memory_parts"] for line in lines] == [4.0, 4.0, 4.0]
    assert [line["episode"] for line in lines] == [line["episode"] for line in expected] == [8, 16, 24]
    # The rollout of the first step may have been scored in eights, which rounds differently.
    torch.testing.assert_close(weights(short), weights(small), rtol=1e-3, atol=1e-5)
    if where != "training":
        assert all(torch.equal(tensor, weights(small)[name]) for name, tensor in weights(short).items())


def test_a_gradient_that_does_not_fit_is_computed_anew(make_trainer):
    """Memory may run out half way back."""
    settings = {"save_steps": 1, "num_ppo_epochs": 2, "total_episodes": 8}
    short = make_trainer("short", **SETTINGS, **settings)
    backward, failed = short.accelerator.backward, []

    def limited(loss):
        backward(loss)
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    short.accelerator.backward = limited
    short.train()
    assert failed and short.learner.micro_batch_size == 4
    small = make_trainer("small", per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    small.train()
    torch.testing.assert_close(weights(short), weights(small), rtol=1e-3, atol=1e-5)


def test_a_restart_knows_what_fits(make_trainer):
    whole = make_trainer("whole", save_steps=1, **SETTINGS)
    limit_rows(whole, 3)
    whole.train()
    first = make_trainer("broken", save_steps=1, **SETTINGS)
    limit_rows(first, 3)
    update = first.update
    first.update = lambda experience: update(experience) if first.state.step < 2 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        first.train()
    assert load_checkpoint(newest_checkpoint(first.checkpoints)[0]).state.micro_batch_size == 2
    second = make_trainer("broken", save_steps=1, **SETTINGS)
    second.train()
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(whole).items())


def test_completions_are_the_same_in_smaller_batches(make_trainer, monkeypatch, capfd):
    trainer = make_trainer(local_rollout_forward_batch_size=8)
    rows = trainer.prompt_rows(0)
    expected = trainer.collect_rollout(rows).completions
    from pipeline.models import generation

    decode = generation.decode_batch

    def limited(model, prompts, *arguments):
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(model, prompts, *arguments)

    monkeypatch.setattr(generation, "decode_batch", limited)
    assert trainer.collect_rollout(rows).completions == expected
    assert "2 prompts at once instead of 8" in capfd.readouterr().err


def test_an_allocation_that_the_system_refuses(make_trainer, capfd):
    """Each row takes 64 MiB more, and there is 1 GiB."""

    def body() -> int:
        trainer = make_trainer(per_device_train_batch_size=32, gradient_accumulation_steps=1, total_episodes=32)
        forward = trainer.shared.forward

        def hungry(sequences):
            ballast = torch.empty(len(sequences), 2**26, dtype=torch.uint8)
            outputs = forward(sequences)
            return replace(outputs, logprobs=outputs.logprobs + 0 * ballast[0, 0])

        trainer.shared.forward = hungry
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
        trainer.train()
        return int(trainer.learner.micro_batch_size)

    assert forks.run(body) in (4, 8, 16)
    assert "out of memory: from now on micro-batches" in capfd.readouterr().err


def test_single_rows_that_do_not_fit(make_trainer):
    trainer = make_trainer(**SETTINGS)
    limit_rows(trainer, 0)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert not list(trainer.checkpoints.glob("checkpoint-*"))


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    for library in ("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDNN_STATUS_ALLOC_FAILED"):
        assert is_out_of_memory(RuntimeError(f"CUDA error: {library}"))
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory"))
    sizes = []

    def call(size):
        sizes.append(size)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        in_smaller_batches(call, 8)
    assert sizes == [8]


def test_one_of_two_processes_makes_smaller_passes(make_trainer, tmp_path):
    """Its gradients are the same; in the pass in which both meet it could not begin anew."""

    def body():
        trainer = make_trainer(gradient_accumulation_steps=2, total_episodes=16)
        if trainer.accelerator.process_index == 1:
            limit_rows(trainer, 2, rollouts=False)
        trainer.train()
        torch.save(weights(trainer), tmp_path / f"weights-{trainer.accelerator.process_index}.pt")
        assert trainer.learner.micro_batch_size == (2 if trainer.accelerator.process_index else 4)

    run_in_two(body, tmp_path)
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"LastPassError: .*the processes exchange gradients"):

        def alone():
            trainer = make_trainer("alone", gradient_accumulation_steps=1, total_episodes=16)
            limit_rows(trainer, 2, rollouts=False)
            trainer.train()

        run_in_two(alone, tmp_path)
