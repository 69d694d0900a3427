"""How a batch is cut into passes: as large as fits on one accelerator, and never a matter of the result."""

import pytest
import torch
from ppo_toys import training_steps, weights

from pipeline.trainers.checkpoints import newest_checkpoint
from pipeline.trainers.ppo import PPOConfig, learner
from pipeline.trainers.ppo.checkpoint import load_checkpoint

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "processes", "mini_batches", "size"), [(CPU, 1, 1, 4), (GPU, 1, 1, 16), (GPU, 1, 2, 8), (GPU, 2, 1, 4)]
)
def test_one_accelerator_begins_with_a_whole_mini_batch(device, processes, mini_batches, size):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_mini_batches": mini_batches}
    assert learner.first_micro_batch_size(PPOConfig(**sizes), device, processes) == size


def test_the_result_is_that_of_small_passes_and_a_restart_knows_what_fits(make_trainer, monkeypatch, capfd):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "save_steps": 1}
    small = make_trainer("small", **settings)
    small.train()
    monkeypatch.setattr(learner, "first_micro_batch_size", lambda *_: 8)  # as on a GPU
    capfd.readouterr()
    large, rows = make_trainer("large", **settings), []
    forward = large.shared.forward

    def limited(sequences):
        rows.append(len(sequences))
        if large.state.step and len(sequences) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(sequences)

    large.shared.forward = limited
    large.train()
    said = capfd.readouterr().err
    assert "PPO: micro-batches of 8 episodes" in said and "step 2: out of memory" in said and "4 instead of 8" in said
    assert rows[:3] == [8, 8, 8] and set(rows[3:]) == {4}  # scored and learnt from, learnt from, what did not fit
    assert [line["policy/memory_parts"] for line in training_steps(large.output_dir)] == [1.0, 2.0, 2.0]
    torch.testing.assert_close(weights(large), weights(small), rtol=1e-3, atol=1e-5)
    assert load_checkpoint(newest_checkpoint(large.checkpoints)[0]).state.micro_batch_size == 4
    again = make_trainer("large", **settings | {"total_episodes": 32})
    again.train(resume_from_checkpoint=True)
    assert again.learner.micro_batch_size == 4
