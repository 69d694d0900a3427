"""A sequence classifier as a reward: any model with one output, reading texts by its own tokenizer and template."""

import inspect
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.models.config import ModelConfig
from pipeline.models.hub import pinned_revision, read_config, read_tokenizer, unreadable
from pipeline.models.loading import position_limit
from pipeline.models.reward_model import RECORD_FILE
from pipeline.models.sequences import length_sorted_chunks
from pipeline.models.text import plain_text, render_chat
from pipeline.models.weights import check_loaded_weights, empty_model
from pipeline.rewards.metric import text_of


class ClassifierReward:
    """The score of a sequence classifier with one output, which reads texts by its own tokenizer and template.

    What it reads: `template` with `{prompt}` and `{completion}` filled in; without one the tokenizer's chat template;
    without that, prompt and completion as a pair of texts where the tokenizer has a separator, else one after the
    other.
    """

    def __init__(self, path: str, config: ModelConfig, template: str | None = None, batch_size: int = 32) -> None:
        self.path, self.batch_size = path, batch_size
        self.model, self.tokenizer = read_classifier(path, config, "ppo.reward_model_path")
        self.tokenizer.padding_side = "right"
        set_padding(self.model, self.tokenizer)
        self.reader = ClassifierReader(self.tokenizer, template, token_limit(self.model))
        self.shift, self.scale = 0.0, 1.0

    def to(self, device: torch.device) -> "ClassifierReward":
        """Move the classifier."""
        self.model.to(device)
        return self

    def calibrate(self, shift: float, scale: float) -> "ClassifierReward":
        """Score `(raw - shift) / scale` from now on."""
        self.shift, self.scale = shift, scale
        return self

    def __call__(self, prompts: list, completions: list, **columns: list) -> list[float]:
        """One score for each completion."""
        return ((self.raw_scores(prompts, completions) - self.shift) / self.scale).tolist()

    def raw_scores(self, prompts: list, completions: list) -> Tensor:
        """The classifier's outputs [B], on the CPU in float32.

        Raises:
            ValueError: a text is longer than the classifier can read.
        """
        encoded = [self.reader(p, text_of(c)) for p, c in zip(prompts, completions, strict=True)]
        return score_token_rows(
            self.model, self.tokenizer, encoded, self.batch_size, "ppo.reward_model_path", self.path
        )


@dataclass(frozen=True)
class ClassifierReader:
    """What a classifier reads of a prompt and its completion: see `ClassifierReward`.

    `limit` is how many tokens it can read; None where it has none.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    limit: int | None

    @classmethod
    def of(cls, path: str, config: ModelConfig, template: str | None) -> "ClassifierReader":
        """Return the reader of a classifier, whose weights are not loaded."""
        source = _source(path)
        tokenizer = read_tokenizer(source, trust_remote_code=config.trust_remote_code)
        loaded = read_config(source, trust_remote_code=config.trust_remote_code)
        if "auto_map" in loaded.to_dict():
            return cls(tokenizer, template, position_limit(loaded))
        model = empty_model(AutoModelForSequenceClassification, source, loaded, pinned_revision(source))
        return cls(tokenizer, template, token_limit(model))

    def fits(self, prompt: str | list, text: str) -> bool:
        """Tell whether the classifier can read a prompt with this completion."""
        return self.limit is None or len(self(prompt, text)["input_ids"]) <= self.limit

    def __call__(self, prompt: str | list, text: str) -> dict[str, list[int]]:
        """Tokenise a prompt, plain text or chat messages, with its completion.

        Raises:
            ValueError: the classifier's chat template cannot render them.
        """
        tokenizer = self.tokenizer
        plain = plain_text(prompt)
        if self.template is not None:
            return dict(tokenizer(self.template.format(prompt=plain, completion=text)))
        if tokenizer.chat_template is not None:
            messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            messages = [*messages, {"role": "assistant", "content": text}]
            return dict(tokenizer(render_chat(tokenizer, messages), add_special_tokens=False))
        if tokenizer.sep_token is not None:
            return dict(tokenizer(plain, text))
        return dict(tokenizer(plain + text))


def token_limit(model: PreTrainedModel) -> int | None:
    """How many tokens a classifier can read; None where its configuration sets no limit."""
    limit = position_limit(model.config)
    for name, module in model.named_modules():
        # The positions of RoBERTa's kin begin after that of padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a padding token one, and the model the same.

    Causal classifiers score at the last token that is no padding, so it is none that ends a text, if there is another.
    """
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_id(model.config, tokenizer))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def padding_id(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the padding token of a tokenizer, or the one that `set_padding` gives it; None where there is none."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    known = getattr(config.get_text_config(), "pad_token_id", None)
    known = known if known is not None and 0 <= known < len(tokenizer) else None
    ids = (known, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None), None)


