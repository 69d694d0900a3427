"""Two processes of one gloo group against one process: the same rollouts give the same run."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from ppo_toys import SMALL, colours, read_metrics, small, weights
from two_processes import run_in_two

from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model, load_policy, load_tokenizer, lora_config
from pipeline.trainers.checkpoints import list_checkpoints
from pipeline.trainers.ppo.trainer import PPOTrainer

# The likeliest token is always taken: nothing that is drawn can hide a difference of weights, or make one.
EQUAL: dict[str, Any] = {
    "top_k": 1,
    "gradient_accumulation_steps": 1,  # of each process: the one process of the comparison has twice as many
    "per_device_train_batch_size": 4,
    "whiten_rewards": True,
    "missing_eos_penalty": 0.5,
    "kl_coef": 0.2,
    "eval_steps": 1,
    "save_steps": 1,
    "save_total_limit": 3,
    "load_best_model_at_end": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"use_peft": False},
    "options": {  # whatever keeps numbers of its own from rollout to rollout, or parameters that not every step trains
        "value_model": "adapter",
        "value_warmup_steps": 1,
        "gradient_checkpointing": True,
        "whiten_rewards": False,
        "score_scaling": "running",
        "score_clip": 1.5,
        "shuffle_scores": True,  # over both processes
        "kl_target": 0.5,
        "kl_horizon": 100,
        "target_kl": 0.01,
        "entropy_coef": 0.01,
        "num_ppo_epochs": 4,
    },
    "means of completions": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "mask_truncated_completions": True,
        "ptx_coef": 0.1,
    },
}
SAMPLED = {**SMALL, "num_mini_batches": 2, "num_generations": 2, "group_baseline": True, "dynamic_sampling_rounds": 2}


class Setting:
    """What every process needs to build the same trainer."""

    def __init__(self, directory: Path, config: ModelConfig, examples: Dataset, root: Path) -> None:
        self.directory, self.config, self.examples, self.root = directory, config, examples, root

    def trainer(self, name: str, dtype: torch.dtype = torch.float64, **settings) -> PPOTrainer:
        """A trainer that writes to `root/name`."""
        return PPOTrainer(
            model=load_model(self.directory, self.config).to(dtype),
            args=small(**settings),
            processing_class=load_tokenizer(self.directory, self.config),
            reward_funcs=colours,
            train_dataset=self.examples,
            eval_dataset=self.examples.select(range(5)),  # not a multiple of two
            peft_config=lora_config(self.config),
            output_dir=self.root / name,
        )

    def run(self, kind: str, world: int) -> None:
        """Credit of the first step, then a whole run, and its end once more from the checkpoint before it."""
        settings = {**EQUAL, "gradient_accumulation_steps": 2 // world, **KINDS[kind]}
        name = f"{kind}-{world}"
        trainer = self.trainer(name, **settings)
        experience, _ = trainer.compute_advantages(trainer.collect_rollout(trainer.prompt_rows(0)))
        self.keep(trainer, name, "advantages", [experience.advantages, experience.sequences.completion_mask])
        trainer.train()
        self.keep(trainer, name, "weights", weights(trainer))
        trainer.save_model()
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            self.keep(trainer, name, "logits", trainer.shared.eval().network(input_ids=ids).logits)
        if trainer.accelerator.is_main_process:
            shutil.copytree(self.root / name, self.root / f"{name}-again")
            shutil.rmtree(self.root / f"{name}-again" / "checkpoints" / "checkpoint-3")
        trainer.accelerator.wait_for_everyone()
        again = self.trainer(f"{name}-again", **settings)
        again.train()
        assert again.state.step == 3
        self.keep(again, f"{name}-again", "weights", weights(again))

    def sample(self) -> None:
        """A run that samples, in float32, with mini-batches."""
        trainer = self.trainer("sampled", torch.float32, **SAMPLED)
        rows = trainer.prompt_rows(0)
        rollout = trainer.collect_rollout(rows)
        self.keep(trainer, "sampled", "rows", [rows, rollout.completions])
        trainer.train()
        self.keep(trainer, "sampled", "weights", weights(trainer))
        counts = {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()}
        self.keep(trainer, "sampled", "counts", [sorted(counts), trainer.num_steps, trainer.batch_size])

    def draw(self, world: int) -> None:
        """The rows and sampled completions of two rollouts."""
        name = f"drawn-{world}"
        trainer = self.trainer(name, gradient_accumulation_steps=2 // world, num_generations=2)
        for step in range(2):
            trainer.state = replace(trainer.state, step=step)
            rows = trainer.prompt_rows(step)
            self.keep(trainer, name, f"step-{step}", [rows, list(trainer.collect_rollout(rows).completions)])

    def everything(self) -> None:
        """What a group of two does."""
        self.draw(2)
        for kind in KINDS:
            self.run(kind, 2)
        self.sample()

    def keep(self, trainer: PPOTrainer, name: str, what: str, value: object) -> None:
        """Put a result where the test finds it."""
        (self.root / name).mkdir(parents=True, exist_ok=True)
        torch.save(value, self.root / name / f"{what}-{trainer.accelerator.process_index}.pt")

    def found(self, name: str, what: str, rank: int = 0):
        """What `keep` kept."""
        return torch.load(self.root / name / f"{what}-{rank}.pt")


@pytest.fixture(scope="module")
def runs(taught_directory, model_config, examples, tmp_path_factory) -> Setting:
    """Runs of two processes and of one."""
    setting = Setting(taught_directory, model_config, examples, tmp_path_factory.mktemp("runs"))
    run_in_two(setting.everything, setting.root)
    for state in (lambda: AcceleratorState._reset_state(reset_partial_state=True), GradientState._reset_state):
        state()
    setting.draw(1)
    for kind in KINDS:
        setting.run(kind, 1)
    return setting


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_weights_of_one(runs, kind):
    one, two = runs.found(f"{kind}-1", "weights"), runs.found(f"{kind}-2", "weights")
    # float64, and Adam divides by the root of squared gradients, which makes 1e-16 larger where they are small
    torch.testing.assert_close(two, one, rtol=1e-8, atol=1e-9)
    before = {n: p for n, p in runs.trainer("unused", **KINDS[kind]).shared.named_parameters()}
    assert all((before[name] - weight).abs().max() > 1e-4 for name, weight in one.items())


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_log_what_one_logs(runs, kind):
    one, two = (read_metrics(runs.root / f"{kind}-{world}") for world in (1, 2))
    assert len(one) == 7 and [sorted(line) for line in one] == [sorted(line) for line in two]  # 3 steps, 4 evaluations
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, rel=1e-5, abs=1e-6)  # some statistics are summed in float32


def test_whitening_is_over_all_processes(runs):
    whole, mask = runs.found("lora-1", "advantages")
    parts = [runs.found("lora-2", "advantages", rank) for rank in range(2)]
    for rank, (advantages, own) in enumerate(parts):
        width = own.shape[1]
        assert torch.equal(own, mask[4 * rank : 4 * rank + 4, :width])
        torch.testing.assert_close(advantages, whole[4 * rank : 4 * rank + 4, :width], rtol=1e-9, atol=1e-9)
    assert abs(whole[mask].mean()) < 1e-9
    assert all(abs(advantages[own].mean()) > 0.01 for advantages, own in parts)  # not of its own


@pytest.mark.parametrize(
    "name", ["lora-2", "full-2", "options-2", "lora-2-again", "full-2-again", "options-2-again", "sampled"]
)
def test_both_processes_hold_the_same_weights_bit_for_bit(runs, name):
    torch.testing.assert_close(runs.found(name, "weights", 1), runs.found(name, "weights", 0), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resume_bit_for_bit(runs, kind):
    name = f"{kind}-2"
    whole, again = runs.found(name, "weights"), runs.found(f"{name}-again", "weights")
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert read_metrics(runs.root / f"{name}-again") == read_metrics(runs.root / name)
    found = [path.name for path in list_checkpoints(runs.root / f"{name}-again" / "checkpoints")]
    assert found == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_two_processes_save_loads(runs, kind):
    loaded = load_policy(runs.root / f"{kind}-2", runs.directory, runs.config).double().eval()
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    # The merge, or what is saved of a full model, is in float32.
    torch.testing.assert_close(logits, runs.found(f"{kind}-2", "logits"), rtol=1e-4, atol=1e-4)


def test_processes_answer_prompts_of_their_own(runs):
    (rows, completions), (others, other_completions) = (runs.found("sampled", "rows", rank) for rank in range(2))
    assert len(rows) == len(others) == 8 and not set(rows) & set(others)
    assert completions != other_completions


@pytest.mark.parametrize("step", [0, 1])
def test_two_processes_sample_what_one_samples(runs, step):
    """The noise of an episode is that of its place in the whole batch, whichever process draws it."""
    rows, completions = runs.found("drawn-1", f"step-{step}")
    parts = [runs.found("drawn-2", f"step-{step}", rank) for rank in range(2)]
    assert parts[0][0] + parts[1][0] == rows and parts[0][1] + parts[1][1] == completions
    assert len(set(completions)) > 4


def test_the_steps_of_two_processes_are_what_the_arithmetic_says(runs):
    # 24 episodes in rollouts of 2 processes x 4 x 2 are 2 steps; each is 2 epochs of 2 mini-batches
    assert runs.found("sampled", "counts") == [[2 * 2 * 2], 2, 16]
    lines = [line for line in read_metrics(runs.root / "sampled") if "lr" in line]
    assert [line["lr"] for line in lines] == pytest.approx([5e-3 / 2, 0.0])  # the schedule ends with the run
    assert lines[0]["val/ratio_first"] == pytest.approx(1.0, abs=1e-5) and lines[0]["objective/kl"] == 0.0
