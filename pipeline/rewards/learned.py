"""The learned reward of a reward stage: loaded, checked, and computed from token ids on the base that PPO shares."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.adapters import attach_adapter
from pipeline.models.config import ModelConfig
from pipeline.models.generation import eos_token_ids
from pipeline.models.reward_model import RECORD_FILE, RewardRecord, check_reward_files, load_record
from pipeline.models.sequences import Sequences, length_sorted_chunks, make_sequences
from pipeline.models.text import decode, encode_completions, encode_prompts
from pipeline.rewards import Reward
from pipeline.rewards.classifier import ClassifierReward, check_classifier
from pipeline.rewards.metric import text_of
from pipeline.runtime.memory import BatchSize
from pipeline.runtime.messages import yaml_text

CALIBRATION_ROWS = 256
OPTIONS = {"batch_size": int, "template": str}

# Sequences on the network's device -> raw scores [B].
SequenceScorer = Callable[[Sequences], Tensor]


class AdapterReward:
    """The score of a reward adapter: `(raw - shift) / scale`, 0 for the average reference, with a spread of 1.

    Completions are scored from the token ids that the policy wrote. Ids that do not spell the text (those of another
    tokenizer) are not used: the text is then tokenised. `attach` gives the network, which PPO shares with the policy.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, record: RewardRecord, directory: Path, batch_size: int = 128
    ) -> None:
        self.tokenizer, self.record, self.directory = tokenizer, record, directory
        self._batches = BatchSize(batch_size)
        self._score_sequences: SequenceScorer | None = None
        self._model: PreTrainedModel | None = None

    def attach(self, score_sequences: SequenceScorer, model: PreTrainedModel) -> None:
        """Score by `score_sequences`, a network over `model`, on the device that the model is on by then."""
        self._score_sequences, self._model = score_sequences, model

    def __call__(
        self, prompts: list, completions: list, *, completion_ids: list[list[int]], **columns: list
    ) -> list[float]:
        """One score for each completion; equal ones are scored once, so that they score alike to the last bit.

        Raises:
            ValueError: a score is not finite.
        """
        assert self._score_sequences is not None and self._model is not None, "attach() comes first"
        ids = self._tokens(prompts, completions, completion_ids)
        prompt_ids = encode_prompts(self.tokenizer, prompts, self._model.config.is_encoder_decoder)
        keys = list(zip(map(tuple, prompt_ids), map(tuple, ids), strict=True))
        distinct = list(dict.fromkeys(keys))
        raw = score_token_ids(
            [prompt for prompt, _ in distinct],
            [completion for _, completion in distinct],
            self.tokenizer,
            self._score_sequences,
            self._model.device,
            self._batches,
        )
        scores = dict(zip(distinct, ((raw - self.record.shift) / self.record.scale).tolist(), strict=True))
        return [scores[key] for key in keys]

    def _tokens(self, prompts: list, completions: list, completion_ids: list[list[int]]) -> list[list[int]]:
        texts, size = [text_of(completion) for completion in completions], len(self.tokenizer)
        readable = [bool(ids) and max(ids) < size for ids in completion_ids]
        spelled = decode(self.tokenizer, [ids if ok else [] for ids, ok in zip(completion_ids, readable, strict=True)])
        rows = zip(completion_ids, readable, spelled, texts, strict=True)
        tokens = [list(ids) if ok and spelt == text.strip() else None for ids, ok, spelt, text in rows]
        # Only the texts that are needed: a chat template may refuse to render some that a policy writes.
        others = [row for row, ids in enumerate(tokens) if ids is None]
        fresh = encode_completions(self.tokenizer, [prompts[row] for row in others], [texts[row] for row in others])
        ends = {*eos_token_ids(self._model, self.tokenizer), *(ids[-1] for ids in fresh)}
        for row, new in zip(others, fresh, strict=True):
            # The end of what was written, as after a thought that is stripped: cut off, it has no end of its own.
            is_cut = (
                readable[row] and spelled[row].endswith(texts[row].strip()) and completion_ids[row][-1] not in ends
            )
            tokens[row] = new[:-1] if is_cut and len(new) > 1 else new
        return tokens


def adapter_rewards(rewards: Sequence[Reward]) -> list[AdapterReward]:
    """The functions among `rewards` that are reward adapters on the shared model."""
    return [reward.function for reward in rewards if isinstance(reward.function, AdapterReward)]


def score_token_ids(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    score_sequences: SequenceScorer,
    device: torch.device,
    batches: BatchSize,
) -> Tensor:
    """Raw scores [B], on the CPU in float32, of completions given as token ids."""
    lengths = torch.tensor([len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)])

    def attempt(size: int) -> Tensor:
        scores = torch.zeros(len(prompt_ids))
        for index in length_sorted_chunks(lengths, size):
            rows = index.tolist()
            sequences = make_sequences(
                [prompt_ids[r] for r in rows], [completion_ids[r] for r in rows], tokenizer.pad_token_id, device
            )
            scores[index] = score_sequences(sequences).float().cpu()
        return scores

    return batches.run(attempt)