@torch.no_grad()
def score_token_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Sequence[int]]],
    batch_size: int,
    key: str,
    path: str,
) -> Tensor:
    """The first output of a classifier for what its tokenizer made of texts, [B], on the CPU in float32.

    Raises:
        ValueError: a row is longer than the classifier at `path` can read, or has a token without an embedding; `key`
            is the setting that names it.
    """
    limit = token_limit(model)
    ids = [row["input_ids"] for row in rows]
    longest = max(map(len, ids))
    if limit is not None and longest > limit:
        raise ValueError(
            f"{key}: a prompt and its completion are {longest} tokens for the classifier {path!r}, which reads "
            f"{limit}; shorten the prompts or lower ppo.response_length"
        )
    try:
        _check_ids(model, tokenizer, [max(row, default=0) for row in ids], path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    # Which of two texts a token is of (BERT, ELECTRA); some tokenizers say it to models that do not read it.
    names = [name for name in ("input_ids", "token_type_ids") if name in rows[0]]
    names = [name for name in names if name in inspect.signature(model.forward).parameters]
    scores = torch.zeros(len(rows))
    for index in length_sorted_chunks(torch.tensor([len(row) for row in ids]), batch_size):
        chosen = {name: [rows[row][name] for row in index.tolist()] for name in names}
        batch = tokenizer.pad(chosen, padding_side="right", return_tensors="pt").to(model.device)
        scores[index] = model(**batch).logits[:, 0].float().cpu()
    return scores


def read_classifier(path: str, config: ModelConfig, key: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier with one output, and its tokenizer.

    Raises:
        ValueError: as `check_classifier`, or weights that cannot be read; `key` is the setting that names it.
    """
    check_classifier(path, config, key)
    source, trust = _source(path), config.trust_remote_code
    tokenizer = read_tokenizer(source, trust_remote_code=trust)
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source,
            revision=pinned_revision(source),
            dtype=torch.float32,
            trust_remote_code=trust,
            ignore_mismatched_sizes=True,  # refused below, in one sentence
            output_loading_info=True,
        )
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise unreadable(source, "weights", "weight files", error) from error
    check_loaded_weights(model.eval(), source, info)
    return model, tokenizer


def _source(path: str) -> str:
    directory = Path(path).expanduser()
    return str(directory) if directory.is_dir() else path


def is_reward_model(architecture: str) -> bool:
    """Tell by the name of its class whether a model may give one score for a text."""
    return "SequenceClassification" in architecture or "RewardModel" in architecture


def check_classifier(path: str, config: ModelConfig, key: str = "ppo.reward_model_path") -> None:
    """Refuse what is no reward model, by its configuration and the headers of its weight files alone.

    Raises:
        ValueError: an adapter without a record, an encoder-decoder or language model, more than one label, weights
            that are missing, or tokens without an embedding.
    """
    directory = Path(path).expanduser()
    if (directory / "adapter_config.json").is_file():
        raise ValueError(f"{key}: {path!r} is an adapter without {RECORD_FILE}, so no reward stage has finished there")
    source = _source(path)
    loaded = read_config(source, trust_remote_code=config.trust_remote_code)
    kinds = loaded.architectures or []
    if not any(map(is_reward_model, kinds)):
        raise ValueError(
            f"{key}: {path!r} is no sequence classifier ({', '.join(kinds) or loaded.model_type}); give one with a "
            "single output, or the reward folder of a run"
        )
    if loaded.num_labels != 1:
        names = ", ".join(map(str, loaded.id2label.values()))
        raise ValueError(
            f"{key}: the classifier {path!r} has {loaded.num_labels} labels ({names}), and a reward is one number: "
            "give a model with num_labels: 1"
        )
    if "auto_map" not in loaded.to_dict():
        try:
            model = empty_model(AutoModelForSequenceClassification, source, loaded, pinned_revision(source))
            _check_tokenizer(model, read_tokenizer(source), path)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error


def _check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Refuse a tokenizer whose padding or chat template has tokens that the classifier has no embedding for.

    Raises:
        ValueError: naming the token.
    """
    ids = [padding_id(model.config, tokenizer)]
    if ids[0] is None:
        raise ValueError(f"the tokenizer of {path!r} has neither a pad nor an EOS token; set one of them and save it")
    if tokenizer.chat_template is not None:
        with suppress(ValueError):  # a template that takes no such chat is refused where the data are rendered
            chat = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
            ids += tokenizer(render_chat(tokenizer, chat), add_special_tokens=False)["input_ids"]
    _check_ids(model, tokenizer, ids, path)


def _check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], path: str) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if (largest := max(ids, default=0)) >= rows:
        raise ValueError(
            f"the token {tokenizer.convert_ids_to_tokens(largest)!r} of {path!r} is number {largest}, but the "
            f"classifier has {rows} embeddings; use its own tokenizer and chat template, or resize its embeddings"
        )
