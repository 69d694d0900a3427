"""The control in words: what PPO does without a signal, and whether the real one beats it."""

from dataclasses import dataclass

from pipeline.evaluation.config import SHUFFLED
from pipeline.evaluation.power import p_text
from pipeline.evaluation.significance import SIGNIFICANT

EARNED = "which the reward earned"


@dataclass(frozen=True)
class Effect:
    """A tested difference: `gain` is `delta` with the sign that is positive for the better, `p_value` is corrected."""

    metric: str
    delta: float
    gain: float
    p_value: float

    @property
    def is_better(self) -> bool:
        """Return whether the test shows an improvement."""
        return self.p_value < SIGNIFICANT and self.gain > 0

    @property
    def figures(self) -> str:
        """Return the difference and its p."""
        return f"{self.delta:+.2f}, {p_text(self.p_value)}"


def control_finding(alone: Effect, beyond: Effect, kind: object) -> str:
    """Say how the control compares with SFT (`alone`), and whether PPO is better than it (`beyond`).

    Only where PPO is better than a control with shuffled scores do the words say that the reward earned the gain.
    """
    moved = f"The control with {kind} moved {alone.metric} by {alone.delta:+.2f} ({p_text(alone.p_value)})"
    if alone.is_better:
        moved += ", so PPO is better than SFT here even without a signal"
    if not beyond.is_better:
        return f"{moved}; PPO is not better than it ({beyond.figures}), so no gain is shown to be the reward's."
    words = EARNED if kind == SHUFFLED else "but only ppo.shuffle_scores makes a matched control"
    return f"{moved}; PPO is better than it ({beyond.figures}), {words}."
