"""Reward, PPO and evaluation by their scripts in two gloo processes that share one model (FSDP2), against one process.

The tolerances are those of `test_stages_in_two`.
"""

import json
import os
import shutil

import forks
import pytest
import torch
from safetensors.torch import load_file
from test_stages_in_two import WEIGHTS, Chains, assert_alike, report_bytes, without_key
from two_processes import run_in_two

from pipeline.models import sharding


class ShardedChains(Chains):
    """The chain of one process and, from the same SFT, the other stages of two that share the model."""

    def sharded(self, world: int, *names: str) -> None:
        """Run stages in one of two processes, as accelerate launch starts it with accelerate_configs/fsdp2.yaml."""
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        placed, place = [], sharding.Sharding.place

        def noted(self, root, *given, **more):
            place(self, root, *given, **more)
            placed.append(bool(self.roots))

        sharding.Sharding.place = noted
        as_trained = [f"sft.per_device_{kind}_batch_size=4" for kind in ("train", "eval")]
        in_two = ["reward.per_device_train_batch_size=1", "reward.gradient_accumulation_steps=2"] if world == 2 else []
        self.stages(world, *names, overrides=[*as_trained, *in_two])
        assert placed and all(placed)


@pytest.fixture(scope="module", params=["llama", "t5"])
def chains(request, tmp_path_factory) -> ShardedChains:
    """Both chains."""
    made = ShardedChains(tmp_path_factory.mktemp("chains"), request.param)
    assert forks.run(lambda: made.stages(1)) == 0
    shutil.copytree(made.run_of(1) / "sft", made.run_of(2) / "sft")
    run_in_two(lambda: made.sharded(2, "reward", "ppo", "eval"), made.root)
    return made


@pytest.mark.parametrize("file", ["reward/adapter_model", "reward/reward_head", "ppo/adapter_model", "ppo/value_head"])
def test_weights_are_those_of_one_process(chains, file):
    one, two = (load_file(chains.run_of(world) / f"{file}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=WEIGHTS)


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_logs_are_those_of_one_process(chains, stage):
    one, two = (chains.lines(world, f"{stage}/metrics.jsonl") for world in (1, 2))
    for line in (*one, *two):
        for key in (
            "total_flos",
            "min_reward",
            "max_reward",
        ):  # padding, and means over micro-batches, of which are more
            line.pop(key, None)
    assert_alike(one, two)


def test_they_leave_the_files_of_one_process(chains):
    def files(world: int) -> set[str]:
        run = chains.run_of(world)
        slices = set(run.rglob("shard-*"))  # of checkpoints: each process has written its own
        return {without_key(str(path.relative_to(run))) for path in set(run.rglob("*")) - slices if path.is_file()}

    assert files(1) == files(2)
    for name in ("pairs.jsonl", "samples.jsonl", "pairs.json"):
        assert chains.lines(1, f"reward/{name}") == chains.lines(2, f"reward/{name}")


@pytest.mark.parametrize("in_step", [False, True])
def test_the_evaluation_of_a_run_is_the_same_to_the_byte(chains, in_step):
    """Five test rows in batches of two, beams and samples, whether the models are gathered whole or layer by layer."""
    directory, before = chains.run_of(1) / "eval", report_bytes(chains.run_of(1) / "eval")
    shutil.rmtree(directory)

    def evaluate() -> None:
        if in_step:
            sharding.SHARE_OF_MEMORY = 0
        chains.sharded(1, "eval")

    run_in_two(evaluate, chains.root)
    assert json.loads((directory / "stage.json").read_text())["processes"] == 2
    assert report_bytes(directory) == before
