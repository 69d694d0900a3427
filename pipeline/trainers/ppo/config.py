"""PPO's settings: the `ppo:` section."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from transformers import SchedulerType

from pipeline.models.generation import Decoding
from pipeline.rewards.config import RewardConfig
from pipeline.rewards.results import ON_ERROR, Handling
from pipeline.runtime.messages import did_you_mean, yaml_text
from pipeline.runtime.schedules import Schedule, value_at
from pipeline.trainers.ppo.algorithms import ALGORITHMS, expand_algorithm
from pipeline.trainers.ppo.config_checks import check_combinations, check_sizes
from pipeline.trainers.ppo.generation_kwargs import sampling_keys
from pipeline.trainers.ppo.ranges import check_ranges
from pipeline.trainers.ppo.trl_arguments import refuse_config_arguments

SCHEDULERS = tuple(
    s.value for s in SchedulerType if s.value in ("linear", "cosine", "constant", "constant_with_warmup")
)
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_PLACEMENTS = ("reward", "score", "loss")
SCALE_REWARDS = ("batch", "group", "none")
LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "sum")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "completion")
REWARD_SHAPING = ("none", "prefix")
SCORE_SCALING = ("none", "running", "reference")
VALUE_MODELS = ("head", "adapter", "reward_model")
LEARNED = "learned"


@dataclass(frozen=True)
class PPOConfig:
    """Names are those of TRL 1.12's `PPOConfig` and of `transformers.TrainingArguments` wherever one exists.

    One *episode* is one completion. Each step collects `batch_size` episodes and makes `num_ppo_epochs` passes of
    `num_mini_batches` optimizer steps over them. `eval_steps`, `save_steps` and `logging_steps` count these PPO steps.
    """

    rewards: tuple[RewardConfig, ...] = ()  # what PPO raises: a list of names or mappings; a recipe needs one
    # ppo, rloo, grpo, dr_grpo, dapo, reinforce or reinforce++: sets other keys, which the plan shows; None: as written
    algorithm: str | None = None
    # directory or Hub id to start from, full, merged or a peft adapter; None: this run's sft stage
    sft_model_path: str | None = None
    # of the reward `learned`: a reward folder or a sequence classifier; None: this run's reward stage
    reward_model_path: str | None = None
    use_peft: bool = True  # as model.use_peft; false trains all weights, with a frozen copy as reference
    total_episodes: int = 10_000  # completions of the whole run
    max_steps: int | None = None  # PPO steps of the whole run, instead of total_episodes
    # episodes of a micro-batch: a matter of memory, not of the result; halved where memory runs out. One accelerator
    # begins with a whole mini-batch instead
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 4  # times the above = 128 episodes a rollout, the least that public recipes use
    num_ppo_epochs: int = 1  # passes over a rollout, as in OpenRLHF and verl; more than 2 need target_kl
    num_mini_batches: int = 1  # optimizer steps of a pass; one is what the language-model reproductions use
    local_rollout_forward_batch_size: int = 128  # prompts answered at once; halved where memory runs out

    # of the policy; None: 3e-5 for LoRA (verl's example; TRL has 1e-5 and 5e-5), 1e-6 for all weights (OpenRLHF, verl)
    learning_rate: float | None = None
    # of the value function; None: ten times that of the policy (verl; OpenRLHF: nine times)
    value_learning_rate: float | None = None
    # head reads the policy's last hidden states; adapter has a LoRA of its own, at a second pass; reward_model is an
    # adapter that starts, with its head, as a copy of the reward `learned` (InstructGPT)
    value_model: str = "head"
    value_warmup_steps: int = 0  # PPO steps in which only the value function learns
    lr_scheduler_type: str = "linear"  # over optimizer steps, the same for any number of processes
    warmup_steps: int = 0  # optimizer steps in which the learning rate rises
    adam_beta1: float = 0.9  # AdamW
    adam_beta2: float = 0.999  # AdamW
    adam_epsilon: float = 1e-8  # as in TRL, OpenRLHF and verl; 1e-5 is near the gradients of a large LoRA
    weight_decay: float = 0.0  # none: it would pull the policy away from the reference
    max_grad_norm: float = 1.0  # gradient clipping
    # compute layers again in the backward pass: less memory, more time, the same bits
    gradient_checkpointing: bool = False
    # passes over real tokens only, and over a prompt once for all its completions; TRL's name in SFTConfig
    padding_free: bool = True
    # autocast; None: where the machine has instructions for it. A CPU that emulates it is far slower than in float32
    bf16: bool | None = None

    # most tokens of a completion; None: what holds 99 % of the references of PPO's rows, a multiple of 8
    response_length: int | None = None
    num_generations: int = 1  # completions of each prompt in a rollout
    # subtract the mean score of the prompt's other completions from each score; mean: of all its completions
    group_baseline: bool | Literal["mean"] = False
    # rounds in which prompts whose completions all score the same make room for others (DAPO); 0: off
    dynamic_sampling_rounds: int = 0
    reward_shaping: str = "none"  # prefix rewards each token by what it adds to the score of the text so far
    # divides the logits of sampling, policy and reference alike; a number, or [episodes, value] points with straight
    # lines between them
    temperature: Schedule = 1.0
    top_k: int = 0  # 0: off, the raw policy
    top_p: float = 1.0  # 1: off, the raw policy
    # 0: off, the raw policy; no token below this share of the likeliest one's probability is drawn
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # 1: off, the raw policy; of samples alone, over prompt and completion
    min_new_tokens: int = 0  # no EOS before so many tokens
    # a completion ends after the first of them, as it does with EOS; held-out and test completions too
    stop_strings: tuple[str, ...] = ()
    # ids of tokens that have probability 0 under policy and reference; held-out and test completions too
    suppress_tokens: tuple[int, ...] = ()
    # these keys of sampling under the names of transformers' GenerationConfig; it goes before the keys above
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # of PPOTrainer alone: variables of the chat template; in a recipe write model.chat_template_kwargs
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    kl_coef: float = 0.05  # weight of a nat of KL, as in TRL: for scores with a deviation of 1 (score_scaling)
    kl_estimator: str = "k1"  # k1 with kl_placement reward or score; k3 (times the ratio, as in TRL) or k2 with loss
    # reward: in the token reward; score: of the whole completion, in its score; loss: a term of the loss
    kl_placement: str = "reward"
    # nats per episode: kl_coef follows it by at most 20 % per horizon (Ziegler et al. 2019)
    kl_target: float | None = None
    kl_horizon: int = 10_000  # episodes of that adaptation
    # nats per token: the passes over a rollout end where the policy moved beyond 1.5 times it
    target_kl: float | None = None
    # every ref_model_sync_steps PPO steps the reference becomes ref_model_mixup_alpha x policy + the rest x itself
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6  # TRL's value; 1: the policy as it is then
    ref_model_sync_steps: int = 512  # PPO steps; TRL counts optimizer steps
    cliprange: float = 0.2  # ratios within 1 - it and 1 + it
    cliprange_high: float | None = None  # an upper clip of its own; None: cliprange
    # of which the ratio is: a token; sequence, the mean of its log ratios (GSPO); completion, their sum (RLOO)
    importance_sampling_level: str = "token"
    # dapo: mean over all tokens; grpo: over tokens, then completions; dr_grpo: sum / response_length, mean over
    # completions; sum: the sum over tokens, mean over completions
    loss_type: str = "dapo"
    # learn nothing from a completion that did not end; its score still counts in the baseline
    mask_truncated_completions: bool = False
    dual_clip: float | None = 3.0  # largest ratio that counts where the advantage is negative, as in verl; None: any
    # entropy bonus; language models rarely need one; a number, or [episodes, value] points as for temperature
    entropy_coef: Schedule = 0.0
    ptx_coef: float = 0.0  # weight of the SFT loss on the references of the prompts, mixed in (InstructGPT); 0: off
    # weight of the value loss; 0: no value function; None: 0.1 as in TRL, but 0 with group_baseline, as RLOO has it
    vf_coef: float | None = None
    cliprange_value: float = 0.2  # absolute: rewards should be of order 1
    gamma: float = 1.0  # generalised advantage estimation; texts are short, nothing is discounted
    # generalised advantage estimation: 1, as in OpenRLHF and verl, is the whole return, 0 one step; with 0.95 and a
    # value function that starts at 0 the first of 256 tokens would see 2e-6 of the score
    lam: float = 1.0
    # lam of the returns that the value function learns (VC-PPO: 1, with a lower lam for the policy); None: lam
    value_lam: float | None = None
    whiten_rewards: bool = False  # unit variance of token rewards, over all processes
    # batch: advantages get mean 0 and unit variance, over all processes; group: scores are divided by the deviation
    # of the prompt's scores; none
    scale_rewards: str = "batch"
    # divide scores by the standard deviation of all so far (running) or of the first rollout (reference), so that
    # kl_coef, cliprange_value and missing_eos_penalty mean the same for any reward
    score_scaling: str = "running"
    score_clip: float | None = None  # scores stay within +- this, after scaling
    missing_eos_penalty: float | None = 1.0  # subtracted from the scaled score of a completion that did not end
    # the score falls over the last so many tokens of response_length, by 1 at its end (DAPO); TRL's name; None: off
    soft_punish_cache: int | None = None
    missing_eos_score: float | None = None  # replaces that score instead, such as -1 (Huang et al. 2024)
    # a control run: scores change places within the rollout, so that they say nothing and all else is as in PPO
    shuffle_scores: bool = False
    # stop the run, skip the completion, or count 0 for the function; a broken one should not go unnoticed
    on_reward_error: str = "stop"
    reward_timeout: float | None = None  # seconds one call of a reward function may take; metrics need none
    # nats per episode from the reference: beyond it the run stops; the checkpoints before it stay
    max_kl: float | None = None
    max_skipped_steps: int = 4  # optimizer steps in a row with a loss or gradient that is not finite end the run

    logging_steps: int = 1  # PPO steps between lines of metrics.jsonl
    # PPO steps between evaluations on held-out prompts; None: ten times a run. Always before the first step
    eval_steps: int | None = None
    eval_examples: int | None = None  # held-out prompts; None: the whole validation split
    # completions of each held-out prompt: 1 is greedy, more are samples at the settings of a rollout, averaged
    num_generations_eval: int = 1
    save_steps: int | None = None  # PPO steps between checkpoints; None: with every evaluation
    save_total_limit: int = 2  # checkpoints kept beside the best; a damaged one needs the one before
    num_sample_generations: int = 10  # samples shown during a run
    metric_for_best_model: str = "eval_reward"  # which checkpoint is kept as the result
    greater_is_better: bool = True  # of that metric
    # end as the best policy, not the last; where no step was better than step 0, that is the SFT model
    load_best_model_at_end: bool = True
    report_to: tuple[str, ...] = ()  # trackers, as in TRL
    run_name: str | None = None  # the name of the run for trackers

    _written: ClassVar[frozenset[str]] = frozenset()  # the fields that this object was called with

    def __new__(cls, *args: Any, **settings: Any) -> "PPOConfig":
        """Note which settings are written: `algorithm` sets the others."""
        config = super().__new__(cls)
        names = [field.name for field in fields(cls)]
        refuse_config_arguments(settings, names)
        object.__setattr__(config, "_written", frozenset([*names[: len(args)], *settings]))
        return config

    def __post_init__(self) -> None:
        for name, value in sampling_keys(self.generation_kwargs).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "generation_kwargs", {})
        if self.algorithm in ALGORITHMS:
            self._expand()
        check_ranges(self)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            texts = [choice for choice in choices if isinstance(choice, str)]
            hint = did_you_mean(value, texts) if isinstance(value, str) else ""
            names = ", ".join(yaml_text(choice, quotes=False) for choice in choices if choice is not None)
            if value not in choices:
                raise ValueError(f"ppo.{name}: must be one of {names}, found {yaml_text(value)}{hint}")
        check_sizes(self)
        check_combinations(self)

    def _expand(self) -> None:
        """Set the keys of `algorithm`. An object that is made without a call, from a recipe, has them already."""
        written = self._written if "algorithm" in self._written else [field.name for field in fields(self)]
        keys = expand_algorithm(self.algorithm, {name: getattr(self, name) for name in written})
        for name, value in keys.items():
            object.__setattr__(self, name, value)

    @property
    def learned_reward(self) -> RewardConfig | None:
        """The line of `rewards` that is a learned reward, if there is one."""
        return next((reward for reward in self.rewards if reward.name == LEARNED), None)

    @property
    def policy_learning_rate(self) -> float:
        """The learning rate of the policy, by what is trained."""
        return self.learning_rate or (3e-5 if self.use_peft else 1e-6)

    @property
    def value_function_learning_rate(self) -> float:
        """The learning rate of the value function."""
        return self.value_learning_rate or 10 * self.policy_learning_rate

    @property
    def value_loss_weight(self) -> float:
        """The weight of the value loss; 0 where there is no value function."""
        return self.vf_coef if self.vf_coef is not None else 0.0 if self.group_baseline else 0.1

    @property
    def sampling(self) -> Decoding:
        """How the first rollout is written."""
        return self.sampling_at(0)

    def sampling_at(self, episodes: int) -> Decoding:
        """Return how a rollout is written after so many episodes."""
        return replace(
            self.greedy,
            temperature=value_at(self.temperature, episodes),
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    @property
    def greedy(self) -> Decoding:
        """How held-out prompts are answered."""
        return Decoding(
            self.response_length,
            min_new_tokens=self.min_new_tokens,
            stop_strings=self.stop_strings,
            suppress_tokens=self.suppress_tokens,
        )

    @property
    def reward_handling(self) -> Handling:
        """What is done about rewards that fail."""
        return Handling(self.on_reward_error, self.reward_timeout)

    def batch_size(self, num_processes: int) -> int:
        """Episodes of one rollout over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes

    def num_steps(self, num_processes: int) -> int:
        """PPO steps (rollouts) of the run: `max_steps`, or the last one starts before `total_episodes` is reached."""
        return self.max_steps or -(-self.total_episodes // self.batch_size(num_processes))

    def num_optimizer_steps(self, num_processes: int) -> int:
        """Optimizer steps of the run."""
        return self.num_steps(num_processes) * self.num_ppo_epochs * self.num_mini_batches


CHOICES = {
    "algorithm": (None, *ALGORITHMS),
    "group_baseline": (False, True, "mean"),
    "scale_rewards": SCALE_REWARDS,
    "loss_type": LOSS_TYPES,
    "importance_sampling_level": IMPORTANCE_SAMPLING_LEVELS,
    "lr_scheduler_type": SCHEDULERS,
    "kl_estimator": KL_ESTIMATORS,
    "kl_placement": KL_PLACEMENTS,
    "reward_shaping": REWARD_SHAPING,
    "score_scaling": SCORE_SCALING,
    "value_model": VALUE_MODELS,
    "on_reward_error": ON_ERROR,
}
