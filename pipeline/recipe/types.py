"""What a recipe is once it is read: one dataclass for the whole, and one for each section that has no package."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.evaluation.config import AUTO, SFT_BY_METRIC, EvalConfig
from pipeline.models.config import ModelConfig
from pipeline.recipe.document import Document
from pipeline.rewards.best_of_n import BestOfNSettings
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.tasks import columns, parallel, preferences
from pipeline.tasks.augment import AugmentConfig
from pipeline.tasks.types import TaskConfig
from pipeline.trainers.ppo.config import PPOConfig

MAX_SEED = 2**32 - 1
MAX_NAME = 100  # characters; a file system takes 255 bytes, and stages that are set aside add to it

PairSource = SampledPairs | preferences.Config


@dataclass(frozen=True)
class TaskSection:
    """Hold the `task:` section: a kind of task and an instance of `task_module(name).Config`."""

    name: str
    config: TaskConfig


@dataclass(frozen=True)
class SFTSection:
    """Hold the `sft:` section: whether an adapter is trained, and keyword arguments of `trl.SFTConfig` as written.

    With `best_of_n` it learns the best samples of the model that it starts from, in place of the data's completions.
    It is not `needed` where the recipe lacks the section and nothing in it reads an SFT model.
    """

    use_peft: bool
    arguments: Mapping[str, Any]
    needed: bool = True
    best_of_n: BestOfNSettings | None = None


@dataclass(frozen=True)
class RewardSection:
    """Hold the `reward:` section.

    With `model` None an adapter and a head are trained on the SFT model. A path or Hub id of a sequence classifier is
    calibrated and measured without training. Where the pairs have margins, the loss asks for a difference of scores in
    proportion to them, `margin_weight` on average; 0 ignores the margins. PPO refuses a reward model if the 95 %
    interval of its held-out accuracy begins below `min_accuracy`. `arguments` are keyword arguments of
    `trl.RewardConfig` as written.
    """

    pairs: PairSource
    model: str | None = None
    min_accuracy: float = 0.55
    margin_weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.min_accuracy <= 1:
            raise ValueError(f"reward.min_accuracy: must be from 0 to 1, found {self.min_accuracy}")
        if not 0 <= self.margin_weight < math.inf:
            raise ValueError(f"reward.margin_weight: must not be negative, found {self.margin_weight}")

    @property
    def batch_size(self) -> int:
        """Return how many texts are scored at once for the report."""
        return int(self.arguments.get("per_device_eval_batch_size", 64))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hold everything one experiment depends on; no value is left to be derived from another section.

    With `control` PPO runs once more with shuffled scores, and the report compares PPO with that.
    """

    name: str
    seed: int = 0
    output_dir: str = "runs"
    control: bool = False
    model: ModelConfig
    task: TaskSection
    sft: SFTSection
    reward: RewardSection | None = None
    ppo: PPOConfig | None = None
    eval: EvalConfig = field(default_factory=EvalConfig)
    source: Document | None = field(default=None, compare=False, repr=False)  # where it was written, for messages

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                f"name: {self.name!r} names a directory: use letters, digits, '.', '_' and '-', "
                "starting with a letter, digit or '_'"
            )
        if len(self.name) > MAX_NAME:
            raise ValueError(f"name: at most {MAX_NAME} characters, found {len(self.name)}")
        if "\0" in self.output_dir:
            raise ValueError(f"output_dir: a path cannot hold a NUL character, found {self.output_dir!r}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed: must be from 0 to {MAX_SEED}, found {self.seed}")
        if self.control:
            self._check_control()
        if self.eval.baselines:
            self._check_baselines()
        if self.sft.best_of_n is not None:
            self._check_best_of_n()

    def _check_control(self) -> None:
        if self.ppo is None:
            raise ValueError("control: true runs PPO once more with shuffled scores, so it needs a ppo section")
        if self.ppo.shuffle_scores:
            raise ValueError(
                "control: true runs PPO once more with shuffled scores, and ppo.shuffle_scores shuffles those of PPO "
                "itself; keep one of the two"
            )
        if self.ppo.reward_shaping != "none":
            raise ValueError(
                "control: only scores of whole completions can change places, so it needs ppo.reward_shaping: none, "
                f"found {self.ppo.reward_shaping!r}"
            )
        if self.eval.control != AUTO:
            raise ValueError(
                "eval.control: with control: true the report shows the control of this run; remove one of the two"
            )

    def _check_best_of_n(self) -> None:
        if self.ppo is None:
            raise ValueError("sft.from: best_of_n keeps the samples with the best ppo.rewards: it needs a ppo section")
        if self.ppo.learned_reward is not None:
            raise ValueError(
                "sft.from: best_of_n cannot use the reward 'learned', which is made after SFT; name other rewards"
            )
        if self.model.from_scratch is not None:
            raise ValueError(
                "sft.from: best_of_n samples from the model that SFT starts from, and one built from scratch has "
                "learnt nothing; name a trained model, such as runs/NAME/sft, in model.model_name_or_path"
            )

    def _check_baselines(self) -> None:
        if self.ppo is None or self.sft_is_external:
            raise ValueError(
                "eval.baselines: they are trained as this run's SFT and compared with its PPO, so they need both: "
                + ("a ppo section" if self.ppo is None else "remove ppo.sft_model_path")
            )
        if SFT_BY_METRIC in self.eval.baselines and self.sft.arguments.get("save_strategy") == "no":
            raise ValueError(
                f"eval.baselines: {SFT_BY_METRIC} chooses among SFT's checkpoints, and sft.save_strategy is 'no'; "
                "remove one of the two"
            )

    @property
    def language(self) -> str | None:
        """Return the language of the completions, by which metrics choose their tokenizer; None where unknown."""
        return self.task.config.language

    @property
    def augment(self) -> tuple[AugmentConfig, ...]:
        """Return the steps that make SFT's training examples more; none for a kind of task of the user."""
        config = self.task.config
        return config.augment if isinstance(config, columns.Config | parallel.Config) else ()

    @property
    def sft_is_external(self) -> bool:
        """Return whether PPO starts from a model made elsewhere, so that this recipe's sft stage is not needed."""
        return self.ppo is not None and self.ppo.sft_model_path is not None

    @property
    def evaluation_reads_sft(self) -> bool:
        """Return whether the evaluation loads the SFT model: as a system, or as the base of PPO or of a reward."""
        learned = self.ppo is not None and self.ppo.learned_reward is not None
        return learned or not {"sft", "ppo"}.isdisjoint(self.eval.system_names)

    @property
    def reward_is_external(self) -> bool:
        """Return whether PPO's reward model was made elsewhere, so that this recipe's reward stage is not needed."""
        return self.ppo is not None and self.ppo.reward_model_path is not None

    @property
    def uses_own_reward(self) -> bool:
        """Return whether PPO is rewarded by what the reward stage of this run makes."""
        return self.ppo is not None and self.ppo.learned_reward is not None and not self.reward_is_external

    @property
    def min_accuracy(self) -> float:
        """Return the held-out accuracy below which PPO refuses a reward model."""
        return RewardSection.min_accuracy if self.reward is None else self.reward.min_accuracy
