"""Checkpoints on disk: whole or not at all, damaged ones named, a full disk survived, no code run."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.runtime.files import sha256
from pipeline.runtime.seeds import of_this_process, random_state, restore_random_state
from pipeline.trainers.checkpoints import (
    check_space,
    clear_checkpoints,
    keep_newest,
    list_checkpoints,
    new_checkpoint,
    newest_checkpoint,
)
from pipeline.trainers.ppo.checkpoint import Checkpoint, TrainerState, load_checkpoint, save_checkpoint
from pipeline.trainers.shards import OPTIMIZER, optimizer_tensors, read_optimizer, read_slices

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def write(directory: Path, step: int, text: str = "weights") -> None:
    with new_checkpoint(directory, step, 10) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "b.txt").write_text("more")


def save(directory: Path, step: int, keep: int = 2, **state) -> Path:
    """A checkpoint as PPO makes it, of one weight."""
    parameter = torch.nn.Parameter(torch.full((3,), float(step)))
    optimizer = torch.optim.AdamW([parameter], lr=0.0)
    parameter.sum().backward()
    optimizer.step()
    checkpoint = Checkpoint(
        TrainerState(step, **state), optimizer.state_dict()["param_groups"], {"last_epoch": step}, [random_state()]
    )
    tensors = {"weight": parameter.detach()}, optimizer_tensors(optimizer)
    return save_checkpoint(directory, checkpoint, *tensors, keep)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_manifest_lists_every_file(tmp_path):
    write(tmp_path, 3)
    manifest = json.loads((tmp_path / "checkpoint-3" / "manifest.json").read_text())
    assert manifest.keys() == {"a.txt", "deeper/b.txt"}
    digest = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"  # printf weights | sha256sum
    assert manifest["a.txt"] == {"bytes": 7, "sha256": digest}


def test_a_save_that_fails_leaves_everything_as_it_was(tmp_path):
    write(tmp_path, 3, "old")
    with pytest.raises(RuntimeError, match="half-way"), new_checkpoint(tmp_path, 3, 10) as folder:
        (folder / "a.txt").write_text("new")
        raise RuntimeError("half-way")
    assert names(tmp_path) == ["checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "a.txt").read_text() == "old"
    write(tmp_path, 3, "new")
    assert names(tmp_path) == ["checkpoint-3"] and (tmp_path / "checkpoint-3" / "a.txt").read_text() == "new"


def test_the_old_one_stays_until_the_new_one_is_committed(tmp_path):
    save(tmp_path, 1, keep=1)
    with new_checkpoint(tmp_path, 2, 10) as folder:
        (folder / "a.txt").touch()
        assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["checkpoint-3"]


def test_which_checkpoints_are_kept(tmp_path):
    for step in (2, 4, 6, 10):
        write(tmp_path, step)
    keep_newest(tmp_path, None)
    assert len(names(tmp_path)) == 4
    keep_newest(tmp_path, 2, protect=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-6"]
    (tmp_path / "checkpoint-old").mkdir()  # somebody else's
    clear_checkpoints(tmp_path)
    assert names(tmp_path) == ["checkpoint-old"]


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        ("a.txt", lambda path: path.write_text("weighty"), "a.txt does not have the checksum it was saved with"),
        ("a.txt", lambda path: os.truncate(path, 3), "a.txt has 3 bytes instead of 7"),
        ("deeper/b.txt", lambda path: path.write_text("less"), "deeper/b.txt does not have the checksum"),
        ("manifest.json", lambda path: os.truncate(path, 20), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, file, damage, problem):
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "tmp-checkpoint-3").mkdir()  # a kill left it
    damage(tmp_path / "checkpoint-2" / file)
    found, (note,) = newest_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-1"
    assert note.startswith(f"{tmp_path / 'checkpoint-2'} is damaged and not used: {problem}")
    assert names(tmp_path) == ["checkpoint-1", "damaged-checkpoint-2"]
    assert newest_checkpoint(tmp_path) == (found, [])


def test_without_an_intact_checkpoint_nothing_starts_unnoticed(tmp_path):
    assert newest_checkpoint(tmp_path / "none") == (None, [])
    write(tmp_path, 1)
    os.truncate(tmp_path / "checkpoint-1" / "a.txt", 1)
    with pytest.raises(ValueError, match=r"no intact checkpoint in .*a\.txt has 1 bytes.*run again to start anew"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path) == (None, [])


def test_missing_files_are_listed(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / "optimizer.json").unlink()
    (path / SHARD).unlink()
    for look in (lambda: newest_checkpoint(tmp_path), lambda: load_checkpoint(path)):
        with pytest.raises(ValueError, match=r"checkpoint-2' lacks optimizer\.json, shard-00001-"):
            look()
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"lacks manifest\.json"):
        newest_checkpoint(tmp_path)


def test_weights_that_were_put_into_a_checkpoint_are_named(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    shutil.copy(tmp_path / "checkpoint-1" / SHARD, path / "copy.safetensors")
    for look in (lambda: newest_checkpoint(tmp_path), lambda: load_checkpoint(path)):
        with pytest.raises(ValueError, match=r"checkpoint-2' holds copy\.safetensors, which manifest\.json does not"):
            look()
    (path / "copy.safetensors").unlink()
    (path / "notes.txt").write_text("anything else may stand there")
    assert newest_checkpoint(tmp_path) == (path, [])


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    path = save(tmp_path, 2, best_step=1, best_metric=0.1 + 0.2)
    loaded = load_checkpoint(path)
    assert loaded.state == TrainerState(2, best_step=1, best_metric=0.1 + 0.2)
    assert loaded.scheduler == {"last_epoch": 2}
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    read_slices({"weight": weight.detach()}, path, others=(OPTIMIZER,))
    read_optimizer(optimizer, loaded.groups, path)
    assert weight.tolist() == [2.0, 2.0, 2.0] and optimizer.param_groups[0]["lr"] == 0.0
    state = optimizer.state[weight]
    assert state["exp_avg"].tolist() == pytest.approx([0.1, 0.1, 0.1]) and state["step"].item() == 1


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Change a file of a checkpoint together with its checksum, as somebody who means harm would."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[name] = {"bytes": len(content), "sha256": sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_the_state_is_read_strictly(tmp_path):
    path = save(tmp_path, 2)
    state = json.loads((path / "trainer_state.json").read_text())
    del state["best_metric"]
    rewrite(path, "trainer_state.json", json.dumps({**state, "one": 1, "another": 2}).encode())
    with pytest.raises(ValueError, match=r"another version: missing best_metric, unknown another, one; go on"):
        load_checkpoint(path)


class Malice:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.json", "random_state.json", SHARD])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_malicious_pickle_is_never_run(tmp_path, name, how):
    path, mark = save(tmp_path, 2), tmp_path / "mark"
    if how == "torch":
        torch.save({"optimizer": Malice(mark)}, tmp_path / "bad.pt")
        content = (tmp_path / "bad.pt").read_bytes()
    else:
        content = pickle.dumps(Malice(mark))
    rewrite(path, name, content)
    with pytest.raises(ValueError, match=r"checkpoint-2\b.* cannot be read: .*; remove the checkpoint"):
        load_checkpoint(path)
        read_slices({"weight": torch.zeros(3)}, path, others=(OPTIMIZER,))
    assert not mark.exists()


def test_a_checkpoint_of_another_version_is_named(tmp_path):
    path = save(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "optimizer.json").unlink()
    del manifest["optimizer.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"optimizer\.json is missing, .* another version made it"):
        load_checkpoint(path)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    names = {path.name for path in save(tmp_path, 2).iterdir()}
    assert names == {"manifest.json", "optimizer.json", "random_state.json", SHARD, "trainer_state.json"}


def test_weights_of_another_model_are_refused(tmp_path):
    path = save(tmp_path, 2)
    with pytest.raises(ValueError, match="differ from those of the model in another, weight"):
        read_slices({"another": torch.zeros(3)}, path, others=(OPTIMIZER,))
    with pytest.raises(ValueError, match=r"Size mismatch .* for weight"):
        read_slices({"weight": torch.zeros(4)}, path, others=(OPTIMIZER,))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, bad):
    checkpoint = Checkpoint(TrainerState(4), [], {}, [])
    with pytest.raises(FloatingPointError, match="step 4: w is not finite, nothing is saved"):
        save_checkpoint(tmp_path, checkpoint, {"w": torch.tensor([1.0, bad])}, {}, 2)
    assert names(tmp_path) == []


def test_random_states_come_back(tmp_path):
    np.random.standard_normal()  # leaves a second number in store
    (tmp_path / "state.json").write_text(json.dumps([random_state()]))

    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.standard_normal(),
            torch.rand(2).tolist(),
        )

    expected = draw()
    states = json.loads((tmp_path / "state.json").read_text())
    restore_random_state(of_this_process(states, "here"))
    assert draw() == expected
    with pytest.raises(ValueError, match="here was made by 2 processes and this run has 1"):
        of_this_process(states * 2, "here")


def test_random_states_of_more_gpus_than_there_are_now(monkeypatch):
    restored = {}
    state = random_state() | {"cuda": [[1], [2], [3]]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda numbers, device: restored.update({device: numbers.tolist()})
    )
    restore_random_state(state)
    assert restored == {0: [1], 1: [2]}


def test_too_little_room_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 7_500, 2_500))
    check_space(tmp_path / "new", 800, 3)
    with pytest.raises(OSError, match=r"new: .* need 3,200 bytes and 2,500 are free"):
        check_space(tmp_path / "new", 800, 4)
    write(tmp_path / "new", 1)  # takes its place already
    check_space(tmp_path / "new", 800, 4)


@pytest.mark.parametrize("numbers", [300_000, 900_000], ids=["the optimizer", "the weights"])
def test_a_full_disk_costs_the_new_checkpoint_alone(small_disk, numbers):
    def save_numbers(step: int, numbers: int) -> None:
        weights = {"w": torch.full((numbers,), float(step))}
        moments = {f"{OPTIMIZER}0.exp_avg": torch.zeros(2 * numbers)}
        save_checkpoint(small_disk, Checkpoint(TrainerState(step), [], {}, []), weights, moments, 2)

    save_numbers(1, 100_000)  # 1.2 MB
    with pytest.raises(OSError, match=r"cannot write .*checkpoint-2: .* [\d,]+ are free"):
        save_numbers(2, numbers)
    assert names(small_disk) == ["checkpoint-1"]
    found, notes = newest_checkpoint(small_disk)
    weights = {"w": torch.zeros(100_000)}
    read_slices(weights, found, others=(OPTIMIZER,))
    assert notes == [] and weights["w"].tolist() == [1.0] * 100_000
