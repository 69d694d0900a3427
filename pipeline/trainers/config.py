"""PPO's settings: the `ppo:` section."""

from dataclasses import dataclass

from transformers import SchedulerType

from pipeline.rewards.config import RewardConfig

SCHEDULERS = tuple(
    s.value for s in SchedulerType if s.value in ("linear", "cosine", "constant", "constant_with_warmup")
)
KL_ESTIMATORS = ("k1", "k3")
REWARD_SHAPING = ("none", "prefix")


@dataclass(frozen=True)
class PPOConfig:
    """Names are those of TRL 1.12's `PPOConfig` and of `transformers.TrainingArguments` wherever one exists.

    One *episode* is one completion. Each step collects `batch_size` episodes and makes `num_ppo_epochs` passes of
    `num_mini_batches` optimizer steps over them. `eval_steps`, `save_steps` and `logging_steps` count these PPO steps.
    """

    rewards: tuple[RewardConfig, ...]
    sft_model_path: str | None = None  # None: this run's sft stage
    use_peft: bool = True
    total_episodes: int = 10_000
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 4
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    local_rollout_forward_batch_size: int = 128

    learning_rate: float = 1e-4
    value_learning_rate: float | None = None  # None: learning_rate
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-5  # the PPO reproductions' value: 1e-8 makes the first steps on tiny gradients too large
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    bf16: bool | None = None  # None: on accelerators that support it

    response_length: int = 53
    num_generations: int = 1  # completions of each prompt in a rollout
    group_baseline: bool = False  # subtract the mean score of the prompt's other completions from each score
    reward_shaping: str = "none"  # prefix: pay each token the change it makes to the score of the text so far
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = None

    logging_steps: int = 1
    eval_steps: int | None = None  # None: ten times a run
    eval_examples: int | None = None  # None: the whole validation split
    save_steps: int | None = None  # None: with every evaluation
    save_total_limit: int = 2  # one to fall back on when the newest turns out damaged
    num_sample_generations: int = 10
    metric_for_best_model: str = "eval_reward"
    greater_is_better: bool = True
    load_best_model_at_end: bool = True
    report_to: tuple[str, ...] = ()
    run_name: str | None = None

    def __post_init__(self) -> None:
        positive = (
            "total_episodes per_device_train_batch_size gradient_accumulation_steps num_ppo_epochs num_mini_batches "
            "local_rollout_forward_batch_size num_generations response_length logging_steps save_total_limit"
        )
        for name in positive.split():
            _require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        for name in ("eval_steps", "eval_examples", "save_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "must be at least 1", value)
        for name in ("learning_rate", "temperature", "max_grad_norm", "adam_epsilon", "cliprange", "cliprange_value"):
            _require(getattr(self, name) > 0, name, "must be above 0", getattr(self, name))
        _require(
            self.value_learning_rate is None or self.value_learning_rate > 0,
            "value_learning_rate",
            "must be above 0",
            self.value_learning_rate,
        )
        for name in ("kl_coef", "vf_coef", "weight_decay", "top_k", "warmup_steps", "num_sample_generations"):
            _require(getattr(self, name) >= 0, name, "must not be negative", getattr(self, name))
        _require(0 < self.top_p <= 1, "top_p", "must be in (0, 1]", self.top_p)
        for name in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, name, "must be in [0, 1)", getattr(self, name))
        for name in ("gamma", "lam"):
            _require(0 <= getattr(self, name) <= 1, name, "must be in [0, 1]", getattr(self, name))
        _require(
            self.kl_estimator in KL_ESTIMATORS, "kl_estimator", f"must be one of {KL_ESTIMATORS}", self.kl_estimator
        )
        _require(
            self.reward_shaping in REWARD_SHAPING,
            "reward_shaping",
            f"must be one of {REWARD_SHAPING}",
            self.reward_shaping,
        )
        _require(
            self.lr_scheduler_type in SCHEDULERS,
            "lr_scheduler_type",
            f"must be one of {SCHEDULERS}",
            self.lr_scheduler_type,
        )
        _require(
            self.warmup_steps == 0 or self.lr_scheduler_type != "constant",
            "warmup_steps",
            "does nothing with lr_scheduler_type constant; use constant_with_warmup",
            self.warmup_steps,
        )
        _require(
            self.gradient_accumulation_steps % self.num_mini_batches == 0,
            "num_mini_batches",
            f"must divide gradient_accumulation_steps ({self.gradient_accumulation_steps})",
            self.num_mini_batches,
        )
        _require(
            self.per_device_train_batch_size * self.gradient_accumulation_steps % self.num_generations == 0,
            "num_generations",
            "must divide per_device_train_batch_size x gradient_accumulation_steps "
            f"({self.per_device_train_batch_size * self.gradient_accumulation_steps})",
            self.num_generations,
        )
        _require(
            not self.group_baseline or self.num_generations >= 2,
            "group_baseline",
            "needs num_generations of at least 2",
            self.num_generations,
        )
        _require(bool(self.rewards), "rewards", "at least one reward is needed, such as [{name: bleu}]", "none")

    def batch_size(self, num_processes: int) -> int:
        """Episodes of one rollout over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes

    def num_steps(self, num_processes: int) -> int:
        """PPO steps (rollouts) of the run: the last one starts before `total_episodes` is reached."""
        return -(-self.total_episodes // self.batch_size(num_processes))

    def num_optimizer_steps(self, num_processes: int) -> int:
        """Optimizer steps of the run."""
        return self.num_steps(num_processes) * self.num_ppo_epochs * self.num_mini_batches


def _require(holds: bool, name: str, rule: str, found: object) -> None:
    if not holds:
        raise ValueError(f"ppo.{name}: {rule}, found {found!r}")