def calibration(scores: Tensor, references: Tensor) -> tuple[float, float]:
    """Shift and scale for raw scores: `references` average 0, and `scores` have a standard deviation of 1.

    Raises:
        ValueError: a score is not finite, or all are the same.
    """
    for name, values in (("text", scores), ("reference", references)):
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            raise ValueError(
                f"reward: the score of {name} {int(bad[0])} is {float(values[bad[0]])} ({len(bad)} in all); lower "
                "reward.learning_rate, or load the model with model.dtype: float32"
            )
    spread = float(scores.double().std(correction=0))
    if spread < 1e-8:
        raise ValueError(
            "reward: every text scores the same, so the reward model has learnt nothing; look at "
            "reward.learning_rate and at the pairs"
        )
    return float(references.double().mean()), spread


def check_accuracy(record: RewardRecord, min_accuracy: float, path: object) -> None:
    """Refuse a reward model that is not shown to tell better from worse: by where its interval begins, if known.

    Raises:
        ValueError: naming the accuracy and how to go on all the same.
    """
    low = record.accuracy if record.accuracy_low is None else record.accuracy_low
    if low is not None and low < min_accuracy:
        begins = "" if record.accuracy_low is None else f", and its 95 % interval begins at {low:.1%}"
        raise ValueError(
            f"reward.min_accuracy: the reward model in {str(path)!r} prefers the better text in "
            f"{record.accuracy:.1%} of {record.held_out_pairs} held-out pairs{begins}, below {min_accuracy:.1%}: see "
            f"{path}/report; train a better one or hold out more prompts, or set reward.min_accuracy lower to use it "
            "all the same"
        )


def check_learned_options(options: Mapping[str, Any], is_adapter: bool) -> None:
    """Refuse options of `{name: learned, ...}` that do not exist or would do nothing.

    Raises:
        ValueError: naming the option.
    """
    for key, value in options.items():
        if key not in OPTIONS or not isinstance(value, OPTIONS[key]):
            raise ValueError(
                f"ppo.rewards: 'learned' has the options batch_size (a number) and template (a text), found {key}: "
                f"{value!r}"
            )
        if key == "batch_size" and (isinstance(value, bool) or value < 1):
            raise ValueError(f"ppo.rewards: the batch_size of 'learned' must be at least 1, found {yaml_text(value)}")
        if key == "template" and is_adapter:
            raise ValueError("ppo.rewards: 'learned' reads token ids here, so its option template would do nothing")
        if key == "template" and ("{prompt}" not in value or "{completion}" not in value):
            raise ValueError(f"ppo.rewards: the template needs {{prompt}} and {{completion}} in it, found {value!r}")
        if key == "template":
            try:
                value.format(prompt="", completion="")
            except (LookupError, ValueError) as error:
                raise ValueError(
                    "ppo.rewards: a template has no other fields than {prompt} and {completion}, and braces that stay "
                    f"are doubled ({{{{ and }}}}), found {value!r} ({error})"
                ) from error


def check_reward_folder(path: str | Path, record: RewardRecord, model: PreTrainedModel | None) -> None:
    """Refuse a reward stage's folder that lacks files or does not fit `model`, which PPO starts from.

    Raises:
        ValueError: as `check_reward_files`, `attach_adapter` and `check_classifier`.
    """
    if record.kind == "classifier":
        check_classifier(record.path, ModelConfig(model_name_or_path=record.path))
        return
    check_reward_files(path, model)
    if model is not None:
        try:
            attach_adapter(model, path)
        except ValueError as error:
            raise ValueError(f"ppo.reward_model_path: {error}") from error


def is_reward_folder(path: str | Path) -> bool:
    """Whether a path is the folder of a finished reward stage."""
    return (Path(path).expanduser() / RECORD_FILE).is_file()


def load_learned_reward(
    path: str | Path,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    min_accuracy: float,
    options: Mapping[str, Any],
) -> AdapterReward | ClassifierReward:
    """The learned reward in a reward stage's folder or of a classifier; an adapter's still has to be attached.

    Raises:
        ValueError: as `load_record`, `check_accuracy` and `check_classifier`.
    """
    if not is_reward_folder(path):
        return ClassifierReward(str(path), config, **options)
    record = load_record(path)
    check_accuracy(record, min_accuracy, path)
    check_learned_options(options, record.kind == "adapter")
    if record.kind == "adapter":
        return AdapterReward(tokenizer, record, Path(path).expanduser(), **options)
    settings = {"template": record.template, **options}
    return ClassifierReward(record.path, config, **settings).calibrate(record.shift, record.scale)


def reward_on_references(reward: ClassifierReward, prompts: list, references: list[str]) -> ClassifierReward:
    """Shift and scale a classifier that no reward stage has calibrated by its scores of references."""
    scores = reward.raw_scores(prompts, references)
    return reward.calibrate(*calibration(scores, scores))
