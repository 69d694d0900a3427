"""The embedded task: a generated English-German phrasebook, for runs without a network or any data."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.tasks import grammar, lexicon, phrasebook
from pipeline.tasks.types import SPLITS, Task, TaskError, check_limits, hold_out, make_split, render

POOL = 8768  # sentence pairs the held-out ones are drawn from, whatever the sizes: those of the default sizes


@dataclass(frozen=True)
class Config:
    """Sizes of the three splits, which share no sentence; `data_seed` chooses the sentences, not the run's seed."""

    train_examples: int = 8000
    validation_examples: int = 256
    test_examples: int = 512
    data_seed: int = 0
    prompt: str = "{source}\n"
    ppo_examples: int | None = None  # the last training rows, which SFT does not see and PPO answers

    def __post_init__(self) -> None:
        check_limits(
            train_examples=self.train_examples,
            validation_examples=self.validation_examples,
            test_examples=self.test_examples,
            ppo_examples=self.ppo_examples,
        )
        if not self.prompt.strip():
            raise TaskError("task.prompt: empty; give a text with {source} in it")
        render(self.prompt, {"source": ""})


def files(config: Config) -> list[Path]:
    """The grammar and its words: another version of them makes other sentences."""
    return [Path(__file__), *(Path(module.__file__) for module in (phrasebook, grammar, lexicon))]


def load(config: Config) -> Task:
    """Generate the sentence pairs and cut them into splits."""
    sizes = {split: getattr(config, f"{split}_examples") for split in SPLITS}
    try:
        pairs = _stable_pairs(sum(sizes.values()), config.data_seed)
    except ValueError as error:
        raise TaskError(f"task: {error}") from error
    # Test and validation come first, so that more training examples leave the held-out sentences as they are.
    cut, splits = 0, {}
    for split in reversed(SPLITS):
        chosen, cut = pairs[cut : cut + sizes[split]], cut + sizes[split]
        rows = [
            {
                "prompt": render(config.prompt, {"source": english}),
                "completion": german,
                "references": [german],
                "source": english,
            }
            for english, german in chosen
        ]
        splits[split] = make_split(rows, split, None)
    return hold_out(Task(**splits, language="de"), config.ppo_examples)


def _stable_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """At least `count` sentence pairs, of which the first `POOL` are the same for every count.

    A longer list of the phrasebook holds every shorter one of its seed, but in another order.

    Raises:
        ValueError: more pairs than the phrasebook has.
    """
    longer = phrasebook.phrase_pairs(count, seed) if count > POOL else []
    pool = phrasebook.phrase_pairs(POOL, seed)
    known = set(pool)
    return pool + [pair for pair in longer if pair not in known]
