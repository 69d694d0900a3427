"""Proximal policy optimisation of a language model on `accelerate`: act, credit, learn, log."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object, set_seed
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.generation import Decoding, finished, generate, seed_samples
from pipeline.models.reward_model import check_base
from pipeline.models.sequences import make_sequences
from pipeline.models.shared import SharedModel
from pipeline.models.text import decode, encode_prompts
from pipeline.rewards import Reward, RewardError, RewardOutputs, check_rewards
from pipeline.rewards.learned import AdapterReward
from pipeline.rewards.rows import compute_row_rewards, count_failures
from pipeline.runtime.memory import in_smaller_batches
from pipeline.runtime.seeds import derive_seed, random_state, restore_random_state
from pipeline.runtime.signals import Stopped, requested_stop
from pipeline.runtime.watchdog import enter, watched
from pipeline.trainers.checkpoints import check_space, clear_checkpoints, newest_checkpoint
from pipeline.trainers.logs import TrainingLog, sample_line
from pipeline.trainers.ppo.advantages import credit
from pipeline.trainers.ppo.checkpoint import (
    Checkpoint,
    TrainerState,
    load_checkpoint,
    save_checkpoint,
    state_size,
)
from pipeline.trainers.ppo.checks import check_kl, check_model_and_data, check_start, first_rows
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.held_out import HeldOutCompletion, held_out_figures
from pipeline.trainers.ppo.learner import Learner
from pipeline.trainers.ppo.objective import adapted_kl_coef
from pipeline.trainers.ppo.rollout import (
    Experience,
    Rollout,
    prompt_order,
    rollout_statistics,
    rollout_sums,
)
from pipeline.trainers.ppo.scores import RunningMoments
from pipeline.trainers.ppo.scoring import ProcessedScores, prefix_scores, process_scores
from pipeline.trainers.ppo.settings import as_rewards, first_of, greedy, handling_of, sampling, uses_bf16
from pipeline.trainers.trackers import installed, start_trackers

# A metric of the held-out completions: (completions, the rows they answer) -> name -> value.
ComputeMetrics = Callable[[list[str], Dataset], dict[str, float]]


class PPOTrainer:
    """PPO with one base model in every role. Constructor names are TRL's.

    `model` is the SFT policy with plain weights: it becomes the reference, and the start of the policy. `reward_funcs`
    are functions with TRL's GRPO signature or `Reward`s, which add a name and a weight. `train_dataset` and
    `eval_dataset` have a column `prompt` (text or chat messages); every other column reaches the rewards.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        reward_funcs: Reward | Callable | Sequence[Reward | Callable],
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        peft_config: LoraConfig | None = None,
        output_dir: str | Path = "ppo",
        seed: int = 0,
        compute_metrics: ComputeMetrics | None = None,
    ) -> None:
        self.args, self.seed, self.output_dir = args, seed, Path(output_dir)
        self.tokenizer = processing_class
        self.rewards = as_rewards(reward_funcs)
        self.train_dataset, self.compute_metrics = train_dataset, compute_metrics
        self.eval_dataset = first_of(eval_dataset, args.eval_examples)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if uses_bf16(args) else "no",
            log_with=installed(args.report_to, ppo=True) or None,
            project_dir=str(self.output_dir),
            # No buffer of a language model is trained; sent with a pass, one process could not repeat that pass alone.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        set_seed(seed)  # python, numpy and torch, before the adapter is initialised
        check_model_and_data(model, processing_class, train_dataset)
        adapters = [reward.function for reward in self.rewards if isinstance(reward.function, AdapterReward)]
        for adapter in adapters:
            check_base(adapter.record, model, processing_class, model.config.name_or_path)
        shared = SharedModel(
            model,
            peft_config if args.use_peft else None,
            args.temperature,
            value_adapter=args.value_model == "adapter",
            entropy_gradient=args.entropy_coef > 0,
            padding_free=args.padding_free,
        )
        for adapter in adapters:
            shared.add_reward(adapter.directory)
        if args.gradient_checkpointing:
            shared.enable_gradient_checkpointing()
        shared.train()
        held_out = self.eval_dataset["prompt"] if eval_dataset else []
        self._prompt_ids, self._eval_prompt_ids = (
            encode_prompts(processing_class, prompts, model.config.is_encoder_decoder)
            for prompts in (train_dataset["prompt"], held_out)
        )
        self._prompt_at = prompt_order(len(train_dataset), seed)
        self.learner = Learner(shared, args, self.accelerator)
        self.shared = self.learner.shared
        self.optimizer = self.learner.optimizer
        for adapter in adapters:
            adapter.attach(self.shared.reward_scores, self.shared.language_model)
        check_rewards(self.rewards, first_rows(train_dataset), args.reward_timeout)
        check_start(self.shared, processing_class, self._prompt_ids, self._eval_prompt_ids, args, self.accelerator)
        self.state, self._warned = TrainerState(), False
        self._origin = 0, 0  # step and episodes from which this number of processes counts on
        self._rollout_size = args.local_rollout_forward_batch_size  # less once memory has run out

    @property
    def batch_size(self) -> int:
        """Episodes of one PPO step over all processes."""
        return self.args.batch_size(self.accelerator.num_processes)

    @property
    def num_steps(self) -> int:
        """PPO steps of the whole run, those included that another number of processes may have made."""
        step, episodes = self._origin
        return step - (episodes - self.args.total_episodes) // self.batch_size

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.output_dir / "checkpoints"

    def train(self, resume_from_checkpoint: bool = True) -> TrainerState:
        """Run all PPO steps, from the newest checkpoint if there is one; the model ends as the best policy."""
        self._start(resume_from_checkpoint)
        with watched(self.checkpoints):
            self._train()
        if self.args.load_best_model_at_end and self.state.best_metric is not None:
            self._load_best()
        self.log.close()
        return self.state

    def _load_best(self) -> None:
        best, metric = self.state.best_step, self.args.metric_for_best_model
        if best:
            self.shared.load_trainable_state(load_checkpoint(self.checkpoints / f"checkpoint-{best}").weights)
        else:
            self.shared.restart_policy()
        note = "" if best else ": no later one was better, so the policy is the model it started from"
        self.log.say(f"best {metric} {self.state.best_metric:.4f} at step {best}{note}")

    def _train(self) -> None:
        if self.state.step == 0 and self.eval_dataset:
            self._log_and_compare(self.evaluate())
        while self.state.step < self.num_steps:
            rows = self.prompt_rows(self.state.step)
            rollout = self.collect_rollout(rows)
            experience, stats = self.compute_advantages(rollout)
            stats |= self.update(experience)
            self._end_step(rollout, stats)
            if number := requested_stop():
                if not (self.checkpoints / f"checkpoint-{self.state.step}").is_dir():
                    self.save_checkpoint()
                self.log.close()
                raise Stopped(number, self.state.step)

    def _enter(self, what: str) -> None:
        enter(f"{what} of PPO step {self.state.step + 1}")

    def _start(self, resume: bool) -> None:
        if not resume:
            clear_checkpoints(self.checkpoints)
        checkpoint, notes = newest_checkpoint(self.checkpoints)
        if checkpoint:
            notes.append(self._restore(load_checkpoint(checkpoint), checkpoint))
        count = self.args.save_total_limit + 1 + self.args.load_best_model_at_end  # the one being written, the best
        check_space(self.checkpoints, state_size(self.shared.trainable_state()), count)
        if self.args.report_to:
            start_trackers(self.accelerator, self.args.run_name or "relay-ppo")
        self.log = TrainingLog(self.accelerator, self.output_dir / "metrics.jsonl", self.num_steps, self.state.step)
        for note in notes:
            self.log.say(note)

    def _restore(self, checkpoint: Checkpoint, source: Path) -> str:
        """Go on from a checkpoint; a sentence on what is not as it would have been without the interruption."""
        args, state, processes = self.args, checkpoint.state, self.accelerator.num_processes
        self.state, self._origin = state, (state.step, state.episodes)
        self.shared.load_trainable_state(checkpoint.weights)
        same = len(checkpoint.random) == processes
        steps = self.num_steps * args.num_ppo_epochs * args.num_mini_batches
        self.learner.restore(checkpoint.optimizer, checkpoint.scheduler, None if same else steps)
        self.learner.micro_batch_size = state.micro_batch_size or args.per_device_train_batch_size
        if same:
            restore_random_state(checkpoint.random[self.accelerator.process_index])
            return f"continuing from {source}"
        set_seed(derive_seed(self.seed, "resumed run", state.step, self.accelerator.process_index) % 2**32)
        return (
            f"continuing from {source}, which {len(checkpoint.random)} processes made; this run has {processes}, so "
            f"from episode {state.episodes} on batches, samples and learning rates are others: the curve will not be "
            "identical to that of a run without the change"
        )

    def prompt_rows(self, step: int) -> list[int]:
        """Which training rows this process answers in a step. Data smaller than a batch is passed several times."""
        every, copies = self.batch_size // self.args.num_generations, self.args.num_generations
        local = every // self.accelerator.num_processes
        done = self._origin[1] // copies + (step - self._origin[0]) * every
        start = done + self.accelerator.process_index * local
        return [self._prompt_at(position) for position in range(start, start + local) for _ in range(copies)]

    def collect_rollout(self, rows: Sequence[int]) -> Rollout:
        """Answer the prompts of `rows` with the current policy and score the answers; no gradient."""
        args, device, rank = self.args, self.accelerator.device, self.accelerator.process_index
        prompts = [self._prompt_ids[row] for row in rows]
        self._enter("the completions")
        with torch.random.fork_rng(), self.accelerator.autocast():
            seed = derive_seed(self.seed, "rollout", self.state.step)
            seed_samples(self.shared.language_model, sampling(args), seed, rank, len(prompts))
            completions = self._generate(prompts, sampling(args))
        texts = decode(self.tokenizer, completions)
        ended = torch.tensor(finished(self.shared.language_model, self.tokenizer, completions, sampling(args)))
        answered = self.train_dataset.select(rows)
        self._enter("the rewards")
        said = self.score(answered, texts, completions)
        paid = self._paid(answered, completions, said, ended)
        self._enter("the log-probabilities")
        sequences = make_sequences(prompts, completions, self.tokenizer.pad_token_id, device)
        before = self.learner.micro_batch_size
        sequences, tokens = self.learner.forward(sequences)
        self._note_micro_batch(before)
        return Rollout(
            prompts=answered["prompt"],
            completions=texts,
            sequences=sequences,
            logprobs=tokens.logprobs,
            ref_logprobs=tokens.ref_logprobs,
            values=tokens.values,
            entropies=tokens.entropies,
            scores=paid.scores.to(device),
            token_scores=paid.token_scores.to(device),
            rewards=said.parts,
            finished=ended,
            moments=paid.moments,
            scored=paid.scored.to(device),
            failures=paid.failures,
        )

    def _generate(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[list[int]]:
        self.shared.eval()
        state = torch.get_rng_state()

        def attempt(size: int) -> list[list[int]]:
            torch.set_rng_state(state)  # once more, with the same draws
            return generate(self.shared.language_model, self.tokenizer, prompts, decoding, size)

        completions, size = in_smaller_batches(attempt, self._rollout_size)
        if size < self._rollout_size:
            self._note_memory(f"{size} prompts at once instead of {self._rollout_size} to write completions")
        self._rollout_size = size
        self.shared.train()
        return completions

    def _note_micro_batch(self, before: int) -> None:
        size = self.learner.micro_batch_size
        if size < before:
            self._note_memory(f"micro-batches of {size} instead of {before} episodes, as many as before to a step")
            self.state = replace(self.state, micro_batch_size=size)

    def _note_memory(self, what: str) -> None:
        where = f"process {self.accelerator.process_index}: " if self.accelerator.num_processes > 1 else ""
        tqdm.write(f"step {self.state.step + 1}: {where}out of memory: from now on {what}", file=sys.stderr)

    def score(
        self, rows: Dataset, completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> RewardOutputs:
        """What the rewards say of completions to the prompts of `rows`, which have the data set's columns."""
        return compute_row_rewards(self.rewards, rows, completions, completion_ids, handling_of(self.args))

    def _paid(
        self, rows: Dataset, completions: Sequence[Sequence[int]], said: RewardOutputs, ended: Tensor
    ) -> ProcessedScores:
        """What PPO is paid for a rollout."""
        args, lengths = self.args, [len(ids) for ids in completions]
        token_scores = said.by_token(self.rewards, lengths)
        if args.reward_shaping == "prefix":
            token_scores = prefix_scores(self.rewards, rows, completions, said, self.tokenizer, handling_of(args))
        seen = RunningMoments(self.state.score_count, self.state.score_mean, self.state.score_squares)
        return process_scores(said, token_scores, lengths, ended, seen, args, self.accelerator)

    def compute_advantages(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Turn scores and KL into an advantage and a return for each token, and the statistics of the rollout.

        Raises:
            RewardError: not one completion of the step has a score.
            FloatingPointError: the KL to the reference is beyond `max_kl`.
        """
        experience, penalties = credit(rollout, self.args, self.kl_coef, self.accelerator)
        stats = self._rollout_statistics(rollout, experience.returns, penalties)
        check_kl(stats["objective/kl"], self.args.max_kl, self.state.step + 1, self.state.best_step)
        return experience, stats

    def update(self, experience: Experience) -> dict[str, float]:
        """`num_ppo_epochs` passes of `num_mini_batches` optimizer steps over the experience.

        Raises:
            FloatingPointError: the gradients of `max_skipped_steps` optimizer steps in a row were not finite.
        """
        self._enter("the update")
        seed = derive_seed(self.seed, "mini-batches", self.state.step, self.accelerator.process_index)
        value_only, step = self.state.step < self.args.value_warmup_steps, self.state.step + 1
        try:
            before = self.learner.micro_batch_size
            done = self.learner.update(experience, seed, self.kl_coef, value_only, self.state.skipped_in_row)
            self._note_micro_batch(before)
        except FloatingPointError as error:
            raise FloatingPointError(f"PPO step {step}, {error}") from error
        if self.accelerator.is_main_process:
            for note in done.notes:
                tqdm.write(f"step {step}, {note}", file=sys.stderr)
        skipped = self.state.skipped_steps + done.skipped
        self.state = replace(self.state, skipped_steps=skipped, skipped_in_row=done.skipped_in_row)
        return done.stats | {"policy/skipped_steps": float(self.state.skipped_steps)}

    def _rollout_statistics(self, rollout: Rollout, returns: Tensor, penalties: Tensor) -> dict[str, float]:
        sums = rollout_sums(rollout, returns, penalties, self.args.num_generations).to(self.accelerator.device)
        sums = self.accelerator.reduce(sums, reduction="sum").tolist()
        if rollout.failures:
            where = f"process {self.accelerator.process_index}: " if self.accelerator.num_processes > 1 else ""
            note = f"step {self.state.step + 1}: {where}{count_failures(rollout.failures, self.args.on_reward_error)}"
            tqdm.write(note, file=sys.stderr)  # every process has its own
        if not sums[0]:
            raise RewardError(f"PPO step {self.state.step + 1}: no completion has a score, see what failed above")
        stats = rollout_statistics(sums, [reward.name for reward in self.rewards], self.args.num_generations)
        return stats | {"objective/kl_coef": self.kl_coef}

    @property
    def kl_coef(self) -> float:
        """The KL coefficient of this step."""
        return self.args.kl_coef if self.state.kl_coef is None else self.state.kl_coef

    def evaluate(self) -> dict[str, float]:
        """Greedy answers to the held-out prompts: each reward, their weighted sum `eval_reward`, length, metrics."""
        enter(f"the evaluation after PPO step {self.state.step}")
        compute, lengths = self.compute_metrics, [len(ids) for ids in self._eval_prompt_ids]
        metrics = None if compute is None else lambda texts: compute(texts, self.eval_dataset)
        size = self.args.local_rollout_forward_batch_size
        return held_out_figures(lengths, size, self._held_out_completions, metrics)

    def _held_out_completions(self, rows: list[int]) -> list[HeldOutCompletion]:
        with self.accelerator.autocast():
            completions = self._generate([self._eval_prompt_ids[r] for r in rows], greedy(self.args))
        texts = decode(self.tokenizer, completions)
        said = self.score(self.eval_dataset.select(rows), texts, completions)
        ended = finished(self.shared.language_model, self.tokenizer, completions, greedy(self.args))
        parts = [{name: float(values[i]) for name, values in said.parts.items()} for i in range(len(rows))]
        figures = zip(rows, texts, said.total.tolist(), parts, map(len, completions), ended, strict=True)
        return [HeldOutCompletion(*values) for values in figures]

    def _log_and_compare(self, values: dict[str, float]) -> None:
        name = self.args.metric_for_best_model
        if name not in values:
            raise ValueError(f"ppo.metric_for_best_model: {name!r} is not one of {', '.join(values)}")
        self.log.write(self.state.step, values)
        figures = ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in values.items())
        self.log.say(f"step {self.state.step}: held-out {figures}")
        sign, best = 1 if self.args.greater_is_better else -1, self.state.best_metric
        if math.isfinite(values[name]) and (best is None or sign * values[name] > sign * best):
            self.state = replace(self.state, best_metric=values[name], best_step=self.state.step)

    def advance(self, rollout: Rollout, stats: dict[str, float]) -> None:
        """Count the step, and move what adapts with it: the KL coefficient and the moments of the scores."""
        args, seen = self.args, rollout.moments
        moved = {"score_count": seen.count, "score_mean": seen.mean, "score_squares": seen.squares}
        if args.kl_target is not None:
            moved["kl_coef"] = adapted_kl_coef(
                self.kl_coef, stats["objective/kl"], args.kl_target, self.batch_size, args.kl_horizon
            )
        episodes = self.state.episodes + self.batch_size
        self.state = replace(self.state, step=self.state.step + 1, episodes=episodes, **moved)

    def _end_step(self, rollout: Rollout, stats: dict[str, float]) -> None:
        """Log, show a sample, evaluate and save, each when it is due."""
        args, total = self.args, self.num_steps
        self.advance(rollout, stats)
        step = self.state.step
        if step % args.logging_steps == 0 or step == total:
            self.log.write(step, {"episode": self.state.episodes, **stats})
        self.log.advance(stats)
        if stats["objective/frac_reward_zero_std"] > 0.5 and not self._warned:
            self._warned = True
            self.log.say(
                f"step {step}: no learning signal in {stats['objective/frac_reward_zero_std']:.0%} of the prompts: "
                "every completion of theirs got the same score"
            )
        if args.num_sample_generations and step % max(1, total // args.num_sample_generations) == 0:
            self.log.say(sample_line(step, rollout.prompts[0], rollout.completions[0], float(rollout.scores[0])))
        every = args.eval_steps or max(1, total // 10)
        evaluates = bool(self.eval_dataset) and (step % every == 0 or step == total)
        if evaluates:
            self._log_and_compare(self.evaluate())
        if (step % args.save_steps == 0 if args.save_steps else evaluates) or step in (total, self.state.best_step):
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current step; every process calls it, the main one writes."""
        enter(f"the checkpoint after PPO step {self.state.step}")
        states = self.optimizer.state_dict(), self.learner.scheduler.state_dict(), gather_object([random_state()])
        checkpoint = Checkpoint(self.state, self.shared.trainable_state(), *states)
        protect = self.state.best_step if self.args.load_best_model_at_end else None
        save_checkpoint(self.checkpoints, checkpoint, self.args.save_total_limit, protect)

    def save_model(self, directory: str | Path | None = None) -> None:
        """The policy (a peft adapter, or a whole model), the value head and the tokenizer."""
        if self.accelerator.is_main_process:
            target = Path(directory) if directory else self.output_dir
            target.mkdir(parents=True, exist_ok=True)
            self.shared.save_pretrained(target)
            self.tokenizer.save_pretrained(target)
        self.accelerator.wait_for_everyone()
