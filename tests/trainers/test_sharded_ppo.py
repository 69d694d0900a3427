"""PPO whose model is sharded over gloo processes (FSDP2) ends with the weights of one process."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from datasets import Dataset
from ppo_toys import SMALL, colours, weights
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from two_processes import run_in_processes

from pipeline.models import sharding
from pipeline.models.config import ModelConfig
from pipeline.models.from_scratch import build_from_scratch
from pipeline.models.loading import load_model, load_policy, load_tokenizer, lora_config
from pipeline.models.slices import slice_here
from pipeline.trainers import checkpoints, shards
from pipeline.trainers.ppo.checkpoint import save_training
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.trainer import PPOTrainer

STEPS = 5
SETTINGS: dict[str, Any] = {
    **SMALL,
    "total_episodes": 8 * STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "value_learning_rate": 1e-3,
    "top_k": 1,  # nothing that is drawn can hide a difference of weights
    "kl_coef": 0.2,
    "eval_steps": 2,
    "save_steps": 1,
    "save_total_limit": STEPS,
    "load_best_model_at_end": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"use_peft": False},
    "value adapter": {"value_model": "adapter", "gradient_checkpointing": True, "entropy_coef": 0.01},
    "in step": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ptx_coef": 0.1},
}
FILES = {"full": "model.safetensors"}
# Passes inside and outside of autocast; their weights are not compared, because bfloat16 rounds in another order too.
AUTOCAST: dict[str, dict[str, Any]] = {"bf16": {"bf16": True}, "bf16 full": {"bf16": True, "use_peft": False}}


def forget() -> None:
    """Accelerate's state of an earlier run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def shard() -> None:
    """What accelerate launch tells a process of accelerate_configs/fsdp2.yaml."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


class Setting:
    """What every process needs to build the same trainer."""

    def __init__(self, directory: Path, config: ModelConfig, examples: Dataset, root: Path) -> None:
        self.directory, self.config, self.examples, self.root = directory, config, examples, root

    def trainer(self, name: str, world: int, **settings) -> PPOTrainer:
        """A trainer that writes to `root/name`."""
        return PPOTrainer(
            model=load_model(self.directory, self.config),
            args=PPOConfig(**{**SETTINGS, "gradient_accumulation_steps": 4 // world, **settings}),
            processing_class=load_tokenizer(self.directory, self.config),
            reward_funcs=colours,
            train_dataset=self.examples,
            eval_dataset=self.examples.select(range(5)),  # an odd number
            peft_config=lora_config(self.config),
            output_dir=self.root / name,
        )

    def run(self, name: str, world: int, change: Callable[[PPOTrainer], None] = lambda trainer: None, **settings):
        """Train, save, and keep the weights."""
        trainer = self.trainer(name, world, **settings)
        assert isinstance(trainer.shared, FSDPModule) == (world > 1)
        change(trainer)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model()
        state = weights(trainer)
        if trainer.accelerator.is_main_process:
            torch.save(state, self.root / f"{name}.pt")
        return trainer

    def kinds(self) -> None:
        """What each of two processes does."""
        shard()
        for kind, settings in (AUTOCAST | KINDS).items():
            if kind == "in step":  # as where a device does not hold the whole model
                sharding.SHARE_OF_MEMORY = 0
            AcceleratorState._reset_state()  # of another precision
            GradientState._reset_state()
            self.run(f"{kind}-2", 2, **settings)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """What `run` kept."""
        return torch.load(self.root / f"{name}.pt")


def build(architecture: str, scratch_config, examples, teach_model, root: Path) -> Setting:
    """A taught model of two layers."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "architecture": architecture}
    config = ModelConfig(from_scratch=replace(scratch_config, **sizes), lora_r=4, lora_alpha=8)
    texts = [*examples["prompt"], *examples["completion"]]
    base = build_from_scratch(config.from_scratch, texts, 0, root / "base")
    return Setting(teach_model(base, config, root / "taught"), config, examples, root)


