"""Proximal policy optimisation of a language model on `accelerate`: roll out, estimate advantages, update, log."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.rewards import Reward, RewardOutputs, check_rewards
from pipeline.rewards.models import RewardSource, RewardTokenizers, load_rewards
from pipeline.rewards.rows import compute_row_rewards, count_failures
from pipeline.runtime.seeds import derive_seed
from pipeline.runtime.signals import Stopped, requested_stop
from pipeline.runtime.watchdog import enter, watched
from pipeline.trainers.ppo.advantages import estimate_advantages, next_kl_coef
from pipeline.trainers.ppo.checkpoint import TrainerState, restore_best, restore_training, save_policy, save_training
from pipeline.trainers.ppo.checks import check_inputs, check_kl, check_start, first_examples
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.dynamic_sampling import Answers, resample
from pipeline.trainers.ppo.experiment import describe_experiment
from pipeline.trainers.ppo.held_out import ComputeMetrics, HeldOutEvaluator
from pipeline.trainers.ppo.inputs import EvalData, load_start, training_examples
from pipeline.trainers.ppo.learner import Learner
from pipeline.trainers.ppo.reference_texts import encode_references
from pipeline.trainers.ppo.reward_scales import fit_scales, scale_rewards, share_sentences, variance_shares, weights_at
from pipeline.trainers.ppo.rollout import CompletionWriter, Experience, Rollout, local_positions, prompt_order
from pipeline.trainers.ppo.scores import prefix_scores, process_scores
from pipeline.trainers.ppo.setup import build_shared_model, make_accelerator, open_log, settle
from pipeline.trainers.ppo.statistics import rollout_statistics, sample_rows
from pipeline.trainers.ppo.trl_arguments import refuse_trainer_arguments


class PPOTrainer:
    """PPO with one base model in every role. Constructor names are TRL's; the package's docstring says what is not.

    Args:
        model: The SFT policy: a causal or encoder-decoder model, a PeftModel (merged), or a directory or Hub id.
        args: The settings; None: the defaults.
        processing_class: The tokenizer of `model`; None: the one in its directory.
        reward_funcs: Functions with TRL's GRPO signature, `Reward`s, which add a name and a weight, or classifiers.
        train_dataset: A column `prompt` (text or chat messages); other columns reach the rewards by name.
        eval_dataset: Held-out prompts, or sets of them by name; None: no evaluation, and the last policy is kept.
        peft_config: The policy's LoRA adapter; it counts where `args.use_peft` is set.
        output_dir: Where metrics.jsonl, samples.jsonl and checkpoints/ are written.
        seed: From 0 on; prompts, samples and mini-batches follow from it.
        compute_metrics: Metrics of all held-out completions by name, logged as `eval_<name>`.
        strip_thoughts: Rewards and metrics do not see a `<think>...</think>` at the start of a completion.
        reward_processing_classes: Tokenizers of the classifiers, as in TRL; None: those in their directories.

    Raises:
        ValueError: an input that PPO cannot work with, or a first step that would not start at ratio 1 and KL 0.
        RewardError: a reward function fails on the first two examples.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str | Path,
        args: PPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_funcs: RewardSource | Sequence[RewardSource] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalData | None = None,
        peft_config: LoraConfig | None = None,
        output_dir: str | Path = "ppo",
        seed: int = 0,
        compute_metrics: ComputeMetrics | None = None,
        strip_thoughts: bool = False,
        reward_processing_classes: RewardTokenizers = None,
        **unsupported: object,
    ) -> None:
        refuse_trainer_arguments(args, unsupported)
        args = PPOConfig() if args is None else args
        self.seed, self.output_dir, self.checkpoints = seed, Path(output_dir), Path(output_dir) / "checkpoints"
        self.accelerator = make_accelerator(args, self.output_dir)
        start = load_start(model, processing_class, peft_config, args, self.output_dir)
        self.tokenizer, adapter = start.tokenizer, start.peft_config
        self.train_dataset = training_examples(train_dataset, args, self.accelerator.num_processes)
        self.args = args = settle(args, start, self.train_dataset)
        classes = (reward_processing_classes, start.tokenizer, self.accelerator.device)
        self.rewards = load_rewards(reward_funcs, *classes, args.chat_template_kwargs)
        set_seed(seed)  # python, numpy and torch, before the adapter is initialised
        check_inputs(start.model, self.tokenizer, self.train_dataset, self.rewards, args.suppress_tokens)
        self.experiment = describe_experiment(start.model, args, self.rewards, self.train_dataset, adapter, seed)
        shared = build_shared_model(start.model, args, adapter, self.rewards)
        self.learner = learner = Learner(shared, args, self.accelerator, self._warn)
        self.shared, self.optimizer, self.gathered = learner.shared, learner.optimizer, learner.sharding.gathered
        given = (self.shared, self.tokenizer, self.accelerator, args.local_rollout_forward_batch_size, self._warn)
        self.writer = CompletionWriter(*given, strip_thoughts, self.gathered)
        self._prompt_ids = self.writer.encode(self.train_dataset)
        self._references = encode_references(args, self.train_dataset, self._prompt_ids, self.tokenizer, start.model)
        self.evaluator = HeldOutEvaluator(self.writer, args, seed, compute_metrics)
        self.held_out = self.evaluator.encode(eval_dataset)
        self._prompt_at = prompt_order(len(self.train_dataset), seed)
        with self.gathered():
            check_rewards(self.rewards, first_examples(self.train_dataset), args.reward_handling)
            check_start(self.shared, self.tokenizer, self._prompt_ids, args.response_length, self.accelerator)
        self.state = self._origin = TrainerState()  # the latter: from which this number of processes counts on

    @property
    def batch_size(self) -> int:
        """Episodes of one PPO step over all processes."""
        return self.args.batch_size(self.accelerator.num_processes)

    @property
    def num_steps(self) -> int:
        """PPO steps of the whole run, those included that another number of processes may have made."""
        return self._origin.total_steps(self.args, self.accelerator.num_processes)

    @property
    def kl_coef(self) -> float:
        """The KL coefficient of this step."""
        return self.args.kl_coef if self.state.kl_coef is None else self.state.kl_coef

    @property
    def scaled_rewards(self) -> list[Reward]:
        """The rewards with their weights in this step, which undo the deviations of those that are scaled."""
        return scale_rewards(weights_at(self.rewards, self.state.episodes), self.state.reward_deviations)

    def train(self, resume_from_checkpoint: bool | None = None) -> TrainerState:
        """Run all PPO steps; the model ends as the best policy.

        None goes on with an unfinished run of the same settings and rewards, and refuses a folder with other
        checkpoints; True goes on with other settings too; False removes the checkpoints.
        """
        self._start(resume_from_checkpoint)
        are_scaled = any(reward.score_scaling == "reference" for reward in self.rewards)  # by the first rollout
        with watched(self.checkpoints):
            while self.state.step < self.num_steps:
                if self.state.step == 0 and self.held_out and not are_scaled:
                    self._evaluate_and_compare()
                rollout = self.collect_rollout(self.prompt_rows(self.state.step))
                if self.state.step == 0 and self.held_out and are_scaled:
                    self._evaluate_and_compare()
                experience, stats = self.compute_advantages(rollout)
                stats |= self.update(experience)
                self._end_step(rollout, stats)
        if self.args.load_best_model_at_end and self.state.best_metric is not None:
            self.log.say(restore_best(self.checkpoints, self.state, self.shared, self.args.metric_for_best_model))
        self.log.close()
        return self.state

    def prompt_rows(self, step: int) -> list[int]:
        """Which training rows this process answers in a step. Data smaller than a batch is passed several times."""
        done = self._origin.episodes + (step - self._origin.step) * self.batch_size
        positions = local_positions(done, self.batch_size, self.args.num_generations, self.accelerator)
        return [self._prompt_at(position) for position in positions]

    def collect_rollout(self, rows: Sequence[int]) -> Rollout:
        """Answer the prompts of the training `rows` with the current policy and score the answers; no gradient."""
        self.learner.follow_schedules(self.state.episodes)
        seed, rank = derive_seed(self.seed, "rollout", self.state.step), self.accelerator.process_index
        with self.gathered():
            answers = resample(self._answer(rows, seed), self._answer, self.args, seed, rank)
        completions, rewards, examples = answers.completions, answers.rewards, answers.examples
        if self.state.step == 0:
            deviations, rewards = fit_scales(weights_at(self.rewards, self.state.episodes), rewards, self.accelerator)
            self.state = replace(self.state, reward_deviations=deviations)
        if self.args.reward_shaping == "prefix":
            with self.gathered():
                given = (completions, examples, self.writer.decode, self.compute_rewards)
                rewards, token_scores = prefix_scores(rewards, *given)
        else:
            token_scores = rewards.token_scores(self.scaled_rewards, completions.lengths)
        seen = self.state.score_moments
        scores = process_scores(rewards, token_scores, completions, seen, self.args, self.accelerator, seed)
        tokens = ([self._prompt_ids[row] for row in answers.rows], completions.ids, self.tokenizer.pad_token_id)
        sequences, outputs = answers.passes or self.learner.forward(*tokens)
        episodes = (examples["prompt"], completions.texts, completions.finished, sequences)
        return Rollout(*episodes, **vars(outputs), rewards=rewards.by_name, **vars(scores), log=rewards.log)

    def _answer(self, rows: Sequence[int], seed: int) -> Answers:
        args, step, passes = self.args, self.state.step + 1, []
        enter(f"the completions of PPO step {step}")
        prompt_ids, sampling = [self._prompt_ids[row] for row in rows], args.sampling_at(self.state.episodes)
        completions = self.writer.write(prompt_ids, sampling, seed)
        enter(f"the rewards of PPO step {step}")
        given = (self.train_dataset.select(rows), completions.texts, completions.ids)
        tokens = (prompt_ids, completions.ids, self.tokenizer.pad_token_id)
        waits = args.dynamic_sampling_rounds or args.reward_shaping == "prefix" or self.learner.sharding.roots
        meanwhile = None if waits else lambda: passes.append(self.learner.forward(*tokens))
        rewards = self.compute_rewards(*given, meanwhile=meanwhile)
        enter(f"the log-probabilities of PPO step {step}")  # before the processes wait for each other's scores
        return Answers(self.train_dataset, rows, completions, rewards, *passes)

    def compute_rewards(
        self,
        examples: Dataset,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        rewards: Sequence[Reward] | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> RewardOutputs:
        """Call the reward functions on completions to `examples`, with the weights of this step or of `rewards`."""
        rewards, handling = rewards or self.scaled_rewards, self.args.reward_handling
        state = self.state.for_rewards(self.args, self.num_steps, len(self.train_dataset))
        return compute_row_rewards(rewards, examples, completions, completion_ids, handling, state, meanwhile)

    def compute_advantages(self, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
        """Turn scores and KL into an advantage and a return for each token, and the statistics of the rollout.

        Raises:
            RewardError: not one completion of the step has a score.
            FloatingPointError: the KL to the reference is beyond `max_kl`.
        """
        args, step = self.args, self.state.step + 1
        experience, penalty = estimate_advantages(rollout, self.kl_coef, args, self.accelerator)
        if rollout.failures:
            self._warn(count_failures(rollout.failures, args.on_reward_error))
        stats = rollout_statistics(rollout, experience.returns, penalty, args.num_generations, step, self.accelerator)
        stats |= variance_shares(self.scaled_rewards, rollout.rewards, rollout.scored, self.accelerator)
        limit = args.max_kl if stats["objective/length"] > 0 else None  # NaN where no completion has a score
        check_kl(stats["objective/kl"], limit, step, self.state.best_step)
        return experience, stats | {"objective/kl_coef": self.kl_coef}

    def update(self, experience: Experience) -> dict[str, float]:
        """Make `num_ppo_epochs` passes of `num_mini_batches` optimizer steps over the experience.

        Raises:
            FloatingPointError: the gradients of `max_skipped_steps` optimizer steps in a row were not finite.
        """
        enter(f"the update of PPO step {self.state.step + 1}")
        state, step, is_warm_up = self.state, self.state.step, self.state.step < self.args.value_warmup_steps
        seed = derive_seed(self.seed, "mini-batches", step, self.accelerator.process_index)
        rows = self.prompt_rows(step)[:: self.args.num_generations]
        references = self._references and self._references.sequences(rows, self.accelerator.device)
        try:
            update = self.learner.update(experience, seed, is_warm_up, state.skipped_in_row, references)
        except FloatingPointError as error:
            raise FloatingPointError(f"PPO step {step + 1}, {error}") from error
        for note in update.notes if self.accelerator.is_main_process else ():
            tqdm.write(f"step {step + 1}, {note}", file=sys.stderr)
        skipped = state.skipped_steps + len(update.notes)
        self.state = replace(state, skipped_steps=skipped, skipped_in_row=update.skipped_in_row)
        return update.stats | {"policy/skipped_steps": float(skipped)}

    def advance(self, rollout: Rollout, stats: dict[str, float]) -> None:
        """Count the step, and move what adapts with it: the KL coefficient and the moments of the scores."""
        kl_coef = next_kl_coef(self.args, self.kl_coef, stats["objective/kl"], self.batch_size)
        self.state = self.state.advanced(self.batch_size, rollout.moments, kl_coef)
        self.learner.after_step(self.state.step)

    def evaluate(self, eval_dataset: EvalData | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Answer the held-out prompts, or others: each reward, their weighted sum `eval_reward`, length, metrics."""
        enter(f"the evaluation after PPO step {self.state.step}")
        self.learner.drop_graph()
        rewards = scale_rewards(self.rewards, self.state.reward_deviations)  # of all evaluations the last weights
        held_out = self.held_out if eval_dataset is None else self.evaluator.encode(eval_dataset)
        return self.evaluator.figures(held_out, lambda *rows: self.compute_rewards(*rows, rewards), metric_key_prefix)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current step; every process calls it, the main one writes."""
        enter(f"the checkpoint after PPO step {self.state.step}")
        save_training(self.checkpoints, self.state, self.learner)

    def save_model(self, directory: str | Path | None = None) -> None:
        """Save the policy (a peft adapter, or a whole model), the value head and what makes the inputs."""
        save_policy(Path(directory) if directory else self.output_dir, self.shared, self.tokenizer)

    def _start(self, resume: bool | None) -> None:
        """Go on from the newest checkpoint if there is one, and open the log."""
        given = (self.state, self.learner, self.seed, resume, self.experiment)
        self.state, notes = restore_training(self.checkpoints, *given)
        self._origin = self.state
        self.log = open_log(self.accelerator, self.output_dir, self.num_steps, self.state.step, self.args)
        self.log.say(*notes)

    def _end_step(self, rollout: Rollout, stats: dict[str, float]) -> None:
        """Log, evaluate and save, each when it is due, and stop where a signal asks for it."""
        self.advance(rollout, stats)
        args, last, step = self.args, self.num_steps, self.state.step
        self.log.say(*(share_sentences(stats) if step == 1 else ()))
        self.log.end_step(step, self.state.episodes, stats, sample_rows(rollout))
        due = bool(self.held_out) and (step % (args.eval_steps or max(1, last // 10)) == 0 or step == last)
        if due:
            self._evaluate_and_compare()
        saves = (step % args.save_steps == 0 if args.save_steps else due) or step in (last, self.state.best_step)
        if saves:
            self.save_checkpoint()
        if number := requested_stop():
            if not saves:
                self.save_checkpoint()
            self.log.close()
            raise Stopped(number, step)

    def _evaluate_and_compare(self) -> None:
        values = self.evaluate()
        self.state = self.state.compared(values, self.args.metric_for_best_model, self.args.greater_is_better)
        self.log.end_evaluation(self.state.step, values)

    def _warn(self, text: str) -> None:
        """Say something about this step on the process that it is about."""
        process = f"process {self.accelerator.process_index}: " if self.accelerator.num_processes > 1 else ""
        tqdm.write(f"step {self.state.step + 1}: {process}{text}", file=sys.stderr)
