"""Every TRL key of `sft:` and `reward:`: that it changes the run, from the recipe to weights, log or files."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from test_reward import make_pairs
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback
from trl import RewardConfig, SFTConfig

from pipeline.models.loading import load_model, load_tokenizer, lora_config
from pipeline.recipe import load_recipe
from pipeline.recipe.refused import REFUSED_REWARD_KEYS, REFUSED_SFT_KEYS
from pipeline.rewards.pairs import HELD_OUT, TRAIN
from pipeline.trainers.huggingface.resumable import ResumableTrainer
from pipeline.trainers.huggingface.reward import build_reward_trainer, reward_arguments
from pipeline.trainers.huggingface.sft import build_sft_trainer, sft_arguments

# The runs of this file, unless a test says otherwise: four steps over 16 examples, full weights, 4 in a batch.
SETTINGS = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "bf16": False,
    "disable_tqdm": True,
}
RECIPE = """name: demo
model: {from_scratch: {hidden_size: 32, num_attention_heads: 2, vocab_size: 320, max_position_embeddings: 64}}
task: {name: parallel, source: "{split}.en", target: "{split}.de"}
eval: {max_new_tokens: 8}
"""
SECTIONS = {"sft": "ppo: null\nsft: ", "reward": "ppo: {rewards: [learned], response_length: 8}\nreward: "}


@dataclass(frozen=True)
class Outcome:
    """What a run leaves."""

    model: PreTrainedModel
    trainer: ResumableTrainer
    weights: dict[str, torch.Tensor]
    distance: float  # how far the weights have moved
    log: list[dict[str, float]]
    files: set[str]
    attention_calls: int
    verbosity: int
    deterministic: bool
    compiler: tuple[str, str]
    precision: str
    loader: DataLoader
    num_eval_batches: int

    @property
    def steps(self) -> int:
        return self.trainer.state.global_step

    def logged(self, key: str) -> list[float]:
        return [line[key] for line in self.log if key in line]

    def logged_at(self, key: str) -> list[int]:
        return [line["step"] for line in self.log if key in line]

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        return self.trainer.data_collator([self.trainer.train_dataset[i] for i in range(4)])

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(name.split("-")[1]) for name in self.files if name.startswith("checkpoint-"))


Shows = Callable[[Outcome, Outcome], bool]


def weights_differ(before: Outcome, after: Outcome) -> bool:
    return any(not torch.equal(tensor, after.weights[name]) for name, tensor in before.weights.items())


@dataclass(frozen=True)
class Change:
    """A value of a key, what a run with it must show against a run without it, and what both runs need."""

    value: Any
    shows: Shows = weights_differ
    needs: dict[str, Any] = field(default_factory=dict)  # None leaves a key of `SETTINGS` out
    trains: bool = True


SGD = {"optim": "sgd", "learning_rate": 0.1}
UNSAVED = {"save_strategy": "no", "load_best_model_at_end": False}
STEPS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
WORKERS = {"dataloader_num_workers": 1}
PACKED = {"packing": True, "max_length": 16}
# Falls apart: the first evaluation is the best one.
DIVERGES = {**STEPS, "learning_rate": 1.0, "lr_scheduler_type": "constant"}


def ddp(name: str, value: object) -> Change:
    return Change(value, lambda b, a: getattr(a.trainer.accelerator.ddp_handler, name) == value, trains=False)


CHANGES: dict[str, Change] = {
    # How long and how fast.
    "per_device_train_batch_size": Change(8, lambda b, a: (b.steps, a.steps) == (4, 2)),
    "gradient_accumulation_steps": Change(2, lambda b, a: (b.steps, a.steps) == (4, 2)),
    "num_train_epochs": Change(2.0, lambda b, a: (b.steps, a.steps) == (4, 8)),
    "max_steps": Change(3, lambda b, a: (b.steps, a.steps) == (12, 3), {"num_train_epochs": None}),
    "learning_rate": Change(3e-2, lambda b, a: a.distance > 2 * b.distance),
    "lr_scheduler_type": Change("constant", lambda b, a: len(set(a.logged("learning_rate"))) == 1),
    "lr_scheduler_kwargs": Change(
        {"num_cycles": 2},
        lambda b, a: b.logged("learning_rate")[2] < a.logged("learning_rate")[2] == 1e-2,
        {"lr_scheduler_type": "cosine_with_restarts"},
    ),
    "warmup_steps": Change(2, lambda b, a: a.logged("learning_rate")[0] == 0 < b.logged("learning_rate")[0]),
    "optim": Change("sgd", lambda b, a: type(a.trainer.optimizer.optimizer) is torch.optim.SGD),
    "optim_args": Change("momentum=0.9", lambda b, a: a.distance > b.distance, SGD),
    "weight_decay": Change(5.0, lambda b, a: norm(a.weights) < norm(b.weights)),
    "adam_beta1": Change(0.5),
    "adam_beta2": Change(0.9),
    "adam_epsilon": Change(1.0, lambda b, a: a.distance < b.distance / 2),
    "max_grad_norm": Change(1e-3, lambda b, a: a.distance < b.distance / 2, SGD),
    # What is computed.
    "label_smoothing_factor": Change(0.2, lambda b, a: a.logged("loss")[0] > b.logged("loss")[0]),
    "loss_type": Change("dft", lambda b, a: a.logged("loss")[0] < b.logged("loss")[0]),
    "neftune_noise_alpha": Change(10.0),
    "bf16": Change(True, lambda b, a: (b.precision, a.precision) == ("no", "bf16") and weights_differ(b, a)),
    "activation_checkpointing": Change(False, lambda b, a: (b.attention_calls, a.attention_calls) == (9, 5)),
    "gradient_checkpointing": Change(False, lambda b, a: (b.attention_calls, a.attention_calls) == (9, 5)),
    "activation_checkpointing_kwargs": Change({"use_reentrant": True}, lambda b, a: is_reentrant(a) > is_reentrant(b)),
    "gradient_checkpointing_kwargs": Change({"use_reentrant": True}, lambda b, a: is_reentrant(a) > is_reentrant(b)),
    "torch_compile": Change(True, lambda b, a: (b.compiler[0], a.compiler[0]) == ("NO", "INDUCTOR"), trains=False),
    "torch_compile_backend": Change("aot_eager", lambda b, a: a.compiler[0] == "AOT_EAGER", trains=False),
    "torch_compile_mode": Change(
        "reduce-overhead",
        lambda b, a: a.compiler[1] == "reduce-overhead",
        trains=False,
    ),
    "full_determinism": Change(True, lambda b, a: a.deterministic > b.deterministic, trains=False),
    "debug": Change("underflow_overflow", lambda b, a: num_hooks(a) > num_hooks(b)),
    # What is logged, evaluated and saved.
    "logging_strategy": Change(
        "epoch", lambda b, a: (b.logged_at("loss"), a.logged_at("loss")) == ([], [4]), {"logging_steps": None}
    ),
    "logging_steps": Change(2, lambda b, a: a.logged_at("loss") == [2, 4]),
    "logging_first_step": Change(
        True, lambda b, a: (b.logged_at("loss"), a.logged_at("loss")) == ([3], [1, 3]), {"logging_steps": 3}
    ),
    "include_num_input_tokens_seen": Change(
        "all", lambda b, a: a.logged("num_input_tokens_seen")[-1] > b.logged("num_input_tokens_seen")[-1]
    ),
    "skip_memory_metrics": Change(False, lambda b, a: bool(a.logged("train_mem_cpu_alloc_delta"))),
    "log_level": Change("error", lambda b, a: a.verbosity == transformers.logging.ERROR, trains=False),
    "disable_tqdm": Change(False, lambda b, a: (PrinterCallback in callbacks(b)) and ProgressCallback in callbacks(a)),
    "report_to": Change(["tensorboard"], lambda b, a: any("events.out" in name for name in a.files - b.files)),
    "eval_strategy": Change("no", lambda b, a: b.logged("eval_loss") and not a.logged("eval_loss"), UNSAVED),
    "eval_steps": Change(
        2, lambda b, a: a.logged_at("eval_loss") == [2, 4], {"eval_strategy": "steps", "eval_steps": 1, **UNSAVED}
    ),
    "eval_delay": Change(
        3, lambda b, a: a.logged_at("eval_loss") == [3, 4], {"eval_strategy": "steps", "eval_steps": 1, **UNSAVED}
    ),
    "eval_on_start": Change(True, lambda b, a: (b.logged_at("eval_loss"), a.logged_at("eval_loss")) == ([4], [0, 4])),
    "per_device_eval_batch_size": Change(2, lambda b, a: (b.num_eval_batches, a.num_eval_batches) == (1, 4)),
    "save_strategy": Change(
        "no", lambda b, a: b.checkpoints == [4] and not a.checkpoints, {"load_best_model_at_end": False}
    ),
    "save_steps": Change(
        3,
        lambda b, a: (b.checkpoints, a.checkpoints) == ([1, 2, 3, 4], [3, 4]),
        {**STEPS, "load_best_model_at_end": False, "save_total_limit": 4},
    ),
    "save_total_limit": Change(3, lambda b, a: (b.checkpoints, a.checkpoints) == ([3, 4], [2, 3, 4]), STEPS),
    "load_best_model_at_end": Change(False, lambda b, a: a.distance > b.distance, DIVERGES),
    "metric_for_best_model": Change(
        "eval_mean_token_accuracy",
        lambda b, a: a.trainer.state.best_metric == max(a.logged("eval_mean_token_accuracy")),
    ),
    "greater_is_better": Change(
        True, lambda b, a: a.trainer.state.best_metric == max(a.logged("eval_loss")), DIVERGES
    ),
    # How the examples are read.
    "train_sampling_strategy": Change("sequential"),
    "shuffle_dataset": Change(
        True, lambda b, a: sorted(rows(a)) == sorted(rows(b)) and rows(a) != rows(b), trains=False
    ),
    "dataloader_drop_last": Change(
        True, lambda b, a: (b.steps, a.steps) == (6, 5), {"per_device_train_batch_size": 3}
    ),
    "dataloader_num_workers": Change(
        1, lambda b, a: (b.loader.num_workers, a.loader.num_workers) == (0, 1), trains=False
    ),
    "dataloader_persistent_workers": Change(True, lambda b, a: a.loader.persistent_workers, WORKERS, trains=False),
    "dataloader_prefetch_factor": Change(3, lambda b, a: a.loader.prefetch_factor == 3, WORKERS, trains=False),
    "dataloader_in_order": Change(
        False, lambda b, a: b.loader.in_order and not a.loader.in_order, WORKERS, trains=False
    ),
    "dataloader_multiprocessing_context": Change(
        "fork", lambda b, a: a.loader.multiprocessing_context is not None, WORKERS, trains=False
    ),
    "max_length": Change(7, lambda b, a: max(map(len, rows(b))) > 7 == max(map(len, rows(a))), trains=False),
    "packing": Change(True, lambda b, a: len(rows(a)) < len(rows(b)) and a.steps < b.steps),
    "packing_strategy": Change(
        "wrapped",
        lambda b, a: {len(row) for row in rows(a)[:-1]} == {16} != {len(row) for row in rows(b)[:-1]},
        PACKED,
    ),
    "eval_packing": Change(
        True,
        lambda b, a: len(a.trainer.eval_dataset) < len(b.trainer.eval_dataset) and rows(a) == rows(b),
        trains=False,
    ),
    "padding_free": Change(True, lambda b, a: len(b.batch["input_ids"]) == 4 and len(a.batch["input_ids"]) == 1),
    "pad_to_multiple_of": Change(32, lambda b, a: b.batch["input_ids"].shape[1] < 32 == a.batch["input_ids"].shape[1]),
    "completion_only_loss": Change(False, lambda b, a: num_labels(a) > num_labels(b)),
    # Several processes: what DDP is told.
    "ddp_find_unused_parameters": ddp("find_unused_parameters", True),
    "ddp_bucket_cap_mb": ddp("bucket_cap_mb", 7),
    "ddp_broadcast_buffers": ddp("broadcast_buffers", False),
    "ddp_static_graph": ddp("static_graph", True),
}
REWARD_KEYS = {f.name for f in dataclasses.fields(RewardConfig)} - REFUSED_REWARD_KEYS.keys()
# Keys that have a test of their own below.
TESTED_APART = {"router_aux_loss_coef", "dataset_num_proc"}
# Keys that need what a test on one CPU does not have: the value that has to reach TRL's arguments, and the reason.
ACTS_ELSEWHERE: dict[str, tuple[Any, str]] = {
    "fp16": (True, "an accelerator"),
    "tf32": (False, "an NVIDIA GPU"),
    "activation_offloading": (True, "an accelerator's memory"),
    "torch_empty_cache_steps": (3, "an accelerator's memory"),
    "dataloader_pin_memory": (False, "copies to an accelerator"),
    "average_tokens_across_devices": (False, "several processes"),
    "log_level_replica": ("error", "several processes"),
    "log_on_each_node": (False, "several machines"),
    "optim_target_modules": ("all-linear", "the packages of GaLore or APOLLO"),
    "run_name": ("mine", "a tracker such as wandb or mlflow"),
    "project": ("mine", "trackio"),
}
# What `reward:` has in common with `sft:`, and what is its own.
REWARD_CHANGES: dict[str, Change] = {
    **{key: change for key, change in CHANGES.items() if key in REWARD_KEYS},
    "metric_for_best_model": Change(
        "eval_accuracy", lambda b, a: a.trainer.state.best_metric == max(a.logged("eval_accuracy"))
    ),
    "center_rewards_coefficient": Change(1.0, lambda b, a: a.logged("loss")[0] > b.logged("loss")[0]),
    "disable_dropout": Change(False),
    # transformers looks for unused parameters by itself where the model is not one of its own.
    "ddp_find_unused_parameters": ddp("find_unused_parameters", True),
}


def norm(weights: dict[str, torch.Tensor]) -> float:
    return float(sum(tensor.square().sum() for tensor in weights.values()) ** 0.5)


def trainable_weights(trainer: ResumableTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def rows(outcome: Outcome) -> list[list[int]]:
    return list(outcome.trainer.train_dataset["input_ids"])


def num_labels(outcome: Outcome) -> int:
    return sum(label != -100 for labels in outcome.trainer.train_dataset["labels"] for label in labels)


def callbacks(outcome: Outcome) -> set[type]:
    return {type(callback) for callback in outcome.trainer.callback_handler.callbacks}


def is_reentrant(outcome: Outcome) -> bool:
    return outcome.model.model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"]


def num_hooks(outcome: Outcome) -> int:
    return sum(len(module._forward_hooks) for module in outcome.trainer.model.modules())


def accepted_keys(config_class: type, refused: dict[str, str]) -> set[str]:
    return {
        f.name for f in dataclasses.fields(config_class) if f.name not in refused and not f.name.startswith("hub_")
    }


def recipe_arguments(directory: Path, settings: dict[str, Any], section: str = "sft") -> dict[str, Any]:
    """The arguments that a recipe with these settings hands on; None leaves a key of `SETTINGS` out."""
    values = {key: value for key, value in {**SETTINGS, **settings}.items() if value is not None}
    if section == "reward":
        values["pairs"] = {"path": "pairs.jsonl"}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.yaml").write_text(f"{RECIPE}{SECTIONS[section]}{json.dumps(values)}\n")
    recipe = load_recipe(directory / "recipe.yaml")
    return dict(recipe.sft.arguments if section == "sft" else recipe.reward.arguments)


@pytest.fixture
def run(base_directory, model_config, examples, tmp_path, fresh_accelerate) -> Iterator[Callable[..., Outcome]]:
    """Each call reads a recipe with some settings, trains the tiny model as it says, and returns what it leaves."""

    def build(section: str, directory: Path, model: PreTrainedModel, settings: dict[str, Any]) -> ResumableTrainer:
        tokenizer, metrics = load_tokenizer(base_directory, model_config), directory / "metrics.jsonl"
        arguments = recipe_arguments(directory, settings, section)
        train, validation = examples.select(range(16)), examples.select(range(16, 24))
        if section == "sft":
            args = sft_arguments(arguments, directory, seed=0)
            return build_sft_trainer(model, args, tokenizer, train, validation, None, metrics)
        args = reward_arguments(arguments, directory, seed=0)
        pairs = [*make_pairs(tokenizer, train, TRAIN), *make_pairs(tokenizer, validation, HELD_OUT)]
        adapter = lora_config(dataclasses.replace(model_config, lora_dropout=0.5))
        return build_reward_trainer(model, args, tokenizer, pairs, adapter, metrics)

    def train(name: str, settings: dict[str, Any], trains: bool = True, section: str = "sft") -> Outcome:
        directory, calls = tmp_path / name, []
        transformers.logging.set_verbosity_warning()  # whatever an earlier run of this process has set
        model = load_model(base_directory, model_config)
        model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        trainer = build(section, directory, model, settings)
        start = trainable_weights(trainer)
        verbosity, deterministic = transformers.logging.get_verbosity(), torch.are_deterministic_algorithms_enabled()
        # What is shared by all trainers of a process is read before the next one changes it.
        plugin, precision = trainer.accelerator.state.dynamo_plugin, trainer.accelerator.mixed_precision
        loader, evaluates = trainer.get_train_dataloader(), trainer.eval_dataset is not None
        num_eval_batches = len(trainer.get_eval_dataloader()) if evaluates else 0
        if trains:
            trainer.train()
        weights = trainable_weights(trainer)
        log = (directory / "metrics.jsonl").read_text().splitlines() if trains else []
        return Outcome(
            model=model,
            trainer=trainer,
            weights=weights,
            distance=norm({name: weights[name] - start[name] for name in start}),
            log=[json.loads(line) for line in log],
            files={path.name for path in directory.rglob("*")},
            attention_calls=len(calls),
            verbosity=verbosity,
            deterministic=deterministic,
            compiler=(plugin.backend.value, plugin.mode),
            precision=precision,
            loader=loader,
            num_eval_batches=num_eval_batches,
        )

    verbosity, environment = transformers.logging.get_verbosity(), pytest.MonkeyPatch()
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        environment.setenv(name, "")  # full_determinism sets them
    environment.setenv("FLASH_ATTENTION_DETERMINISTIC", "")
    yield train
    environment.undo()
    torch.use_deterministic_algorithms(False)
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """The runs that several tests compare with, by their settings."""
    return {}


def test_every_accepted_key_is_in_a_table():
    tables = [CHANGES.keys(), TESTED_APART, ACTS_ELSEWHERE.keys()]
    assert accepted_keys(SFTConfig, REFUSED_SFT_KEYS) == set().union(*tables)
    assert sum(map(len, tables)) == len(set().union(*tables))
    known = REWARD_CHANGES.keys() | ACTS_ELSEWHERE.keys() - REFUSED_REWARD_KEYS.keys()
    assert accepted_keys(RewardConfig, REFUSED_REWARD_KEYS) == known


def check(run, outcomes: dict[str, Outcome], section: str, key: str, change: Change) -> None:
    before = json.dumps([section, change.needs, change.trains])
    if before not in outcomes:
        outcomes[before] = run("before", change.needs, change.trains, section)
    assert not change.shows(outcomes[before], outcomes[before])
    assert change.shows(outcomes[before], run("after", {**change.needs, key: change.value}, change.trains, section))


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_of_sft_changes_the_run(run, outcomes, key):
    check(run, outcomes, "sft", key, CHANGES[key])


@pytest.mark.slow
@pytest.mark.parametrize("key", REWARD_CHANGES)
def test_every_key_of_reward_changes_the_run(run, outcomes, key):
    check(run, outcomes, "reward", key, REWARD_CHANGES[key])


@pytest.mark.parametrize("section", SECTIONS)
def test_two_runs_without_a_change_are_equal(run, section):
    first, second = run("first", {}, section=section), run("second", {}, section=section)
    assert (
        not weights_differ(first, second) and first.log == second.log and first.files == second.files
    )  # or a difference of weights would show nothing


@pytest.mark.parametrize("key", ACTS_ELSEWHERE)
def test_what_acts_on_other_machines_reaches_the_arguments(tmp_path, monkeypatch, key, fresh_accelerate):
    value, _ = ACTS_ELSEWHERE[key]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    needs = {"fp16": {"bf16": None}, "run_name": {"report_to": ["wandb"]}, "project": {"report_to": ["trackio"]}}
    needs["optim_target_modules"] = {"optim": "galore_adamw"}
    arguments = recipe_arguments(tmp_path, {**needs.get(key, {}), key: value})
    assert getattr(sft_arguments(arguments, tmp_path, seed=0), key) == value


def test_the_loss_of_a_router_counts_as_much_as_its_coefficient_says(run, monkeypatch, tokenizer):
    losses = []
    for coefficient in (0.0, None, 1.0):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": len(tokenizer)}
        config = transformers.AutoConfig.for_model("mixtral", **sizes, max_position_embeddings=64)
        assert 0 < config.router_aux_loss_coef < 1
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        monkeypatch.setattr("test_sft_config.load_model", lambda *_, model=model: model)
        losses.append(run(str(coefficient), {"router_aux_loss_coef": coefficient}).logged("loss")[0])
    assert losses[0] < losses[1] < losses[2]


def test_the_number_of_processes_that_prepare_the_data_reaches_each_of_their_steps(run, monkeypatch):
    counts, original = [], Dataset.map

    def counted(dataset, *args, num_proc=None, **kwargs):
        counts.append(num_proc)
        return original(dataset, *args, **kwargs)

    monkeypatch.setattr(Dataset, "map", counted)
    run("one", {"max_length": 7, "padding_free": True}, trains=False)
    assert set(counts) == {None}
    counts.clear()
    run("two", {"max_length": 7, "dataset_num_proc": 2}, trains=False)
    assert len(counts) >= 4 and set(counts) == {2}


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(run):
    plain, compiled = run("plain", {}), run("compiled", {"torch_compile_backend": "eager"})
    assert type(compiled.trainer.model_wrapped).__name__ == "OptimizedModule"
    torch.testing.assert_close(compiled.logged("loss"), plain.logged("loss"))


def test_rows_without_padding_give_the_same_losses(run):
    padded, joined = run("padded", {}), run("joined", {"padding_free": True})
    torch.testing.assert_close(joined.logged("loss"), padded.logged("loss"), rtol=1e-4, atol=1e-5)