@pytest.fixture(scope="module", params=["llama", "t5"])
def runs(request, scratch_config, examples, teach_model, tmp_path_factory) -> Setting:
    """Runs of two processes and of one."""
    setting = build(request.param, scratch_config, examples, teach_model, tmp_path_factory.mktemp("sharded"))
    run_in_processes(2, setting.kinds, setting.root)
    for kind, settings in KINDS.items():
        forget()
        setting.run(f"{kind}-1", 1, **settings)
    return setting


@pytest.fixture(scope="module")
def setting(scratch_config, examples, teach_model, tmp_path_factory) -> Setting:
    """A causal model, and a run of one process over it."""
    made = build("llama", scratch_config, examples, teach_model, tmp_path_factory.mktemp("sharded"))
    forget()
    made.run("one", 1)
    return made


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Float32 sums in another order differ by less than 1e-6."""
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_weights_of_one(runs, kind):
    """Each writes as many tokens as it likes, and answers its share of five held-out prompts."""
    assert_same(runs.weights(f"{kind}-1"), runs.weights(f"{kind}-2"))
    before = {n: p for n, p in runs.trainer("unused", 1, **KINDS[kind]).shared.named_parameters()}
    assert max(float((before[n] - p).abs().max()) for n, p in runs.weights(f"{kind}-1").items()) > 1e-3
    for file in (FILES.get(kind, "adapter_model.safetensors"), "value_head.safetensors"):
        assert_same(*(load_file(runs.root / f"{kind}-{world}" / file) for world in (1, 2)))
    load_policy(runs.root / f"{kind}-2", runs.directory, runs.config)


@pytest.mark.parametrize("kind", AUTOCAST)
def test_two_processes_train_in_bfloat16(runs, kind):
    settings = {**AUTOCAST[kind], "bf16": False}  # the precision of this process does not change
    before = {n: p for n, p in runs.trainer("unused", 1, **settings).shared.named_parameters()}
    after = runs.weights(f"{kind}-2")
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in after.values())
    assert max(float((before[n] - p).abs().max()) for n, p in after.items()) > 1e-3
    load_policy(runs.root / f"{kind}-2", runs.directory, runs.config)


def count(setting: Setting) -> None:
    """Check what each of two processes holds and sends in a step."""
    shard()
    trainer = setting.trainer("counted", 2)
    shared, traffic = trainer.shared, trainer.learner.sharding.traffic
    layers = sharding.repeated_layers(shared)
    inside = {p for layer in layers for p in layer.parameters()}
    others = [p for p in shared.parameters() if p not in inside]

    def padded(parameters) -> int:  # to a multiple of two rows
        return sum(4 * -(-p.shape[0] // 2) * 2 * p.shape[1:].numel() for p in parameters)

    for parameter in shared.parameters():  # half of its rows, and one more where their number is odd
        rows = len(parameter) // 2 + (len(parameter) % 2 and trainer.accelerator.process_index == 0)
        assert slice_here(parameter).numel() == rows * parameter.shape[1:].numel()
    whole_in_pass = []

    def look(*_) -> None:
        modules = (layers[0], layers[1], trainer.shared.language_model.get_input_embeddings())
        whole_in_pass.append([not isinstance(next(m.parameters()), DTensor) for m in modules])

    handle = layers[1].mlp.register_forward_hook(look)
    layer, root, trained = padded(inside), padded(others), padded(p for p in shared.parameters() if p.requires_grad)
    rows = trainer.prompt_rows(0)

    before = traffic.gathered
    with trainer.gathered():
        pass
    assert traffic.gathered - before == layer + root
    with trainer.gathered():
        completions = trainer.writer.generate([trainer._prompt_ids[r] for r in rows], trainer.args.greedy)
    before = traffic.gathered
    micro_batches = 2  # of two episodes
    trainer.learner.forward([trainer._prompt_ids[r] for r in rows], completions, trainer.tokenizer.pad_token_id)
    # The policy's passes, and the reference's: all of them in one call, which gathers what is no layer once.
    assert traffic.gathered - before == micro_batches * (layer + root) + micro_batches * layer + root
    experience, _ = trainer.compute_advantages(trainer.collect_rollout(rows))
    before, reduced = traffic.gathered, traffic.reduced
    whole_in_pass.clear()
    trainer.update(experience)
    passes = trainer.args.num_ppo_epochs * micro_batches
    assert traffic.gathered - before == 2 * passes * (layer + root)
    assert traffic.reduced - reduced == passes * trained
    assert whole_in_pass and all(found == [False, True, True] for found in whole_in_pass)
    handle.remove()


def test_what_a_process_holds_and_sends(setting):
    """The formulas of docs/scaling.md, to the byte."""
    run_in_processes(2, partial(count, setting), setting.root)


def run_out(setting: Setting, where: str) -> None:
    """Let memory run out on one of two processes in the middle of passes over more than two episodes."""
    shard()

    def change(trainer: PPOTrainer) -> None:
        if trainer.accelerator.process_index == 0:
            return
        forward, rows = trainer.shared.forward, []

        def noted(sequences):
            rows[:] = [len(sequences)]
            try:
                return forward(sequences)
            finally:
                rows.clear()

        def fail(count: int) -> None:
            if count > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        def look(module, inputs, output):
            count = sum(rows)  # none in a pass of the reference
            if where == "forward":
                fail(count)
            elif output.requires_grad:
                output.register_hook(lambda gradient: fail(count))

        trainer.shared.forward = noted
        sharding.repeated_layers(trainer.shared)[1].mlp.register_forward_hook(look)

    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = setting.run(f"short-{where}", 2, change, **settings)
    assert trainer.learner.micro_batch_size == 2


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_that_runs_out_on_one_process_ends_with_the_same_micro_batch_on_both(setting, where):
    run_in_processes(2, partial(run_out, setting, where), setting.root)
    assert_same(setting.weights("one"), setting.weights(f"short-{where}"))


@pytest.mark.parametrize("more", [{}, {"use_peft": False, "sync_ref_model": True, "ref_model_sync_steps": 2}])
def test_a_run_goes_on_with_other_numbers_of_processes(setting, more):
    """Two, then one, then three: the last makes batches of another size, so only what it goes on from is compared."""
    forget()
    kept = setting.run("moving", 1, **more).output_dir.name if more else "one"

    def goes_on(world: int, name: str, step: int, **settings) -> None:
        folder = setting.root / name / "checkpoints"
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(folder / f"checkpoint-{later}")
        forget()

        def train() -> None:
            if world > 1:
                shard()
            trainer = setting.run(name, world, **{**settings, **more})
            assert trainer.state.step >= STEPS and trainer._origin.step == step

        train() if world == 1 else run_in_processes(world, train, setting.root)

    name = f"resumed-{kept}"
    run_in_processes(2, lambda: (shard(), setting.run(name, 2, **more)), setting.root)
    goes_on(1, name, 2)
    assert_same(setting.weights(kept), setting.weights(name))
    goes_on(3, name, 4, gradient_accumulation_steps=1)
    moved = [(setting.weights(kept)[n] - p).abs().max() for n, p in setting.weights(name).items()]
    assert 0 < max(moved) < 0.1


def save_counted(setting: Setting) -> None:
    """Save after a step of two processes, and check what this one holds and gathers meanwhile."""
    shard()
    trainer = setting.trainer("saved", 2, use_peft=False)
    trainer.train()
    sizes, gathers = [], []
    state = trainer.optimizer.state_dict()["state"].values()
    tensors = [*trainer.shared.trained_weights().values(), *(tensor for values in state for tensor in values.values())]
    slices = [slice_here(t).nbytes for t in tensors if t.dim() or trainer.accelerator.is_main_process]
    largest = max(gather_object([max(slices)]))

    def noted(tensors: dict[str, torch.Tensor], metadata: dict) -> bytes:
        sizes.append(sum(t.nbytes for t in tensors.values()))
        assert not any(isinstance(t, DTensor) for t in tensors.values())
        return save(tensors, metadata)

    save, safetensors.torch.save = safetensors.torch.save, noted
    DTensor.full_tensor = lambda *given, **named: gathers.append(given)
    shards.FILE_BYTES = largest
    sha256, read = checkpoints.sha256, []
    checkpoints.sha256 = lambda path: read.append(path.name) or sha256(path)
    save_training(setting.root / "counted", replace(trainer.state, step=9), trainer.learner)
    assert not gathers and len(sizes) > 3 and sum(sizes) == sum(slices) and max(sizes) <= largest
    names = gather_object(read)
    assert (
        len(names) == len(set(names)) > 2 * len(read) - 2 > 0
    )  # each file is read by one of the two, as many by each


def test_a_process_saves_its_slices_and_gathers_nothing(setting):
    """Into files of which none takes more than one slice may; none of them is a pickle."""
    run_in_processes(2, partial(save_counted, setting), setting.root)
    files = list((setting.root / "counted" / "checkpoint-9").iterdir())
    assert {path.name.split("-")[1] for path in files if path.suffix != ".json"} == {"00001", "00002"}
    for path in files:
        assert path.suffix in (".json", ".safetensors") and not zipfile.is_zipfile(path)
        with pytest.raises((pickle.UnpicklingError, EOFError)), path.open("rb") as file:
            pickle.load(file)


def test_a_missing_or_broken_slice_is_named_before_anything_is_trained(setting):
    run_in_processes(2, lambda: (shard(), setting.run("broken", 2)), setting.root)
    forget()
    last = setting.root / "broken" / "checkpoints" / f"checkpoint-{STEPS}"
    name = "shard-00002-model-00001-of-00001.safetensors"
    (last / name).rename(setting.root / name)
    with pytest.raises(ValueError, match=f"checkpoint-{STEPS}' lacks {name}: put back"):
        setting.run("broken", 1)
    content = bytearray((setting.root / name).read_bytes())
    content[-1] ^= 1  # one bit
    (last / name).write_bytes(content)
    trainer = setting.trainer("broken", 1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._origin.step == STEPS - 1
    assert last.with_name(f"damaged-{last.name}").is_dir()


def test_a_process_that_is_killed_ends_the_other(setting):
    def killed() -> None:
        shard()

        def change(trainer: PPOTrainer) -> None:
            if trainer.accelerator.process_index:
                trainer.learner.optimizer.step = lambda: os._exit(9)

        setting.run("killed", 2, change)

    with pytest.raises(RuntimeError, match=r"(?s)exit codes \[1, 9\].*peer"):
        run_in_processes(2, killed, setting.root)


def test_slices_inside_of_a_machine(setting):
    """Four processes as two machines of two: each holds half of the model, and so does one of the other machine."""

    def run() -> None:
        shard()
        sizes = {"DP_REPLICATE": "2", "DP_SHARD": "2"}
        os.environ |= {f"PARALLELISM_CONFIG_{name}_SIZE": size for name, size in sizes.items()}
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        trainer = setting.run("hybrid", 4)
        weight = next(sharding.repeated_layers(trainer.shared)[0].parameters())
        assert slice_here(weight).numel() == weight.numel() // 2

    run_in_processes(4, run, setting.root)
    written = (setting.root / "hybrid" / "checkpoints" / f"checkpoint-{STEPS}").glob("shard-*")
    assert {path.name.split("-")[1] for path in written} == {"00001", "00002"}  # the first machine's processes
    assert_same(setting.weights("one"), setting.weights("hybrid"))
