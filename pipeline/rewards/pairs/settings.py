"""Pairs that the SFT model's own samples give: the keys of `reward.pairs` without a `path`."""

from dataclasses import dataclass

ORIGINS = ("sft", "references")


@dataclass(frozen=True)
class SampledPairs:
    """The SFT model answers each prompt `samples` times, and `metric` ranks the answers against the references.

    `origins` (in a recipe: `from`) says what is paired: `sft` a better sample with a worse one, `references` a
    reference with a sample, or both. Of a prompt's pairs, `pairs_per_prompt` of each kind are kept: those of samples
    with the largest margins, those of references in the order of sampling. A margin is the difference of the metric.
    `prompts` of the prompts that PPO answers train, `held_out_prompts` of the validation split are held out.
    """

    # sft: a better sample with a worse one; references: a reference with a sample; or both
    origins: tuple[str, ...] = ("sft",)
    metric: str = "bleu"  # ranks the samples against the references
    samples: int = 4  # answers to each prompt
    temperature: float = 1.0  # of the samples
    top_p: float = 1.0  # of the samples; 1: off
    prompts: int | None = None  # how many prompts train; None: all that PPO answers
    held_out_prompts: int | None = None  # how many prompts of the validation split are held out; None: all
    pairs_per_prompt: int = 1  # of each kind
    min_margin: float = 0.05  # by how much better is better, as a difference of the metric
    batch_size: int = 128  # prompts answered at once
    max_new_tokens: int | None = None  # None: ppo.response_length
    min_new_tokens: int | None = None  # None: ppo.min_new_tokens
    stop_strings: tuple[str, ...] | None = None  # None: ppo.stop_strings
    suppress_tokens: tuple[int, ...] | None = None  # None: ppo.suppress_tokens

    def __post_init__(self) -> None:
        if not self.origins or len(set(self.origins)) != len(self.origins) or set(self.origins) - set(ORIGINS):
            raise ValueError(
                f"reward.pairs.from: must be one or both of {', '.join(ORIGINS)}, found {list(self.origins)}; "
                "for a preference data set name its path"
            )
        least = {"samples": 2 if "sft" in self.origins else 1, "pairs_per_prompt": 1, "batch_size": 1}
        least |= {"prompts": 1, "held_out_prompts": 1, "max_new_tokens": 1, "min_new_tokens": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"reward.pairs.{name}: must be at least {lowest}, found {value}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"reward.pairs.temperature: must be above 0, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"reward.pairs.top_p: must be in (0, 1], found {self.top_p}")
        if not 0 <= self.min_margin < 1:
            raise ValueError(f"reward.pairs.min_margin: must be in [0, 1), found {self.min_margin}")
