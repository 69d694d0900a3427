"""What is drawn in a block leaves the generators as they were."""

import warnings

import torch

from pipeline.runtime.seeds import keep_random_state


def test_a_block_draws_for_itself():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with keep_random_state():
        torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    with keep_random_state(enabled=False):
        torch.rand(2)
    assert not torch.equal(torch.get_rng_state(), before)


def test_of_several_gpus_the_one_of_this_process_is_kept(monkeypatch):
    kept = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: kept.append((int(state), device)))
    with warnings.catch_warnings(), keep_random_state():
        warnings.simplefilter("error")
    assert [int(device if isinstance(device, int) else device.index) for _, device in kept] == [2]
