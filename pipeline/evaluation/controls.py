"""The control, the fair baselines and what chose the models, in words."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.evaluation.config import CONSTANT, SFT_BY_METRIC, SFT_LONGER, SHUFFLED
from pipeline.evaluation.power import p_text, signed_text
from pipeline.evaluation.significance import SIGNIFICANT

EARNED = "which the reward earned"
BASELINE_WORDS = {
    SFT_BY_METRIC: "the SFT checkpoint that PPO's rule chooses",
    SFT_LONGER: "SFT for as long as SFT and PPO took together",
}
TUNING_WORDS = {
    "validation": "hyper-parameters were chosen on validation data",
    "test": "hyper-parameters were chosen on this test set, which makes p too small",
    "not tuned": "hyper-parameters were not tuned",
}


@dataclass(frozen=True)
class Effect:
    """A tested difference: `gain` is `delta` with the sign that is positive for the better, `p_value` is corrected."""

    metric: str
    delta: float
    gain: float
    p_value: float
    standard_error: float

    @property
    def is_better(self) -> bool:
        """Return whether the test shows an improvement."""
        return self.p_value < SIGNIFICANT and self.gain > 0

    @property
    def is_worse(self) -> bool:
        """Return whether the test shows a loss."""
        return self.p_value < SIGNIFICANT and self.gain < 0

    @property
    def size(self) -> str:
        """Return the difference as a text."""
        return signed_text(self.delta, self.standard_error or abs(self.delta))

    @property
    def figures(self) -> str:
        """Return the difference and its p."""
        return f"{self.size}, {p_text(self.p_value)}"


def control_finding(alone: Effect, beyond: Effect, kind: object, is_shared: bool = False) -> str:
    """Say how the control compares with SFT (`alone`), and whether PPO is better than it (`beyond`).

    Only where PPO is better than a control with shuffled scores do the words say that the reward earned the gain; not
    where several seeds share one control, whose own chance is counted as if it were that of several.
    """
    has_signal = kind not in (SHUFFLED, CONSTANT)
    moved = f"The control with {kind} moved {alone.metric} by {alone.size} ({p_text(alone.p_value)})"
    if alone.is_better and not has_signal:
        moved += ", so PPO is better than SFT here even without a signal"
    if not beyond.is_better:
        then = "" if has_signal else ", so no gain is shown to be the reward's"
        return f"{moved}; PPO is not shown to be better than it ({beyond.figures}){then}."
    words = EARNED if kind == SHUFFLED else "but only ppo.shuffle_scores makes a matched control"
    if is_shared:
        words = "but seeds share a control, which counts as one run: give every seed its own"
    return f"{moved}; PPO is better than it ({beyond.figures}), {words}."


def baselines_finding(effects: Mapping[str, Effect]) -> str:
    """Say in one sentence whether PPO beats each baseline; an empty text without any."""
    phrases = []
    for name, effect in effects.items():
        words = "better than" if effect.is_better else "worse than" if effect.is_worse else "not shown to differ from"
        phrases.append(f"{words} {BASELINE_WORDS[name]} ({name}: {effect.metric} {effect.figures})")
    return f"PPO is {', and '.join(phrases)}." if phrases else ""


def choices_finding(checkpoints: Mapping[str, str | None], hyperparameters: str | None) -> str:
    """Say which data chose checkpoints and hyper-parameters; an empty text where nothing is known of checkpoints."""
    if not checkpoints:
        return ""
    chosen = [f"{name.upper()}'s by {rule}" for name, rule in checkpoints.items() if rule]
    last = [name.upper() for name, rule in checkpoints.items() if not rule]
    clauses = [f"Checkpoints were chosen on the validation split: {', '.join(chosen)}"] if chosen else []
    clauses += [f"{' and '.join(last)} ended with the last checkpoint"] if last else []
    told = TUNING_WORDS.get(hyperparameters)
    return f"{'; '.join([*clauses, told or 'the recipe does not say which data chose its hyper-parameters'])}."
