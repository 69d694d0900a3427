"""Proximal policy optimisation of a causal language model on `accelerate`: act, credit, learn, log."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from pipeline.models.generation import Decoding, eos_token_ids, generate
from pipeline.models.sequences import make_sequences
from pipeline.models.shared import SharedModel, check_trunk_and_head
from pipeline.models.text import decode, encode_prompts
from pipeline.rewards import Reward, as_completions, check_rewards, combine, score_all
from pipeline.trainers.checkpoint import Checkpoint, TrainerState, load_checkpoint, save_checkpoint, state_size
from pipeline.trainers.checkpoint_files import check_space, clear_checkpoints, newest_checkpoint
from pipeline.trainers.config import PPOConfig
from pipeline.trainers.logs import TrainingLog, sample_line
from pipeline.trainers.objective import (
    LossTerms,
    advantages_and_returns,
    kl_penalty,
    moments,
    ppo_loss,
    spread_scores,
    subtract_group_baseline,
    token_rewards,
    whiten,
)
from pipeline.trainers.random_state import of_this_process, random_state, restore_random_state
from pipeline.trainers.rollout import (
    Answer,
    Experience,
    Rollout,
    prefix_increments,
    prompt_order,
    rollout_statistics,
    rollout_sums,
    score_tokens,
    step_seed,
    summarise_answers,
)
from pipeline.trainers.stopping import Stopped, requested_stop

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
        self.rewards = _as_rewards(reward_funcs)
        self.train_dataset, self.compute_metrics = train_dataset, compute_metrics
        self.eval_dataset = _head(eval_dataset, args.eval_examples)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if _use_bf16(args) else "no",
            log_with=list(args.report_to) or None,
            project_dir=str(self.output_dir),
        )
        set_seed(seed)  # python, numpy and torch, before the adapter is initialised
        first = train_dataset[: min(2, len(train_dataset))]
        check_rewards(self.rewards, {"completion": [""] * len(first["prompt"]), **first})
        check_trunk_and_head(model)
        shared = SharedModel(model, peft_config if args.use_peft else None, args.temperature)
        if args.gradient_checkpointing:
            shared.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        shared.train()
        self._prompt_ids = encode_prompts(processing_class, train_dataset["prompt"])
        self._eval_prompt_ids = encode_prompts(processing_class, self.eval_dataset["prompt"]) if eval_dataset else []
        self._prompt_at = prompt_order(len(train_dataset), seed)
        self._prepare(shared)
        self.state = TrainerState()

    def _prepare(self, shared: SharedModel) -> None:
        args = self.args
        value_parameters = list(shared.value_head.parameters())
        head = {id(p) for p in value_parameters}
        policy_parameters = [p for p in shared.parameters() if p.requires_grad and id(p) not in head]
        optimizer = torch.optim.AdamW(
            [
                {"params": policy_parameters},
                {"params": value_parameters, "lr": args.value_learning_rate or args.learning_rate},
            ],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        shared.to(self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(shared, optimizer)
        self.shared: SharedModel = self.accelerator.unwrap_model(self.model)
        # Not prepared: accelerate would step it once per process, and the schedule would end early.
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=args.num_optimizer_steps(self.accelerator.num_processes),
        )

    @property
    def batch_size(self) -> int:
        """Episodes of one PPO step over all processes."""
        return self.args.batch_size(self.accelerator.num_processes)

    @property
    def num_steps(self) -> int:
        """PPO steps of the whole run."""
        return self.args.num_steps(self.accelerator.num_processes)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.output_dir / "checkpoints"

    def train(self, resume_from_checkpoint: bool = True) -> TrainerState:
        """Run all PPO steps, from the newest checkpoint if there is one; the model ends as the best policy."""
        self._start(resume_from_checkpoint)
        if self.state.step == 0 and self.eval_dataset:
            self._log_evaluation(self.evaluate())
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
        if self.args.load_best_model_at_end and self.state.best_step:
            best = load_checkpoint(self.checkpoints / f"checkpoint-{self.state.best_step}")
            self.shared.load_trainable_state(best.weights)
            self.log.say(
                f"best {self.args.metric_for_best_model} {self.state.best_metric:.4f} at step {best.state.step}"
            )
        self.log.close()
        return self.state

    def _start(self, resume: bool) -> None:
        if not resume:
            clear_checkpoints(self.checkpoints)
        found, notes = newest_checkpoint(self.checkpoints)
        if found:
            checkpoint = load_checkpoint(found)
            self.shared.load_trainable_state(checkpoint.weights)
            self.optimizer.load_state_dict(checkpoint.optimizer)
            self.scheduler.load_state_dict(checkpoint.scheduler)
            restore_random_state(of_this_process(checkpoint.random, found))
            self.state = checkpoint.state
        count = self.args.save_total_limit + 1 + self.args.load_best_model_at_end  # the one being written, the best
        check_space(self.checkpoints, state_size(self.shared.trainable_state()), count)
        if self.args.report_to:
            self.accelerator.init_trackers(self.args.run_name or "relay-ppo")
        self.log = TrainingLog(self.accelerator, self.output_dir / "metrics.jsonl", self.num_steps, self.state.step)
        for note in [*notes, *([f"continuing from {found}"] if found else [])]:
            self.log.say(note)

    def prompt_rows(self, step: int) -> list[int]:
        """Which training rows this process answers in a step. Data smaller than a batch is passed several times."""
        every, copies = self.batch_size // self.args.num_generations, self.args.num_generations
        local = every // self.accelerator.num_processes
        start = step * every + self.accelerator.process_index * local
        return [self._prompt_at(position) for position in range(start, start + local) for _ in range(copies)]

    def collect_rollout(self, rows: Sequence[int]) -> Rollout:
        """Answer the prompts of `rows` with the current policy and score the answers; no gradient."""
        args = self.args
        decoding = Decoding(args.response_length, args.temperature, args.top_k, args.top_p)
        prompts = [self._prompt_ids[row] for row in rows]
        with torch.random.fork_rng(), self.accelerator.autocast():
            torch.manual_seed(step_seed(self.seed, self.state.step, self.accelerator.process_index))
            completions = self._generate(prompts, decoding)
        sequences = make_sequences(prompts, completions, self.tokenizer.pad_token_id, self.accelerator.device)
        texts = decode(self.tokenizer, completions)
        scores, rewards = self.score(self.train_dataset.select(rows), texts, completions)
        ends = eos_token_ids(self.shared.causal_lm, self.tokenizer)
        finished = torch.tensor([completion[-1] in ends for completion in completions])
        token_scores = spread_scores(scores, sequences.completion_mask.cpu())
        if args.reward_shaping == "prefix":
            token_scores = self.prefix_scores(rows, completions, scores)
        if args.missing_eos_penalty is not None:
            penalty = args.missing_eos_penalty * (~finished)
            scores = scores - penalty
            token_scores = token_scores - spread_scores(penalty, sequences.completion_mask.cpu())
        with self.accelerator.autocast():
            logprobs, ref_logprobs, values, entropies = score_tokens(
                self.shared, sequences, args.per_device_train_batch_size
            )
        return Rollout(
            prompts=self.train_dataset.select(rows)["prompt"],
            completions=texts,
            sequences=sequences,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            entropies=entropies,
            scores=scores.to(self.accelerator.device),
            token_scores=token_scores.to(self.accelerator.device),
            rewards=rewards,
            finished=finished,
        )

    def _generate(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[list[int]]:
        self.shared.eval()
        size = self.args.local_rollout_forward_batch_size
        completions = generate(self.shared.causal_lm, self.tokenizer, prompts, decoding, size)
        self.shared.train()
        return completions

    def score(
        self, rows: Dataset, completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted score [B] of completions, and each reward's values [B] by name."""
        columns = {name: rows[name] for name in rows.column_names if name not in ("prompt", "completion")}
        columns = {name: list(values) for name, values in columns.items()} | {"completion_ids": list(completion_ids)}
        prompts = list(rows["prompt"])
        rewards = score_all(self.rewards, prompts, as_completions(prompts, completions), columns)
        return combine(self.rewards, rewards), rewards

    def prefix_scores(self, rows: Sequence[int], completions: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """What each token adds to the score of the text so far, [B, C]; the sum over a completion is its score."""
        spans = [(i, t) for i, ids in enumerate(completions) for t in range(1, len(ids))]
        prefixes = [completions[i][:t] for i, t in spans]
        repeated = self.train_dataset.select([rows[i] for i, _ in spans])
        potentials = self.score(repeated, decode(self.tokenizer, prefixes), prefixes)[0] if spans else torch.zeros(0)
        return prefix_increments(spans, potentials, [len(ids) for ids in completions], scores)

    def compute_advantages(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Turn scores and KL into an advantage and a return for each token, and the statistics of the rollout."""
        args, mask = self.args, rollout.sequences.completion_mask
        kl = kl_penalty(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator)
        token_scores = rollout.token_scores
        if args.group_baseline:
            centred = subtract_group_baseline(rollout.scores, args.num_generations)
            token_scores = token_scores + spread_scores(centred - rollout.scores, mask)
        rewards = token_rewards(token_scores, kl, mask, args.kl_coef)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, self._moments(rewards, mask), shift_mean=False)
        advantages, returns = advantages_and_returns(rewards, rollout.values, mask, args.gamma, args.lam)
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, self._moments(advantages, mask))
        experience = Experience(rollout.sequences, rollout.logprobs, rollout.values, advantages, returns)
        return experience, self._rollout_statistics(rollout, returns, args.kl_coef * kl)

    def _moments(self, values: Tensor, mask: Tensor) -> Tensor:
        return self.accelerator.reduce(moments(values, mask), reduction="sum")

    def update(self, experience: Experience) -> dict[str, float]:
        """`num_ppo_epochs` passes of `num_mini_batches` optimizer steps over the experience."""
        args, totals, tokens, norms, skipped = self.args, torch.zeros(6), 0, [], 0
        first_ratio = float("nan")
        generator = torch.Generator().manual_seed(
            step_seed(self.seed, self.state.step, self.accelerator.process_index)
        )
        for epoch in range(args.num_ppo_epochs):
            for number, mini_batch in enumerate(experience.mini_batches(args.num_mini_batches, generator)):
                count = int(
                    self.accelerator.reduce(torch.tensor(mini_batch.num_tokens, device=self.accelerator.device))
                )
                sums = self._accumulate(mini_batch, count)
                norm = self.accelerator.clip_grad_norm_(self.shared.parameters(), args.max_grad_norm)
                norms.append(float(norm))
                if torch.isfinite(norm):
                    self.optimizer.step()
                else:
                    skipped += 1
                self.scheduler.step()
                self.optimizer.zero_grad()
                totals, tokens = totals + sums, tokens + count
                if epoch == number == 0:
                    first_ratio = float(sums[5]) / count
        if skipped == len(norms):
            raise FloatingPointError(
                f"PPO step {self.state.step + 1}: the gradient was not finite in all {skipped} optimizer steps; "
                "lower ppo.learning_rate, or set ppo.bf16: false"
            )
        self.state = replace(self.state, skipped_steps=self.state.skipped_steps + skipped)
        names = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/clipfrac_avg")
        means = dict(zip(names, (totals[:5] / tokens).tolist(), strict=True))
        return {
            **means,
            "val/ratio": float(totals[5] / tokens),
            "val/ratio_first": first_ratio,
            "policy/grad_norm": sum(norms) / len(norms),
            "policy/skipped_steps": float(self.state.skipped_steps),
            "lr": self.scheduler.get_last_lr()[0],
        }

    def _accumulate(self, mini_batch: Experience, count: int) -> Tensor:
        """Gradients of one mini-batch with `count` tokens over all processes; returns its global summed statistics."""
        args, sums = self.args, torch.zeros(6, device=self.accelerator.device)
        parts = mini_batch.micro_batches(args.per_device_train_batch_size)
        for number, part in enumerate(parts):
            with self._synchronised(last=number == len(parts) - 1), self.accelerator.autocast():
                outputs = self.model(part.sequences)
                terms = ppo_loss(
                    outputs.logprobs,
                    part.logprobs,
                    part.advantages,
                    outputs.values,
                    part.values,
                    part.returns,
                    part.sequences.completion_mask,
                    args.cliprange,
                    args.cliprange_value,
                )
                # DDP averages over processes, so their number turns its mean back into the sum.
                loss = (terms.policy + args.vf_coef * terms.value) * self.accelerator.num_processes / count
                self.accelerator.backward(loss)
            sums += _stack(terms)
        return self.accelerator.reduce(sums, reduction="sum").cpu()

    def _synchronised(self, last: bool) -> AbstractContextManager:
        """Exchange gradients between processes with the last micro-batch only."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def _rollout_statistics(self, rollout: Rollout, returns: Tensor, penalties: Tensor) -> dict[str, float]:
        sums = rollout_sums(rollout, returns, penalties).to(self.accelerator.device)
        sums = self.accelerator.reduce(sums, reduction="sum").tolist()
        return rollout_statistics(sums, [reward.name for reward in self.rewards])

    def evaluate(self) -> dict[str, float]:
        """Greedy answers to the held-out prompts: each reward, their weighted sum `eval_reward`, length, metrics."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rows = list(range(rank, len(self.eval_dataset), world))
        with self.accelerator.autocast():
            completions = self._generate([self._eval_prompt_ids[r] for r in rows], Decoding(self.args.response_length))
        texts = decode(self.tokenizer, completions)
        scores, rewards = self.score(self.eval_dataset.select(rows), texts, completions)
        ends = eos_token_ids(self.shared.causal_lm, self.tokenizer)
        finished = [ids[-1] in ends for ids in completions]
        parts = [{name: float(values[i]) for name, values in rewards.items()} for i in range(len(rows))]
        answers = zip(rows, texts, scores.tolist(), parts, map(len, completions), finished, strict=True)
        results = sorted(gather_object([Answer(*answer) for answer in answers]), key=lambda answer: answer.row)
        values = summarise_answers(results)
        if self.compute_metrics:
            metrics = self.compute_metrics([answer.text for answer in results], self.eval_dataset)
            values |= {f"eval_{name}": value for name, value in metrics.items()}
        return values

    def _log_evaluation(self, values: dict[str, float]) -> None:
        name = self.args.metric_for_best_model
        if name not in values:
            raise ValueError(f"ppo.metric_for_best_model: {name!r} is not one of {', '.join(values)}")
        self.log.write(self.state.step, values)
        figures = ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in values.items())
        self.log.say(f"step {self.state.step}: held-out {figures}")

    def _end_step(self, rollout: Rollout, stats: dict[str, float]) -> None:
        """Log, show a sample, evaluate and save, each when it is due."""
        args, total = self.args, self.num_steps
        step = self.state.step + 1
        self.state = replace(self.state, step=step)
        if step % args.logging_steps == 0 or step == total:
            self.log.write(step, {"episode": step * self.batch_size, **stats})
        self.log.advance(stats)
        if args.num_sample_generations and step % max(1, total // args.num_sample_generations) == 0:
            self.log.say(sample_line(step, rollout.prompts[0], rollout.completions[0], float(rollout.scores[0])))
        every = args.eval_steps or max(1, total // 10)
        evaluates = bool(self.eval_dataset) and (step % every == 0 or step == total)
        if evaluates:
            self._log_and_compare(self.evaluate())
        if (step % args.save_steps == 0 if args.save_steps else evaluates) or step in (total, self.state.best_step):
            self.save_checkpoint()

    def _log_and_compare(self, values: dict[str, float]) -> None:
        self._log_evaluation(values)
        name = self.args.metric_for_best_model
        sign, best = 1 if self.args.greater_is_better else -1, self.state.best_metric
        if best is None or sign * values[name] > sign * best:
            self.state = replace(self.state, best_metric=values[name], best_step=self.state.step)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current step; every process calls it, the main one writes."""
        states = self.optimizer.state_dict(), self.scheduler.state_dict(), gather_object([random_state()])
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


def _as_rewards(functions: Reward | Callable | Sequence[Reward | Callable]) -> list[Reward]:
    functions = functions if isinstance(functions, Sequence) else [functions]
    rewards = [f if isinstance(f, Reward) else Reward(getattr(f, "__name__", type(f).__name__), f) for f in functions]
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):  # they are logged by name
        raise ValueError(
            f"reward_funcs: each needs a name of its own, found {', '.join(names)}; use Reward(name, ...)"
        )
    return rewards


def _head(dataset: Dataset | None, rows: int | None) -> Dataset | None:
    return dataset.select(range(min(rows, len(dataset)))) if dataset and rows else dataset


def _use_bf16(args: PPOConfig) -> bool:
    if args.bf16 is None:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return args.bf16


def _stack(terms: LossTerms) -> Tensor:
    return (
        torch.stack(
            [terms.policy, terms.value, terms.approx_kl, terms.policy_clipped, terms.value_clipped, terms.ratio]
        )
        .detach()
        .float()
    )
