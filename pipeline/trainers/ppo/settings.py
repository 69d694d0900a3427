"""What the settings of PPO mean for its parts: decoding, precision, rewards, held-out rows."""

from collections.abc import Callable, Sequence

from datasets import Dataset

from pipeline.models.generation import Decoding
from pipeline.rewards import Handling, Reward
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.precision import check_precision, native_bf16


def as_rewards(functions: Reward | Callable | Sequence[Reward | Callable]) -> list[Reward]:
    """Functions as rewards under names of their own.

    Raises:
        ValueError: a name twice.
    """
    functions = functions if isinstance(functions, Sequence) else [functions]
    rewards = [f if isinstance(f, Reward) else Reward(getattr(f, "__name__", type(f).__name__), f) for f in functions]
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):  # they are logged by name
        raise ValueError(
            f"reward_funcs: each needs a name of its own, found {', '.join(names)}; use Reward(name, ...)"
        )
    return rewards


def handling_of(args: PPOConfig) -> Handling:
    """What is done about rewards that fail."""
    return Handling(args.on_reward_error, args.reward_timeout)


def sampling(args: PPOConfig) -> Decoding:
    """How a rollout is written."""
    return Decoding(
        args.response_length,
        args.temperature,
        args.top_k,
        args.top_p,
        min_new_tokens=args.min_new_tokens,
        stop_strings=args.stop_strings,
    )


def greedy(args: PPOConfig) -> Decoding:
    """How held-out prompts are answered."""
    return Decoding(args.response_length, min_new_tokens=args.min_new_tokens, stop_strings=args.stop_strings)


def first_of(dataset: Dataset | None, rows: int | None) -> Dataset | None:
    """The first `rows` of a data set, all of it for None."""
    return dataset.select(range(min(rows, len(dataset)))) if dataset and rows else dataset


def uses_bf16(args: PPOConfig) -> bool:
    """Whether passes run under bf16 autocast.

    Raises:
        ValueError: it is asked for and the machine has none.
    """
    check_precision("ppo", bf16=args.bf16)
    return native_bf16() if args.bf16 is None else args.bf16
