"""A sequence classifier as a reward: any model with one output, reading texts by its own tokenizer and template."""

import inspect
import pickle
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

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
        self.path, self.template, self.batch_size = path, template, batch_size
        self.model, self.tokenizer = read_classifier(path, config, "ppo.reward_model_path")
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
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
        encoded = [self._encode(p, text_of(c)) for p, c in zip(prompts, completions, strict=True)]
        return score_token_rows(
            self.model, self.tokenizer, encoded, self.batch_size, "ppo.reward_model_path", self.path
        )

    def _encode(self, prompt: str | list, text: str) -> dict[str, list[int]]:
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
    limit = position_limit(model.config)
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
    source = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
    trust = config.trust_remote_code
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
    source = str(directory) if directory.is_dir() else path
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
    ids = [tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id]
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
