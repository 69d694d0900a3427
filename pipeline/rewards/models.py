"""Reward models in `reward_funcs`, as TRL's GRPOTrainer takes them: a sequence classifier, its directory or Hub id."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.metrics import is_metric
from pipeline.models.config import ModelConfig
from pipeline.models.hub import read_tokenizer
from pipeline.models.text import render_chat, set_chat_template
from pipeline.rewards import Reward, RewardFunction, as_rewards
from pipeline.rewards.classifier import (
    ClassifierReward,
    is_reward_model,
    read_classifier,
    score_token_rows,
    set_padding,
)
from pipeline.rewards.learned import is_reward_folder, load_learned_reward
from pipeline.rewards.metric import text_of

BATCH_SIZE = 32
# One of `reward_funcs`: a function, a classifier, or its directory or Hub id.
RewardSource = Reward | Callable | PreTrainedModel | str | Path
RewardTokenizers = PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None


class RewardModel:
    """The first output of a sequence classifier, which reads what TRL's GRPOTrainer gives it.

    A chat is rendered by the chat template of the classifier's tokenizer; of plain texts it reads the prompt and right
    after it what the policy wrote, without special tokens of its own.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.path = model.config.name_or_path
        self.model, self.tokenizer, self._policy_tokenizer = model.eval(), tokenizer, policy_tokenizer
        set_padding(model, tokenizer)

    def __call__(self, prompts: list, completions: list, completion_ids: list[list[int]]) -> list[float]:
        """One score for each completion.

        Raises:
            ValueError: a text is longer than the classifier can read.
        """
        rows = [self._encode(*row) for row in zip(prompts, completions, completion_ids, strict=True)]
        return score_token_rows(self.model, self.tokenizer, rows, BATCH_SIZE, "reward_funcs", self.path).tolist()

    def _encode(self, prompt: str | list, completion: str | list, ids: Sequence[int]) -> dict[str, list[int]]:
        if isinstance(prompt, list):
            text = render_chat(self.tokenizer, [*prompt, *completion])
        else:
            # Rewards get texts without the white space around them, which a classifier has to see.
            written, answer = self._policy_tokenizer.decode(ids, skip_special_tokens=True), text_of(completion)
            text = prompt + (written if written.strip() == answer else answer)
        return dict(self.tokenizer(text, add_special_tokens=False))


def load_rewards(
    reward_funcs: object,
    reward_processing_classes: RewardTokenizers,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    chat_template_kwargs: Mapping[str, object],
) -> list[Reward]:
    """Turn what `reward_funcs` may hold into rewards with different names; models are moved to `device`.

    Args:
        reward_funcs: One or several functions, `Reward`s, classifiers, or directories and Hub ids of classifiers.
        reward_processing_classes: The tokenizers of the classifiers, one for each of `reward_funcs`; None: the one
            that a classifier's directory holds. What belongs to a function is ignored.
        tokenizer: That of the policy.
        device: Where classifiers compute.
        chat_template_kwargs: Variables for the chat templates of the classifiers.

    Raises:
        ValueError: no reward, or one that is none of these; another number of tokenizers than of rewards.
    """
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if reward_funcs is None or not functions:
        raise ValueError("reward_funcs: missing; give a function, a Reward, or a reward model")
    given = reward_processing_classes
    tokenizers = list(given) if isinstance(given, list | tuple) else [given] * (len(functions) if given is None else 1)
    if len(tokenizers) != len(functions):
        raise ValueError(
            f"reward_processing_classes: expected one for each of the {len(functions)} reward_funcs (None for a "
            f"function), found {len(tokenizers)}"
        )
    return as_rewards(
        [
            _as_reward(function, own_tokenizer, tokenizer, device, chat_template_kwargs)
            for function, own_tokenizer in zip(functions, tokenizers, strict=True)
        ]
    )


def _as_reward(
    reward: object,
    own_tokenizer: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    chat_template_kwargs: Mapping[str, object],
) -> Reward | Callable:
    """Load a reward model; a function stays as it is."""
    if isinstance(reward, Reward) and isinstance(reward.function, str | Path | PreTrainedModel):
        loaded = _as_reward(reward.function, own_tokenizer, tokenizer, device, chat_template_kwargs)
        return replace(reward, function=loaded.function)
    if isinstance(reward, str | Path):
        if is_reward_folder(reward):
            return Reward(Path(reward).name, _learned(reward, tokenizer, device))
        _refuse_name(str(reward))
        model, loaded = read_classifier(str(reward), ModelConfig(model_name_or_path=str(reward)), "reward_funcs")
        own_tokenizer = own_tokenizer or loaded
    elif isinstance(reward, PreTrainedModel):
        model = reward
        _check_model(model)
        own_tokenizer = own_tokenizer or _tokenizer_of(model)
    elif not (isinstance(reward, Reward) or callable(reward)) or isinstance(reward, nn.Module):
        raise ValueError(
            f"reward_funcs: a {type(reward).__name__} is no reward; give a function, a Reward, a sequence classifier "
            "of transformers, or its directory"
        )
    else:
        return reward
    if chat_template_kwargs and own_tokenizer.chat_template is not None:
        set_chat_template(own_tokenizer, None, chat_template_kwargs)
    name = str(model.config.name_or_path or type(model).__name__).rstrip("/").split("/")[-1]
    return Reward(name, RewardModel(model.to(device), own_tokenizer, tokenizer))


def _learned(directory: str | Path, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> RewardFunction:
    config = ModelConfig(model_name_or_path=str(directory))
    learned = load_learned_reward(directory, config, tokenizer, 0.0, {})
    return learned.to(device) if isinstance(learned, ClassifierReward) else learned


def _refuse_name(name: str) -> None:
    """Refuse what names a reward of a recipe.

    Raises:
        ValueError: naming the function that makes one.
    """
    if name in ("constant", "learned") or is_metric(name):
        raise ValueError(
            f"reward_funcs: {name!r} is the name of a reward in a recipe; here give "
            f"*build_rewards([RewardConfig({name!r})]) of pipeline.rewards"
        )


def _check_model(model: PreTrainedModel) -> None:
    """Refuse a model that is no sequence classifier with one output.

    Raises:
        ValueError: naming its class and its labels.
    """
    if not is_reward_model(type(model).__name__) or model.config.num_labels != 1:
        raise ValueError(
            f"reward_funcs: a {type(model).__name__} with {model.config.num_labels} labels is no reward model; give a "
            "sequence classifier with num_labels: 1, or a function that calls the model"
        )


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer from where the model was loaded from.

    Raises:
        ValueError: there is none.
    """
    source = model.config.name_or_path
    try:
        if not source:
            raise ValueError("it was not loaded from a directory")
        return read_tokenizer(source)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"reward_processing_classes: none for the {type(model).__name__} in reward_funcs ({error}); pass it"
        ) from error
